"""Pictures as PNG data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np

from lwd.report.read import Array

GAP = 2
"""Pixels between the pictures of a grid; transparent, so that the page shows through."""


def png_uri(pixels: Array) -> str:
    """A data URI of uint8 [H, W] (grey), [H, W, 2] (grey, alpha), [H, W, 3] or [H, W, 4]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grid(rows: list[Array]) -> Array:
    """Pictures uint8 [N, H, W] or [N, H, W, 3] per row, all of one shape -> one picture with an alpha channel."""
    pictures = np.stack(rows)
    if pictures.ndim == 4:
        pictures = pictures[..., None]
    R, N, H, W, colours = pictures.shape
    sheet = np.zeros((R, H + GAP, N, W + GAP, colours + 1), dtype=np.uint8)
    sheet[:, :H, :, :W, :colours] = pictures.transpose(0, 2, 1, 3, 4)
    sheet[:, :H, :, :W, colours] = 255
    return sheet.reshape(R * (H + GAP), N * (W + GAP), colours + 1)[:-GAP, :-GAP]


def by_class(images: Array, labels: Array, classes: list[int], count: int) -> list[Array]:
    """The first `count` pictures of every class, in file order, so that equal places mean equal seeds across arms."""
    return [images[labels == label][:count] for label in classes]
