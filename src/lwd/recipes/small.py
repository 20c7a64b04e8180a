"""32 x 32 images on one GPU. Not from the paper, and not tuned."""

from __future__ import annotations

from lwd.backbones import lightningdit_config
from lwd.latents import Group, LatentSpec
from lwd.probe import ProbeConfig
from lwd.recipes.base import PAPER_SWEEP, Recipe, recipe
from lwd.steps import OptimizerConfig
from lwd.training import TrainConfig

CIFAR_SPEC = LatentSpec([Group("texture", 48, 1.0), Group("semantic", 16, 3.0)])
"""4x4 patches of colour pixels on an 8x8 grid, and 16 principal components; w_sem balances 48 against 16 channels."""


@recipe
def cifar_s() -> Recipe:
    return Recipe(
        name="cifar-s",
        summary="32x32 images, pixels and PCA",
        backbone=lightningdit_config("S", CIFAR_SPEC, input_size=8, num_classes=10),
        schedule="learned",
        # The paper's probe is 1 % of its training; here half of the steps of Table 4, because rho, at its rate of
        # 1e-2 a step, needs a few thousand to arrive whatever the length of the training.
        probe=ProbeConfig(steps=5_000, burn_in=2_500, flips=True),
        kinetics=PAPER_SWEEP,
        train=TrainConfig(
            steps=100_000,
            optimizer=OptimizerConfig(lr=3e-4, warmup_steps=1_000),
            repa=0.0,
            flips=True,
            snapshots=(25_000, 50_000),
        ),
        latents="pixels:4 48x8x8, pca:16 of efficientnet:10:128 16x8x8",
        epoch_images=50_000,
    )
