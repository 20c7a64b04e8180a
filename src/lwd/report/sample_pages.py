"""Sets of generated images by class, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lwd.evaluation.images import NpzImages
from lwd.files import read_json
from lwd.generation.draw import channels_last
from lwd.report.images import grid, png_uri

SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)
"""Classes of ImageNet that papers of this field show; first, where they are there."""
MOST_CLASSES, PER_CLASS = 12, 8
LARGEST = 128
"""Pixels per side in the page, which is to stay small."""


def sample_sections(sets: Sequence[Path]) -> str:
    """A figure per set: some images of each of some classes. Sets of latents are left out."""
    return "".join(_section(directory) for directory in sets)


def _section(directory: Path) -> str:
    about = read_json(directory / "samples.json")
    if about["form"] == "latents":
        return ""
    classes, count = about["classes"], about["images"]
    present = list(dict.fromkeys(classes[i % len(classes)] for i in range(min(count, len(classes)))))
    chosen = [number for number in SHOWN if number in present and len(present) > 100] or sorted(present)[:MOST_CLASSES]
    indices = [[i for i in range(count) if classes[i % len(classes)] == number][:PER_CLASS] for number in chosen]
    width = max(len(row) for row in indices)
    pictures = _pictures(directory, about["form"], [i for row in indices for i in row])
    blank = np.zeros_like(next(iter(pictures.values())))
    rows = [np.stack([pictures[i] for i in row] + [blank] * (width - len(row))) for row in indices]
    names = about.get("class_names", [])
    labels = "".join(f"<li>{escape(names[number] if number < len(names) else str(number))}</li>" for number in chosen)
    left = f", {len(chosen)} of its {len(present)} classes" if len(chosen) < len(present) else ""
    caption = f"{escape(str(directory))}: {count:,} images{left}; the first {width} of each class, not selected."
    uri = png_uri(grid(rows))
    return (
        f'<figure><div class="classes"><ol>{labels}</ol><img src="{uri}" alt="samples by class" '
        f'style="max-width:{96 * width}px"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _pictures(directory: Path, form: str, indices: Sequence[int]) -> dict[int, Any]:
    """uint8 [H, W] or [H, W, 3] each, made smaller where they are large."""
    from PIL import Image

    found: dict[int, Image.Image] = {}
    if form == "npz":
        start = 0
        for batch in NpzImages(directory / "samples.npz").batches(250):  # mapped: 50,000 images need not fit
            images = channels_last(batch).numpy()
            found |= {i: Image.fromarray(images[i - start]) for i in indices if start <= i < start + len(images)}
            start += len(images)
            if start > max(indices):
                break
    else:
        found = {i: Image.open(directory / "images" / f"{i:06}.png") for i in indices}
    side = max(max(image.size) for image in found.values())
    if side > LARGEST:
        scale = LARGEST / side
        found = {
            i: image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
            for i, image in found.items()
        }
    return {i: np.asarray(image) for i, image in found.items()}
