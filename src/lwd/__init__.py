"""Learning When to Denoise: learned asynchronous schedules for latent diffusion over several representations."""

from lwd.guidance import AutoGuidance, ClassifierFreeGuidance
from lwd.interpolant import global_velocity, interpolate, target_velocity
from lwd.latents import IMAGENET_SPEC, Group, LatentSpec, Normalization
from lwd.objective import DenoiserTerms, ScheduleTerms, denoiser_objective, sample_tau, schedule_objective
from lwd.sampling import SampleResult, sample, seeded_noise
from lwd.schedules import (
    CascadedSchedule,
    LocalTimes,
    OffsetSchedule,
    PiecewiseLinearSchedule,
    PolynomialSchedule,
    Schedule,
    ShiftedSchedule,
    SynchronousSchedule,
    load_schedule,
)

__version__ = "0.1.0"
