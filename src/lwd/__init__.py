"""Learning When to Denoise: learned asynchronous schedules for latent diffusion over several representations.

Names are imported on first use, so that `import lwd` (and `lwd --help`) do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwd.backbones import LightningDiT, LightningDiTConfig, lightningdit_config
    from lwd.guidance import AutoGuidance, ClassifierFreeGuidance, ScaleCurve
    from lwd.interpolant import global_velocity, interpolate, target_velocity
    from lwd.latents import IMAGENET_SPEC, Group, LatentSpec, Normalization
    from lwd.objective import DenoiserTerms, ScheduleTerms, denoiser_objective, sample_tau, schedule_objective
    from lwd.paths import best_path, best_polynomial
    from lwd.pipeline import Pipeline, PipelineOutput
    from lwd.placement import KineticDensity, kinetic_density, place_steps
    from lwd.probe import LearnedSchedule, ProbeConfig, learn_schedule
    from lwd.sampling import SampleResult, sample, seeded_noise
    from lwd.schedules import (
        BernsteinSchedule,
        CascadedSchedule,
        IndependentTimes,
        LocalTimes,
        OffsetSchedule,
        PiecewiseLinearSchedule,
        PolynomialSchedule,
        Schedule,
        ShiftedSchedule,
        SynchronousSchedule,
        load_schedule,
    )
    from lwd.steps import OptimizerConfig
    from lwd.surface import ErrorSurface, measure_surface
    from lwd.sweep import Sweep, bisect_kinetic, sweep_kinetic
    from lwd.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

_HOMES = {
    "lwd.backbones": ("LightningDiT", "LightningDiTConfig", "lightningdit_config"),
    "lwd.guidance": ("AutoGuidance", "ClassifierFreeGuidance", "ScaleCurve"),
    "lwd.interpolant": ("global_velocity", "interpolate", "target_velocity"),
    "lwd.latents": ("IMAGENET_SPEC", "Group", "LatentSpec", "Normalization"),
    "lwd.objective": ("DenoiserTerms", "ScheduleTerms", "denoiser_objective", "sample_tau", "schedule_objective"),
    "lwd.paths": ("best_path", "best_polynomial"),
    "lwd.pipeline": ("Pipeline", "PipelineOutput"),
    "lwd.placement": ("KineticDensity", "kinetic_density", "place_steps"),
    "lwd.probe": ("LearnedSchedule", "ProbeConfig", "learn_schedule"),
    "lwd.sampling": ("SampleResult", "sample", "seeded_noise"),
    "lwd.schedules": (
        "BernsteinSchedule",
        "CascadedSchedule",
        "IndependentTimes",
        "LocalTimes",
        "OffsetSchedule",
        "PiecewiseLinearSchedule",
        "PolynomialSchedule",
        "Schedule",
        "ShiftedSchedule",
        "SynchronousSchedule",
        "load_schedule",
    ),
    "lwd.surface": ("ErrorSurface", "measure_surface"),
    "lwd.sweep": ("Sweep", "bisect_kinetic", "sweep_kinetic"),
    "lwd.steps": ("OptimizerConfig",),
    "lwd.training": ("TrainConfig", "TrainResult", "train"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
_SUBPACKAGES = (
    "backbones", "data", "encoders", "evaluation", "generation", "latents", "memory", "recipes", "report", "schedules",
    "solvers",
)  # fmt: skip

__all__ = [
    "IMAGENET_SPEC",
    "AutoGuidance",
    "BernsteinSchedule",
    "CascadedSchedule",
    "ClassifierFreeGuidance",
    "DenoiserTerms",
    "ErrorSurface",
    "Group",
    "IndependentTimes",
    "KineticDensity",
    "LatentSpec",
    "LearnedSchedule",
    "LightningDiT",
    "LightningDiTConfig",
    "LocalTimes",
    "Normalization",
    "OffsetSchedule",
    "OptimizerConfig",
    "PiecewiseLinearSchedule",
    "Pipeline",
    "PipelineOutput",
    "PolynomialSchedule",
    "ProbeConfig",
    "SampleResult",
    "ScaleCurve",
    "Schedule",
    "ScheduleTerms",
    "ShiftedSchedule",
    "Sweep",
    "SynchronousSchedule",
    "TrainConfig",
    "TrainResult",
    "best_path",
    "best_polynomial",
    "bisect_kinetic",
    "denoiser_objective",
    "global_velocity",
    "interpolate",
    "kinetic_density",
    "learn_schedule",
    "lightningdit_config",
    "load_schedule",
    "measure_surface",
    "place_steps",
    "sample",
    "sample_tau",
    "schedule_objective",
    "seeded_noise",
    "sweep_kinetic",
    "target_velocity",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _SUBPACKAGES:
        value = import_module(f"lwd.{name}")
    else:
        raise AttributeError(f"module 'lwd' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES, "__version__"])
