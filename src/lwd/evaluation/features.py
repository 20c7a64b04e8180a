"""Features of a set of images by any network: extracted in batches, kept on disk under their content's hash."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwd.evaluation.images import ImageSet, open_images
from lwd.evaluation.statistics import FeatureStatistics
from lwd.files import write_atomically

_FORMAT = "lwd.features.1"
_ROWS = 1024  # per update of the covariances: a product of matrices, not of slivers
_STATISTICS = ("pool", "spatial")

Progress = Callable[[int, int], None]


class FeatureExtractor(Protocol):
    """A network whose features are compared.

    Attributes:
        name: a word for names of metrics and files, such as "dinov2".
        sha256: of its weights.
        settings: what else the features depend on (resize, precision), readable as JSON.
    """

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def settings(self) -> dict[str, object]: ...

    def features(self, images: Tensor) -> Mapping[str, Tensor | np.ndarray]:
        """Of uint8 images [N, C, H, W]: "pool" [N, D], and optionally "spatial" [N, S] and "logits" [N, classes]."""


@dataclass(frozen=True)
class FunctionExtractor:
    """Any function of uint8 images [N, C, H, W] to features [N, D], or to a dict as `FeatureExtractor` has it."""

    name: str
    sha256: str
    function: Callable[[Tensor], Tensor | Mapping[str, Tensor | np.ndarray]]
    settings: dict[str, object] = field(default_factory=dict)

    def features(self, images: Tensor) -> Mapping[str, Tensor | np.ndarray]:
        result = self.function(images)
        return result if isinstance(result, Mapping) else {"pool": result}


@dataclass(frozen=True)
class ImageFeatures:
    """What the scores of a set of images need, in the images' order.

    Attributes:
        extractor: name, sha256 and settings of the network.
        images: name, sha256 (None: not known), count and shape of the images; their origin, where known.
        pool: float32 [N, D].
        logits: float32 [N, classes], if the network has them.
        statistics: of "pool", and of "spatial" if the network has it.
    """

    extractor: dict[str, Any]
    images: dict[str, Any]
    pool: Tensor
    logits: Tensor | None
    statistics: dict[str, FeatureStatistics]

    def __len__(self) -> int:
        return len(self.pool)

    def save(self, path: str | Path) -> Path:
        """Write everything as one safetensors file with a hash of its contents."""
        tensors = {"pool": self.pool.contiguous()}
        if self.logits is not None:
            tensors["logits"] = self.logits.contiguous()
        for name, statistics in self.statistics.items():
            tensors[f"{name}.mean"], tensors[f"{name}.cov"] = statistics.mean.cpu(), statistics.cov.cpu().contiguous()
        described = json.dumps({"extractor": self.extractor, "images": self.images})
        metadata = {"format": _FORMAT, "described": described, "sha256": _digest(described, tensors)}
        return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> ImageFeatures:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged (its hash is compared) or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no features of images at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata["sha256"] != _digest(metadata["described"], tensors):
                raise ValueError("its contents do not have the hash they were written with")
            described, pool = json.loads(metadata["described"]), tensors["pool"]
            statistics = {
                name: FeatureStatistics(tensors[f"{name}.mean"], tensors[f"{name}.cov"], len(pool))
                for name in _STATISTICS
                if f"{name}.mean" in tensors
            }
            return cls(described["extractor"], described["images"], pool, tensors.get("logits"), statistics)
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{path} does not hold features of images or is damaged ({error}); make it again"
            ) from error


def extract_features(
    images: str | Path | Tensor | np.ndarray | ImageSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> ImageFeatures:
    """Features and statistics of a set of images, in one pass with a batch of images in memory at a time.

    Args:
        images: see `open_images`.
        batch_size: images read and passed to `extractor` at once.
        cache: directory of features under a hash of (images, weights, settings). What is there is not computed
            again; a damaged file is replaced, with a warning. None keeps nothing.
        progress: called as progress(images done, images) after each batch.

    Raises:
        ValueError: bad images (see `open_images`), fewer than 2, features that are NaN or of a wrong shape.
    """
    source = open_images(images)
    if len(source) < 2:
        raise ValueError(f"{source.name} has {len(source)} image; a covariance needs at least 2")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    described = {"name": extractor.name, "sha256": extractor.sha256, "settings": dict(extractor.settings)}
    about = {
        "name": source.name,
        "sha256": source.sha256(),
        "count": len(source),
        "shape": list(source.shape),
    }
    if (origin := getattr(source, "origin", None)) is not None:
        about["origin"] = origin
    path = None
    if cache is not None and about["sha256"] is not None:
        key = json.dumps([_FORMAT, about["sha256"], about["count"], about["shape"], described], sort_keys=True)
        path = Path(cache) / f"{extractor.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        found = _cached(path)
        if found is not None:
            # The same images may have been cached from another place.
            return ImageFeatures(found.extractor, about, found.pool, found.logits, found.statistics)
    result = ImageFeatures(described, about, *_extract(source, extractor, batch_size, progress))
    if path is not None:
        result.save(path)
    return result


def _cached(path: Path) -> ImageFeatures | None:
    try:
        return ImageFeatures.load(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"cached features are not used: {error}", stacklevel=3)
        return None


def _extract(
    source: ImageSet, extractor: FeatureExtractor, batch_size: int, progress: Progress | None
) -> tuple[Tensor, Tensor | None, dict[str, FeatureStatistics]]:
    total, done = len(source), 0
    kept: dict[str, Tensor] = {}  # pool and logits of all images
    waiting: list[Tensor] = []  # spatial features not yet in their statistics, which are all that is kept of them
    spatial: FeatureStatistics | None = None
    for batch in source.batches(batch_size):
        result = {key: torch.as_tensor(value).detach() for key, value in extractor.features(batch).items()}
        _check(result, batch, done, source.name, extractor.name)
        for key in ("pool", "logits"):
            if key in result:
                if key not in kept:
                    kept[key] = torch.empty(total, result[key].shape[1])
                kept[key][done : done + len(batch)] = result[key].to("cpu", torch.float32)
        if "spatial" in result:
            waiting.append(result["spatial"])
            if spatial is None:
                spatial = FeatureStatistics.empty(result["spatial"].shape[1], result["spatial"].device)
        done += len(batch)
        if spatial is not None and (len(waiting) * batch_size >= _ROWS or done == total):
            spatial.update(torch.cat(waiting))
            waiting.clear()
        if progress is not None:
            progress(done, total)
    if done != total:
        raise ValueError(f"{source.name} announced {total} images but gave {done}")
    pool = FeatureStatistics.empty(kept["pool"].shape[1])
    for rows in kept["pool"].split(4 * _ROWS):
        pool.update(rows)
    return kept["pool"], kept.get("logits"), {"pool": pool} | ({} if spatial is None else {"spatial": spatial})


def _check(result: Mapping[str, Tensor], batch: Tensor, start: int, images: str, network: str) -> None:
    if "pool" not in result:
        raise ValueError(f"the network {network} gives no 'pool' features, only {sorted(result)}")
    for key, value in result.items():
        if value.ndim != 2 or len(value) != len(batch):
            raise ValueError(f"{network}: {key!r} must have shape [{len(batch)}, features], got {list(value.shape)}")
        bad = ~torch.isfinite(value).all(dim=1)
        if bad.any():
            first = start + int(bad.nonzero()[0])
            raise ValueError(
                f"{key!r} features by {network} are NaN or infinite for {int(bad.sum())} of images {start} to "
                f"{start + len(batch) - 1} of {images}, first for image {first}"
            )


def _digest(described: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(described.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {list(tensors[key].shape)} {tensors[key].dtype}".encode())
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()
