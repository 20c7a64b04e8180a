"""Images in memory: drawn in batches, seeded one by one, decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lwd.generation.config import SampleConfig
from lwd.pipeline import Pipeline, image_seed
from lwd.progress import Progress
from lwd.sampling import SampleResult, sample, seeded_noise


@dataclass(frozen=True)
class DrawnImages:
    """Images uint8 [N, H, W] (grey) or [N, H, W, 3], their classes [N], latents and model evaluations per image."""

    images: Tensor
    labels: Tensor
    latents: Tensor
    evaluations: Tensor


class Drawer:
    """Draws images of one set: image i has seed (seed, i) and class classes[i mod len].

    Args:
        classes: numbers, gone through in turn.

    Raises:
        ValueError: a class out of range.
    """

    def __init__(self, pipeline: Pipeline, config: SampleConfig, classes: Sequence[int] = ()) -> None:
        self.pipeline, self.config = pipeline, config
        self.classes = [pipeline.class_number(c) for c in classes or range(pipeline.config.num_classes)]
        self._denoiser = config.guided(pipeline)
        self._steps = config.step_times(pipeline)

    def label(self, index: int) -> int:
        return self.classes[index % len(self.classes)]

    def latents(self, indices: Sequence[int]) -> SampleResult:
        """The normalised latents of some images; what else is in the batch does not matter."""
        pipeline, config = self.pipeline, self.config
        return sample(
            self._denoiser,
            pipeline.schedule,
            seeded_noise([image_seed(config.seed, i) for i in indices], pipeline.latent_shape, pipeline.device),
            torch.tensor([self.label(i) for i in indices], device=pipeline.device),
            solver=config.solver,
            steps=self._steps,
            atol=config.atol,
            rtol=config.rtol,
            spec=pipeline.spec,
        )


def draw_images(
    pipeline: Pipeline,
    config: SampleConfig,
    *,
    count: int,
    labels: Sequence[int] = (),
    batch: int = 250,
    title: str = "sample",
) -> DrawnImages:
    """The first `count` images of a set; neither `count` nor `batch` changes them.

    Args:
        labels: classes to go through in turn; all of them by default.

    Raises:
        ValueError: a class out of range.
    """
    drawer = Drawer(pipeline, config, labels)
    images, latents, evaluations = [], [], []
    with Progress(title, count, unit="image") as progress:
        for start in range(0, count, batch):
            rows = range(start, min(start + batch, count))
            result = drawer.latents(rows)
            images.append(pipeline.decode(result.latents).cpu())
            latents.append(result.latents.cpu())
            evaluations.append(result.evaluations_per_image)
            progress.advance(len(rows))
    drawn = torch.tensor([drawer.label(i) for i in range(count)])
    return DrawnImages(channels_last(torch.cat(images)), drawn, torch.cat(latents), torch.cat(evaluations))


def channels_last(images: Tensor) -> Tensor:
    """[N, 1, H, W] -> [N, H, W]; [N, 3, H, W] -> [N, H, W, 3]."""
    return images[:, 0] if images.shape[1] == 1 else images.movedim(1, -1)
