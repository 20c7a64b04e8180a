"""What is done with each set of images: how it is encoded, and how long a training is that takes minutes on a core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.images import DEFAULT_OUT
from lwd.backbones import lightningdit_config
from lwd.data import LatentDataset, TensorLatents
from lwd.data.images import open_images
from lwd.data.reading import Reading, read_batches
from lwd.evaluation import Judges
from lwd.randomness import stream
from lwd.recipes import Recipe, get_recipe

ENCODERS = {"weak": "untrained", "middle": "efficientnet", "strong": "efficientnet"}
"""Semantic encoders, and the network whose features they are of: the principal components of the network with random
weights, those of the pretrained one, and a SemVAE of the same features of the latter."""
SEMANTIC_CHANNELS = 16
PATCH = 8
MEMORY = 10_000
"""Training images, at most, that generated ones are compared with for memorisation."""


@dataclass(frozen=True)
class Cost:
    """Seconds on one core of the machine named in `MEASURED_ON`; only estimates depend on them.

    Attributes:
        step: of training with the main network.
        probe_step: of a probe.
        weak_step: of training the weak network of AutoGuidance.
        evaluation: one model evaluation for one image.
        judged: one image, judged.
    """

    step: float
    probe_step: float
    weak_step: float
    evaluation: float
    judged: float


MEASURED_ON = "one core of an AMD EPYC, torch 2.13.0, bf16"


@dataclass(frozen=True)
class DataSet:
    """One set of images.

    Attributes:
        size: side of the images in pixels.
        grey: one channel instead of three.
        features: side to which the feature network resizes images; its grid, a 16th of it, is that of the patches.
        flips: whether a mirrored image is one of the same kind.
        steps: of training, before the budget.
        probe_steps: of a probe; larger images take longer until the curve moves.
        images: images per judged set, before the budget.
        semvae_steps: of the strong encoder's training.
        judge_steps: of the judge's training.
    """

    name: str
    size: int
    grey: bool
    features: int
    flips: bool
    steps: int
    probe_steps: int
    batch: int
    images: int
    semvae_steps: int
    judge_steps: int
    cost: Cost

    @property
    def texture(self) -> str:
        return f"pixels:{PATCH}"

    def network(self, encoder: str) -> str:
        """The feature network of a semantic encoder, as `lwd encode` takes it."""
        return f"{ENCODERS[encoder]}:10:{self.features}"


SETS = {
    data.name: data
    for data in (
        DataSet(
            "fashion-mnist", size=32, grey=True, features=64, flips=False, steps=1400, probe_steps=300,
            batch=64, images=1000, semvae_steps=1500, judge_steps=1200, cost=Cost(0.1, 0.1, 0.03, 0.0007, 0.005),
        ),
        DataSet(
            "openmoji", size=64, grey=False, features=128, flips=False, steps=2800, probe_steps=600,
            batch=32, images=500, semvae_steps=1000, judge_steps=400, cost=Cost(0.17, 0.17, 0.02, 0.0025, 0.006),
        ),
        DataSet(
            "elpv", size=64, grey=True, features=128, flips=True, steps=2800, probe_steps=600,
            batch=32, images=500, semvae_steps=1000, judge_steps=400, cost=Cost(0.17, 0.17, 0.02, 0.0025, 0.006),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Where the files of experiments are."""

    out: Path = DEFAULT_OUT

    def images(self, data: DataSet) -> Path:
        return self.out / "images" / data.name

    def latents(self, data: DataSet, encoder: str, part: str = "train") -> Path:
        return self.out / "latents" / data.name / encoder / part

    def judges(self, data: DataSet) -> Path:
        return self.out / "judges" / data.name


def load_images(folder: Path, part: str, data: DataSet) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, S, S] or [N, 3, S, S] and labels of a part; FileNotFoundError says how to make it."""
    path = folder / f"{part}.tar"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: make it with `python -m experiments.images {data.name}`")
    source = open_images(str(path))
    reading = Reading(data.size, 1 if data.grey else 3, batch=500)
    images = torch.cat([batch.images for batch in read_batches(source, reading.batches(range(len(source))), reading)])
    return images[:, 0] if data.grey else images, source.labels


def labels_of(data: DataSet, places: Places) -> Tensor:
    """Classes [N] that generated images are asked for: those of the training images, in a random order that is always
    the same."""
    labels = LatentDataset.open(places.latents(data, "middle")).labels()
    return labels[torch.randperm(len(labels), generator=stream(0, "floor"))]


def judges_of(data: DataSet, places: Places, device: torch.device | str = "cpu", budget: float = 1.0) -> Judges:
    """The judges of a set, the same for all seeds and encoders: scores of two judges could not be compared."""
    folder = places.images(data)
    return Judges(
        places.judges(data),
        lambda part: load_images(folder, part, data),
        name=data.name,
        seed=0,
        steps=max(20, round(data.judge_steps * min(budget, 1.0))),
        memory=MEMORY,
        device=device,
    )


def recipe_of(data: DataSet, latents: TensorLatents, *, weak: bool = False) -> Recipe:
    """The demo's recipe for the groups, grid and classes of a latent set of ours, at a budget of 1.

    Args:
        weak: the small, briefly trained network that AutoGuidance steers away from.
    """
    base = get_recipe("embedded-weak" if weak else "embedded")
    demo = base.backbone
    backbone = lightningdit_config(
        "demo", latents.spec, input_size=latents.grid[0], num_classes=len(latents.class_names),
        hidden_size=demo.hidden_size, depth=demo.depth, num_heads=demo.num_heads,
    )  # fmt: skip
    assert base.probe is not None
    steps = data.steps // 3 if weak else data.steps
    train = replace(
        base.train, steps=steps, batch_size=data.batch, flips=data.flips,
        snapshots=() if weak else (steps // 4, steps // 2),
    )  # fmt: skip
    burn_in = data.probe_steps * base.probe.burn_in // base.probe.steps
    probe = replace(
        base.probe, steps=data.probe_steps, burn_in=burn_in, batch_size=data.batch, flips=data.flips
    )  # fmt: skip
    return replace(base, backbone=backbone, train=train, probe=probe)


def sizes(steps: int, share: float) -> int:
    """`steps` times `share`, at least 2, as `Recipe.scaled` rounds."""
    return max(2, round(steps * share))


def checked(name: str, table: Mapping[str, object], what: str) -> str:
    """`name` if `table` has it; ValueError with all names otherwise."""
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(table)}")
    return name
