"""How images are drawn: solver, guidance and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lwd.guidance import AutoGuidance, ClassifierFreeGuidance, Interval, Scale, ScaleCurve
from lwd.objective import Denoiser
from lwd.pipeline import Pipeline
from lwd.placement import Spacing, kinetic_density, place_steps
from lwd.randomness import derived_seed
from lwd.sampling import seeded_noise
from lwd.solvers import SOLVERS, Dopri5

Placement = Literal["uniform", "kinetic"]
PILOT_IMAGES = 16
"""Images of the pilot run that the kinetic energy is measured on."""


@dataclass(frozen=True)
class SampleConfig:
    """What an image depends on besides the model and its class.

    Args:
        solver: see `lwd.sample`; ``"dopri5"`` at the paper's tolerances by default.
        steps: of a fixed-step solver; raised to one per smooth piece of the schedule where it is less.
        placement: whether steps are equal in global time or in the arc length of the path, see `lwd.placement`; for
            that a pilot run measures the kinetic energy.
        spacing: within every smooth piece of the schedule: ``"uniform"``, or ``"cosine"``, short at both ends.
        atol, rtol: of the adaptive solver.
        scale: of guidance: one number, or one per group; empty for 1.5 with a weak model and none without.
        scale_times: global times of the knots of a scale that varies; `scale` then has a value (or one per group,
            knot by knot) for each.
        interval: local times from, to that are guided: two numbers, or two per group.
        seed: of the noise.

    Raises:
        ValueError: settings that contradict each other.
    """

    solver: str = "dopri5"
    steps: int | None = None
    placement: Placement = "uniform"
    spacing: Spacing = "uniform"
    atol: float = 1e-6
    rtol: float = 1e-3
    scale: tuple[float, ...] = ()
    scale_times: tuple[float, ...] = ()
    interval: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        if self.adaptive and (self.steps is not None or {self.placement, self.spacing} != {"uniform"}):
            raise ValueError(
                f"{self.solver} chooses its own steps; steps, placement and spacing are for a fixed-step solver"
            )
        if len(self.interval) % 2:
            raise ValueError(f"an interval is two local times, or two per group, not {self.interval}")
        if self.scale_times and (not self.scale or len(self.scale) % len(self.scale_times)):
            raise ValueError(
                f"{len(self.scale_times)} scale times need as many scales (or as many times the groups), "
                f"not {len(self.scale)}"
            )

    @property
    def adaptive(self) -> bool:
        return isinstance(SOLVERS[self.solver], Dopri5)

    def guided(self, pipeline: Pipeline) -> Denoiser:
        """The pipeline's denoiser under this guidance."""
        return pipeline.guided(self._scale(), interval=self._interval())

    def step_times(self, pipeline: Pipeline) -> int | list[float] | None:
        """What `lwd.sample` takes as `steps`. Placed steps cost a pilot run, which depends on the model alone."""
        if self.adaptive:
            return None
        steps = max(50 if self.steps is None else self.steps, len(pipeline.schedule.kinks) + 1)
        if self.placement == self.spacing == "uniform":
            return steps
        density = None
        if self.placement == "kinetic":
            seeds = [derived_seed(0, "placement", i) for i in range(PILOT_IMAGES)]
            labels = torch.arange(PILOT_IMAGES, device=pipeline.device) % pipeline.config.num_classes
            noise = seeded_noise(seeds, pipeline.latent_shape, pipeline.device)
            density = kinetic_density(self.guided(pipeline), pipeline.schedule, noise, labels, spec=pipeline.spec)
        return place_steps(pipeline.schedule, steps, density, spacing=self.spacing)

    def describe(self, pipeline: Pipeline) -> dict[str, Any]:
        """The origin of images drawn so, as JSON: model, schedule, guidance, solver, seed."""
        return pipeline.describe() | {
            "guidance": self._describe_guidance(pipeline),
            "solver": self.solver,
            "steps": None if self.adaptive else (50 if self.steps is None else self.steps),
            "placement": self.placement,
            "spacing": self.spacing,
            "atol": self.atol if self.adaptive else None,
            "rtol": self.rtol if self.adaptive else None,
            "precision": pipeline.precision,
            "seed": self.seed,
        }

    def _scale(self) -> Scale | None:
        if not self.scale_times:
            return self.scale or None
        per_knot = len(self.scale) // len(self.scale_times)
        knots = [self.scale[i : i + per_knot] for i in range(0, len(self.scale), per_knot)]
        return ScaleCurve(self.scale_times, knots)

    def _interval(self) -> Sequence[Interval] | None:
        return list(zip(self.interval[::2], self.interval[1::2], strict=True)) or None

    def _describe_guidance(self, pipeline: Pipeline) -> dict[str, Any] | None:
        guided = self.guided(pipeline)
        if not isinstance(guided, AutoGuidance | ClassifierFreeGuidance):
            return None
        weak = None
        if isinstance(guided, AutoGuidance):
            assert pipeline.weak is not None
            described = pipeline.weak.describe()
            weak = {key: described[key] for key in ("run", "recipe", "step", "model_sha256", "parameters")}
        scale = guided.scale.to_dict() if isinstance(guided.scale, ScaleCurve) else list(guided.scale)
        return {
            "kind": "classifier-free" if weak is None else "autoguidance",
            "scale": scale,
            "interval": None if guided.interval is None else [list(pair) for pair in guided.interval],
            "weak": weak,
        }
