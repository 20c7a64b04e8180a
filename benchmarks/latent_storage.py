"""What each way of storing latents and REPA features costs in space, and what error it makes.

    python benchmarks/latent_storage.py --json latent_storage.json

Space is that of ImageNet-1k (1,281,167 images, each with its mirror image) at the paper's shapes. Errors are those of
real data: the pixel latents and EfficientNet-Lite0 features (block 10) of 2,000 embedded images. They carry over, for
they are relative: rounding is to a share of each value, or, in 8 bits, of the largest value of its token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lwd.data.embedded import load_embedded_images
from lwd.data.quantize import dequantize, quantize
from lwd.encoders import PCAFit, PixelPatches
from lwd.encoders.efficientnet import EfficientNetMaps
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions

IMAGES = 1_281_167
VIEWS = 2
SHAPES = {"texture": (32, 16, 16), "semantic": (16, 16, 16), "features": (768, 16, 16)}
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    images = load_embedded_images("heldout").images
    maps = EfficientNetMaps().feature_maps(images)
    arrays = {
        "texture": PixelPatches(8).encode(images),
        "semantic": PCAFit(maps.shape[1]).update(maps).components(16).transform(maps),
        "features": maps,
    }
    rows: list[dict[str, Any]] = []
    for name, values in arrays.items():
        for dtype in ("float32", "float16", "bfloat16", "int8") if name == "features" else tuple(BYTES)[:3]:
            rows.append({"array": name, "dtype": dtype, "gigabytes": size(name, dtype), **errors(values, dtype)})
    print(f"{'':<10}{'':<10}{'ImageNet':>12}{'rms error':>12}{'1 - cosine of a token':>24}")
    for row in rows:
        named = f"{row['array']:<10}{row['dtype']:<10}{row['gigabytes']:>9.0f} GB"
        print(f"{named}{row['rms']:>12.1e}{row['one_minus_cosine']:>24.1e}")
    if chosen.json is not None:
        machine = describe_machine(torch.device("cpu"))
        write_json(chosen.json, {"rows": rows, "machine": machine, "versions": describe_versions()})


def size(name: str, dtype: str) -> float:
    """Gigabytes of ImageNet."""
    channels, height, width = SHAPES[name]
    scales = 4 * height * width if dtype == "int8" else 0
    return IMAGES * VIEWS * (channels * height * width * BYTES[dtype] + scales) / 1e9


def errors(values: Tensor, dtype: str) -> dict[str, float]:
    """Root mean square error over root mean square, and the mean of 1 - cosine between a token and what is stored."""
    stored = dequantize(*quantize(values)) if dtype == "int8" else values.to(getattr(torch, dtype)).float()
    exact, found = values.double(), stored.double()
    return {
        "rms": float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()),
        "one_minus_cosine": float((1 - F.cosine_similarity(found, exact, dim=1)).clamp(min=0).mean()),
    }


if __name__ == "__main__":
    main()
