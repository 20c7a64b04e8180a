"""Sheets of samples of a network in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd import distributed
from lwd.files import write_atomically
from lwd.objective import Denoiser
from lwd.placement import place_steps
from lwd.randomness import derived_seed
from lwd.sampling import sample, seeded_noise
from lwd.schedules import Schedule


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
        """Sample with 20 evaluations and write the sheet; for `lwd.training.Measure`."""
        times = place_steps(self.schedule, 20, spacing="cosine")
        found = sample(denoiser, self.schedule, self.noise, self.labels, solver="ab3", steps=times)
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
