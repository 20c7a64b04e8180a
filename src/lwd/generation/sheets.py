"""Images from a trained run: batched, seeded one by one, decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwd import distributed
from lwd.files import write_atomically
from lwd.guidance import AutoGuidance
from lwd.objective import Denoiser
from lwd.progress import Progress
from lwd.randomness import derived_seed
from lwd.runs import TrainedRun
from lwd.sampling import sample, seeded_noise
from lwd.schedules import Schedule


@dataclass(frozen=True)
class DrawnImages:
    """Images uint8 [N, H, W] (grey) or [N, H, W, 3], their classes [N], latents and model evaluations per image."""

    images: Tensor
    labels: Tensor
    latents: Tensor
    evaluations: Tensor

    def save(self, path: Path) -> Path:
        """Write a compressed npz."""
        return save_npz(
            path,
            images=self.images.numpy(),
            labels=self.labels.numpy(),
            latents=self.latents.numpy(),
            evaluations=self.evaluations.numpy(),
        )


def draw_images(
    run: TrainedRun,
    *,
    count: int,
    device: torch.device,
    labels: Sequence[int] = (),
    weak: TrainedRun | None = None,
    scale: float = 1.5,
    solver: str = "dopri5",
    steps: int | None = None,
    seed: int = 0,
    batch: int = 250,
    title: str = "sample",
) -> DrawnImages:
    """Image i has seed (seed, i) and class labels[i mod len]; neither depends on `count` or `batch`.

    Args:
        labels: classes to go through in turn; all of them by default.
        weak: for AutoGuidance with `scale`.
        steps: of a fixed-step solver; raised to one per smooth piece of the schedule where it is less.

    Raises:
        ValueError: a class out of range; a weak model trained on another schedule.
    """
    classes = torch.tensor(list(labels) or list(range(run.config.num_classes)))
    if not 0 <= int(classes.min()) <= int(classes.max()) < run.config.num_classes:
        raise ValueError(f"classes are 0 to {run.config.num_classes - 1}; asked for {sorted(set(classes.tolist()))}")
    wanted = classes[torch.arange(count) % len(classes)]
    denoiser = run.denoiser if weak is None else _autoguidance(run, weak, scale)
    if steps is not None:
        steps = max(steps, len(run.schedule.kinks) + 1)
    latents, evaluations = [], []
    with Progress(title, count, unit="image") as progress:
        for start in range(0, count, batch):
            rows = range(start, min(start + batch, count))
            noise = seeded_noise([image_seed(seed, i) for i in rows], (run.spec.channels, *run.grid), device)
            here = wanted[rows.start : rows.stop].to(device)
            result = sample(denoiser, run.schedule, noise, here, solver=solver, steps=steps, spec=run.spec)
            latents.append(result.latents.cpu())
            evaluations.append(result.evaluations_per_image)
            progress.advance(len(rows))
    drawn = torch.cat(latents)
    return DrawnImages(channels_last(run.decode(drawn)), wanted, drawn, torch.cat(evaluations))


def image_seed(seed: int, index: int) -> int:
    """The noise seed of image `index` in a set drawn with `seed`."""
    return derived_seed(seed, "image", index)


def channels_last(images: Tensor) -> Tensor:
    """[N, 1, H, W] -> [N, H, W]; [N, 3, H, W] -> [N, H, W, 3]."""
    return images[:, 0] if images.shape[1] == 1 else images.movedim(1, -1)


def save_npz(path: Path, **arrays: np.ndarray[Any, Any]) -> Path:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    return write_atomically(path, write)


def _autoguidance(run: TrainedRun, weak: TrainedRun, scale: float) -> Denoiser:
    ours, theirs = run.schedule.to_dict(), weak.schedule.to_dict()
    if any(ours[key] != theirs[key] for key in ("kind", "groups", "parameters")):
        raise ValueError(
            "guidance needs both models on the same path, but the main one was trained on the schedule "
            f"{ours['kind']} {ours['parameters']} and the weak one on {theirs['kind']} {theirs['parameters']}"
        )
    run.normalization.require_equal(weak.normalization, "the main run", "the weak run")
    return AutoGuidance(run.denoiser, weak.denoiser, scale, spec=run.spec)


class SampleSheets:
    """A sheet of samples of a network in training, always of the same noise and classes: ``samples/<step>.png``.

    Args:
        directory: of the run.
        decode: normalised latents to images uint8 [N, c, H, W].
        shape: of a latent, [C, H, W].
        classes: how many there are.
    """

    def __init__(
        self,
        directory: Path,
        schedule: Schedule,
        decode: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        classes: int,
        device: torch.device,
        *,
        side: int = 4,
    ) -> None:
        self.directory, self.schedule, self.decode, self.side = directory / "samples", schedule, decode, side
        self.noise = seeded_noise([derived_seed(0, "sheet", i) for i in range(side**2)], tuple(shape)).to(device)
        self.labels = torch.arange(side**2, device=device) * classes // side**2

    def draw(self, denoiser: Denoiser, step: int) -> dict[str, Any]:
        """Sample with 20 steps of Heun's method and write the sheet; for `lwd.training.Measure`."""
        found = sample(denoiser, self.schedule, self.noise, self.labels, solver="heun", steps=20)
        if distributed.rank() == 0:
            from PIL import Image

            images = self.decode(found.latents).cpu()
            rows = images.unflatten(0, (self.side, self.side)).permute(0, 3, 1, 4, 2)
            sheet = rows.reshape(self.side * images.shape[2], self.side * images.shape[3], -1).squeeze(-1)
            write_atomically(
                self.directory / f"{step:08}.png",
                lambda path: Image.fromarray(sheet.numpy()).save(path, format="PNG"),
            )
        return {}
