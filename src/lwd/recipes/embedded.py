"""The embedded data set: minutes on two cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lwd.backbones import LightningDiTConfig, lightningdit_config
from lwd.data.embedded import EMBEDDED_SPEC
from lwd.probe import ProbeConfig
from lwd.recipes.base import Recipe, recipe
from lwd.steps import OptimizerConfig
from lwd.training import TrainConfig

# Minutes, not weeks: many small steps at a high rate beat fewer large ones in the same time.
_DEMO_OPTIMIZER = OptimizerConfig(lr=3e-3, betas=(0.9, 0.95), warmup_steps=50, decay="linear")


def _backbone(size: str, **overrides: Any) -> LightningDiTConfig:
    return lightningdit_config(size, EMBEDDED_SPEC, input_size=4, num_classes=10, **overrides)


@recipe
def embedded() -> Recipe:
    steps = 1400
    return Recipe(
        name="embedded",
        summary="Fashion-MNIST (embedded), learned schedule: what `lwd demo` runs",
        backbone=_backbone("demo"),
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
        latents="the embedded images: pixels:8 64x4x4, pca:16 of efficientnet:10:64 16x4x4",
        epoch_images=8_000,
    )


@recipe
def embedded_offset() -> Recipe:
    learned = embedded()
    return replace(
        learned,
        name="embedded-offset",
        summary="the same with SFD's offset 0.3 and its uncorrected loss",
        schedule="offset:0.3",
        probe=None,
        kinetics=(),
        train=replace(learned.train, jacobian="none"),
    )


@recipe
def embedded_synchronous() -> Recipe:
    return replace(
        embedded(),
        name="embedded-synchronous",
        summary="the same with one clock for both groups",
        schedule="synchronous",
        probe=None,
        kinetics=(),
    )


@recipe
def embedded_weak() -> Recipe:
    learned = embedded()
    return replace(
        learned,
        name="embedded-weak",
        summary="the small, briefly trained model that AutoGuidance steers away from",
        backbone=_backbone("demo", hidden_size=128, depth=2),
        train=replace(learned.train, steps=learned.train.steps // 3, snapshots=()),
    )
