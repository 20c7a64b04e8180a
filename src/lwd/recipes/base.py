"""What a recipe is, and the registry that the modules beside this one fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lwd.backbones import LightningDiTConfig
from lwd.probe import ProbeConfig
from lwd.training import TrainConfig

ITERATIONS_PER_EPOCH = 5_000
"""ImageNet at batch 256, as the paper counts epochs (section 4.1)."""

PAPER_SWEEP = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.1)
"""The values of lambda of section 4.2."""


@dataclass(frozen=True)
class Published:
    """One published row: what a checkpoint of the recipe scored in 50,000 class-balanced images.

    Attributes:
        iterations: of the checkpoint.
        guidance: the scale w of AutoGuidance; None for an unguided row.
        source: where the row stands; table and section numbers alone are those of the paper (LWD).
        weak: the weak model of a guided row, as ``"recipe@iterations"``.
    """

    iterations: int
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    guidance: float | None = None
    source: str = "Table 1"
    weak: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        schedule: ``"learned"``, or a fixed one as `make_schedule` reads it.
        probe: how the schedule is learned; None for a fixed one, and where another recipe's probe learns it.
        kinetics: the sweep over lambda.
        latents: what the latents are of. Two recipes may differ in nothing else.
        epoch_images: images that count as one epoch.
        published: what was published for checkpoints of this run, unguided rows first.
    """

    name: str
    summary: str
    backbone: LightningDiTConfig
    schedule: str
    train: TrainConfig
    probe: ProbeConfig | None = None
    kinetics: tuple[float, ...] = ()
    latents: str = ""
    epoch_images: int = ITERATIONS_PER_EPOCH * 256
    published: tuple[Published, ...] = ()

    @property
    def images(self) -> int:
        """Images seen in training (stage II)."""
        return self.train.steps * self.train.batch_size

    @property
    def epochs(self) -> float:
        return self.images / self.epoch_images

    def published_at(self, iterations: int, *, guided: bool = False) -> Published:
        """The published row of the checkpoint after `iterations`.

        Raises:
            ValueError: nothing was published for it; lists what was.
        """
        rows = [row for row in self.published if (row.guidance is not None) == guided]
        for row in rows:
            if row.iterations == iterations:
                return row
        kind = "with AutoGuidance" if guided else "without guidance"
        known = ", ".join(f"{row.iterations:,}" for row in rows) or "nothing"
        raise ValueError(f"{self.name} at {iterations:,} iterations has no published result {kind}; there is: {known}")

    def scaled(self, budget: float) -> Recipe:
        """The same experiment with all step counts times `budget`; what was published holds for a budget of 1 only."""
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
            snapshots=tuple(dict.fromkeys(max(1, round(step * budget)) for step in self.train.snapshots)),
        )
        return replace(self, probe=probe, train=train, published=self.published if budget == 1 else ())


RECIPES: dict[str, Callable[[], Recipe]] = {}
"""Every recipe, by name."""


def recipe(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Register `make` under its name, written with hyphens."""
    RECIPES[make.__name__.replace("_", "-")] = make
    return make
