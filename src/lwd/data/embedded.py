"""The embedded images: the 10,000-image part of Fashion-MNIST (Xiao et al. 2017, MIT licence, Zalando SE).

8,000 images train, 2,000 are held out, 800 and 200 of every class. They are padded from 28 to 32 pixels with the
black of their background, so that they divide into patches.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lwd.data.dataset import LatentDataset
from lwd.data.writer import ShardWriter
from lwd.encoders.efficientnet import EfficientNetFeatures
from lwd.encoders.pca import PCA, PCAFit
from lwd.encoders.pixels import PixelPatches
from lwd.latents import Group, LatentSpec
from lwd.randomness import stream

CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
HELD_OUT_PER_CLASS = 200
PATCH = 8
SEMANTIC_BLOCK = 10
SEMANTIC_CHANNELS = 16

EMBEDDED_SPEC = LatentSpec([Group("texture", PATCH**2, 1.0), Group("semantic", SEMANTIC_CHANNELS, 4.0)])
"""8x8 pixel patches on a 4x4 grid, and 16 principal components of a pretrained network's features. As in the paper,
w_sem balances the channels of the two groups under the global mean (64 = 4 x 16)."""

FULL_SET_PLACES = (Path("/usr/share/datasets/fashion-mnist"),)
"""Where Debian's package dataset-fashion-mnist puts the full set."""


class LabelledImages(NamedTuple):
    """uint8 [N, 32, 32], int64 [N], and the classes' names."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


@lru_cache(maxsize=3)
def load_embedded_images(part: Literal["all", "train", "heldout"] = "all") -> LabelledImages:
    """The embedded images, or the training or held-out part of them."""
    images, labels = _read_pair(Path(__file__).parent / "fashion_mnist", "t10k")
    if part != "all":
        # Shuffled within each class, then the first 200 of it are held out.
        order = torch.randperm(len(labels), generator=stream(0, "fashion-mnist split"))
        rank = torch.zeros(len(labels), dtype=torch.long)
        for label in range(len(CLASS_NAMES)):
            members = order[labels[order] == label]
            rank[members] = torch.arange(len(members))
        held_out = rank[order] < HELD_OUT_PER_CLASS
        chosen = order[held_out if part == "heldout" else ~held_out]
        images, labels = images[chosen], labels[chosen]
    return LabelledImages(images, labels, CLASS_NAMES)


def load_full_fashion_mnist(directory: Path | str | None = None) -> LabelledImages:
    """The 60,000 training images of the full set.

    Args:
        directory: holds ``train-images-idx3-ubyte.gz`` and ``train-labels-idx1-ubyte.gz``; by default where Debian's
            package ``dataset-fashion-mnist`` puts them.

    Raises:
        FileNotFoundError: says how to get them.
    """
    places = (Path(directory),) if directory is not None else FULL_SET_PLACES
    for place in places:
        if all((place / f"train-{kind}-ubyte.gz").exists() for kind in ("images-idx3", "labels-idx1")):
            return LabelledImages(*_read_pair(place, "train"), CLASS_NAMES)
    raise FileNotFoundError(
        f"the full Fashion-MNIST is not in {', '.join(map(str, places))}: install Debian's package "
        "dataset-fashion-mnist, or download train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz from "
        "https://github.com/zalandoresearch/fashion-mnist and pass their directory"
    )


def encode_embedded(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode the embedded images into `directory`/train and `directory`/heldout; what is complete is kept.

    Texture is pixels; semantic is the PCA of features after block 10 of EfficientNet-Lite0 at 64 px. The PCA and the
    normalisation statistics are those of the training part.

    There are no mirrored twins: nearly all shoes of Fashion-MNIST point left, so mirroring would change the data.

    Args:
        limit: encode only the first so many images of each part.
        progress: called with (done, total) images.

    Raises:
        ImportError: the network's package is missing.
        ValueError: what is there is damaged, or of another number of images.
    """
    directory = Path(directory)
    sets = {}
    for name in ("train", "heldout"):
        part = load_embedded_images(name)
        sets[name] = part.images[:limit], part.labels[:limit]
    missing = [name for name, (images, _) in sets.items() if not _finished(directory / name, len(images))]
    if not missing:
        return directory
    total = sum(len(images) for images, _ in sets.values())
    done = total - sum(len(sets[name][0]) for name in missing)
    network = EfficientNetFeatures.load(device)
    maps = {}
    for name in missing:
        images = sets[name][0]

        def report(count: int, _: int, already: int = done) -> None:
            if progress is not None:
                progress(already + count, total)

        maps[name] = network.feature_maps(images, SEMANTIC_BLOCK, progress=report)
        done += len(images)
    pca_path = directory / "pca.safetensors"
    if len(missing) < len(sets):
        pca = PCA.load(pca_path)  # the one that encoded the finished part
    else:
        pca = PCAFit(maps["train"].shape[1]).update(maps["train"]).components(SEMANTIC_CHANNELS)
        pca.save(pca_path)
    pixels = PixelPatches(PATCH)
    encoders = {
        "texture": pixels.describe(),
        "semantic": {
            "encoder": "pca",
            "features": f"EfficientNet-Lite0 at 64 px, after block {SEMANTIC_BLOCK}",
            "file": "../pca.safetensors",
            "explained": float(pca.explained.sum()),
        },
    }
    for name in missing:
        images, labels = sets[name]
        with ShardWriter(
            directory / name,
            EMBEDDED_SPEC,
            CLASS_NAMES,
            encoders=encoders,
            normalization=None if name == "train" else LatentDataset.open(directory / "train").normalization,
            shard_size=2000,
            provenance={"images": "Fashion-MNIST, t10k part", "part": name},
        ) as writer:
            writer.add(torch.cat([pixels.encode(images), pca.transform(maps[name])], dim=1), labels)
    return directory


def _finished(directory: Path, count: int) -> bool:
    """Whether `directory` holds a finished set of `count` images; ValueError when it is damaged or of another count."""
    if not (directory / "manifest.json").exists():
        return False
    found = len(LatentDataset.open(directory))
    if found != count:
        raise ValueError(
            f"{directory} holds latents of {found} images, not of {count}; delete it or choose another directory"
        )
    return True


def _read_pair(directory: Path, prefix: str) -> tuple[Tensor, Tensor]:
    images = read_idx(directory / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(directory / f"{prefix}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise ValueError(f"{directory} holds {len(images)} images but {len(labels)} labels")
    return F.pad(torch.from_numpy(images), (2, 2, 2, 2)), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a gzipped file of the MNIST family; ValueError naming the file when it is damaged."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    dimensions = content[3]
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"{path} is truncated within its header")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    data = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    if data.size != math.prod(shape):
        raise ValueError(f"{path} is truncated or too long: {data.size} bytes for shape {shape}")
    return data.reshape(shape).copy()
