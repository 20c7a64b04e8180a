"""Named experiments, as functions that return configurations.

A recipe says everything that decides a run except where its data lie: latent groups, backbone, schedule, probe and
training. `lwd recipes` lists them; `lwd probe` and `lwd train` take one by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lwd.backbones import LightningDiTConfig, lightningdit_config
from lwd.data.embedded import EMBEDDED_SPEC
from lwd.latents import IMAGENET_SPEC
from lwd.probe import ProbeConfig
from lwd.schedules import (
    CascadedSchedule,
    OffsetSchedule,
    Schedule,
    ShiftedSchedule,
    SynchronousSchedule,
    load_schedule,
)
from lwd.training import OptimizerConfig, TrainConfig

ITERATIONS_PER_EPOCH = 5_000
"""ImageNet at batch 256, as the paper counts epochs (section 4.1)."""

PAPER_SWEEP = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.1)


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        schedule: ``"learned"``, or a fixed one as `make_schedule` reads it.
        probe: how the schedule is learned; None for a fixed one.
        kinetics: the sweep over lambda.
    """

    name: str
    summary: str
    backbone: LightningDiTConfig
    schedule: str
    train: TrainConfig
    probe: ProbeConfig | None = None
    kinetics: tuple[float, ...] = ()

    def scaled(self, budget: float) -> Recipe:
        """The same experiment with all step counts times `budget`."""
        if not budget > 0:
            raise ValueError(f"a budget is a positive factor, not {budget}")
        probe = self.probe
        if probe is not None:
            steps = max(2, round(probe.steps * budget))
            probe = replace(probe, steps=steps, burn_in=min(steps - 1, round(probe.burn_in * budget)))
        optimizer = self.train.optimizer
        train = replace(
            self.train,
            steps=max(2, round(self.train.steps * budget)),
            optimizer=replace(optimizer, warmup_steps=round(optimizer.warmup_steps * budget)),
            snapshots=tuple(max(1, round(step * budget)) for step in self.train.snapshots),
        )
        return replace(self, probe=probe, train=train)


RECIPES: dict[str, Callable[[], Recipe]] = {}


def _recipe(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    RECIPES[make.__name__.replace("_", "-")] = make
    return make


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError with the nearest names when there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"no recipe {name!r}.{hint} `lwd recipes` lists them.")
    return RECIPES[name]()


def make_schedule(text: str, names: Sequence[str]) -> Schedule:
    """A schedule from the command line: ``synchronous``, ``cascaded``, ``offset``, ``offset:0.5``, ``shifted:1,3``, or
    the path of a schedule file."""
    kind, _, argument = text.partition(":")
    groups = len(names)
    try:
        match kind:
            case "synchronous" if not argument:
                return SynchronousSchedule(groups, names)
            case "cascaded" if not argument:
                return CascadedSchedule(groups, names)
            case "offset":
                return OffsetSchedule(float(argument or 0.3), groups, names)
            case "shifted":
                return ShiftedSchedule([float(a) for a in argument.split(",")], groups, names)
    except ValueError as error:
        raise ValueError(f"schedule {text!r}: {error}") from error
    if not Path(text).exists():
        raise ValueError(
            f"no schedule {text!r}: give synchronous, cascaded, offset[:delta], shifted:a,b or a schedule file"
        )
    return load_schedule(text, names)


# --- the embedded data set: minutes on two cores -----------------------------------------------------------------

# Minutes, not weeks: many small steps at a high rate beat fewer large ones in the same time.
_DEMO_OPTIMIZER = OptimizerConfig(lr=3e-3, betas=(0.9, 0.95), warmup_steps=50, decay="linear")


def _embedded(size: str, **overrides: Any) -> LightningDiTConfig:
    return lightningdit_config(size, EMBEDDED_SPEC, input_size=4, num_classes=10, **overrides)


@_recipe
def embedded() -> Recipe:
    steps = 1400
    return Recipe(
        name="embedded",
        summary="Fashion-MNIST (embedded), learned schedule: what `lwd demo` runs",
        backbone=_embedded("demo"),
        schedule="learned",
        probe=ProbeConfig(
            steps=300,
            burn_in=180,
            batch_size=64,
            optimizer=OptimizerConfig(lr=1e-3),
            rho_lr=3e-2,
            log_every=10,
            save_seconds=20,
        ),
        kinetics=(0.0, 0.02, 0.04, 0.08),
        train=TrainConfig(
            steps=steps,
            batch_size=64,
            optimizer=_DEMO_OPTIMIZER,
            ema=0.995,
            repa=0.0,
            log_every=20,
            save_seconds=20,
            snapshots=(steps // 4, steps // 2),
        ),
    )


@_recipe
def embedded_offset() -> Recipe:
    recipe = embedded()
    return replace(
        recipe,
        name="embedded-offset",
        summary="the same with SFD's offset 0.3 and its uncorrected loss",
        schedule="offset:0.3",
        probe=None,
        kinetics=(),
        train=replace(recipe.train, jacobian="none"),
    )


@_recipe
def embedded_synchronous() -> Recipe:
    return replace(
        embedded(),
        name="embedded-synchronous",
        summary="the same with one clock for both groups",
        schedule="synchronous",
        probe=None,
        kinetics=(),
    )


@_recipe
def embedded_weak() -> Recipe:
    recipe = embedded()
    return replace(
        recipe,
        name="embedded-weak",
        summary="the small, briefly trained model that AutoGuidance steers away from",
        backbone=_embedded("demo", hidden_size=128, depth=2),
        train=replace(recipe.train, steps=recipe.train.steps // 3, snapshots=()),
    )


# --- ImageNet 256, as in the paper ---------------------------------------------------------------------------------


def _imagenet(name: str, summary: str, iterations: int, schedule: str = "learned", size: str = "XL") -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        backbone=lightningdit_config(size, IMAGENET_SPEC, input_size=16, num_classes=1000, repa_depth=2),
        schedule=schedule,
        probe=ProbeConfig() if schedule == "learned" else None,
        kinetics=PAPER_SWEEP if schedule == "learned" else (),
        train=TrainConfig(steps=iterations, flips=True),
    )


@_recipe
def imagenet_xl_80ep() -> Recipe:
    return _imagenet("imagenet-xl-80ep", "LWD-XL, 0.4M iterations: FID 2.87, 1.14 with AutoGuidance 1.5", 400_000)


@_recipe
def imagenet_xl_200ep() -> Recipe:
    return _imagenet("imagenet-xl-200ep", "LWD-XL, 1M iterations: FID 2.37, 1.05 with AutoGuidance 1.5", 1_000_000)


@_recipe
def imagenet_xl_600ep() -> Recipe:
    return _imagenet("imagenet-xl-600ep", "LWD-XL, 3M iterations: FID 2.14, 1.02 with AutoGuidance 1.3", 3_000_000)


@_recipe
def imagenet_b_weak() -> Recipe:
    return _imagenet("imagenet-b-weak", "the weak model for AutoGuidance: B, 70K iterations", 70_000, size="B")


@_recipe
def imagenet_sfd_xl() -> Recipe:
    recipe = _imagenet("imagenet-sfd-xl", "SFD-XL, offset 0.3, 4M iterations: FID 2.54", 4_000_000, "offset:0.3")
    return replace(recipe, train=replace(recipe.train, jacobian="none", tau="logit_normal"))
