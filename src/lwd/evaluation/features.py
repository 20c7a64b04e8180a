"""Features of a set of images by any network: extracted in batches, kept on disk under their content's hash."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
        device: optional; where the network is. For a GPU batches are read into pinned memory.
    """

    name: str
    sha256: str

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
        images: name, sha256 (None: not known), count, shape and (where known) origin of the images.
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
    about: dict[str, Any] = {
        "name": source.name,
        "sha256": source.sha256(),
        "count": len(source),
        "shape": list(source.shape),
    }
    origin = getattr(source, "origin", None)
    if origin is not None:
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
    total = len(source)
    rows = _Rows(total, source.name, extractor.name)
    device = getattr(extractor, "device", None)
    before: _Computed | None = None
    for batch in _read_ahead(source.batches(batch_size), pin=device is not None and device.type == "cuda"):
        computed = rows.start(extractor.features(batch), len(batch))
        if before is not None:  # a GPU is at work on this batch while the one before is put away
            rows.take(before)
            if progress is not None:
                progress(rows.done, total)
        before = computed
    if before is not None:
        rows.take(before)
        if progress is not None:
            progress(rows.done, total)
    if rows.done != total:
        raise ValueError(f"{source.name} announced {total} images but gave {rows.done}")
    return rows.kept["pool"], rows.kept.get("logits"), rows.statistics()


def _read_ahead(batches: Iterator[Tensor], *, pin: bool) -> Iterator[Tensor]:
    """The same batches, each read by a thread (and put into pinned memory) while the one before is in use."""

    def read() -> Tensor | None:
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None and batch.device.type == "cpu" else batch

    with ThreadPoolExecutor(1, "lwd-images") as reader:
        ahead = reader.submit(read)
        while (batch := ahead.result()) is not None:
            ahead = reader.submit(read)
            yield batch


@dataclass(frozen=True)
class _Computed:
    """Features of a batch on their way to the CPU, and for each of their images whether they are finite."""

    values: dict[str, Tensor]
    finite: dict[str, Tensor]
    count: int
    arrived: torch.cuda.Event | None


class _Rows:
    """Features of all images, batch after batch, and their statistics."""

    def __init__(self, total: int, images: str, network: str) -> None:
        self.total, self.images, self.network = total, images, network
        self.done = 0
        self.kept: dict[str, Tensor] = {}  # pool and logits of all images
        self._waiting: list[Tensor] = []  # spatial features not yet in their statistics, all that is kept of them
        self._spatial: FeatureStatistics | None = None

    def start(self, result: Mapping[str, Tensor | np.ndarray], count: int) -> _Computed:
        """Check shapes, and send a batch's features to the CPU without waiting for a GPU."""
        values, finite = {}, {}
        tensors = {key: torch.as_tensor(value).detach() for key, value in result.items()}
        if "pool" not in tensors:
            raise ValueError(f"the network {self.network} gives no 'pool' features, only {sorted(tensors)}")
        arrived = None
        for key, value in tensors.items():
            if value.ndim != 2 or len(value) != count:
                found = f"got {list(value.shape)}"
                raise ValueError(f"{self.network}: {key!r} must have shape [{count}, features], {found}")
            finite[key] = torch.isfinite(value).all(dim=1).to("cpu", non_blocking=True)
            values[key] = value if key == "spatial" else value.float().to("cpu", non_blocking=True)
            if value.is_cuda:
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(value.device))
        return _Computed(values, finite, count, arrived)

    def take(self, batch: _Computed) -> None:
        """Put away what `start` gave; ValueError naming the first image with features that are not finite."""
        if batch.arrived is not None:
            batch.arrived.synchronize()
        start, end = self.done, self.done + batch.count
        for key, finite in batch.finite.items():
            if not finite.all():
                first = start + int((~finite).nonzero()[0])
                raise ValueError(
                    f"{key!r} features by {self.network} are NaN or infinite for {int((~finite).sum())} of images "
                    f"{start} to {end - 1} of {self.images}, first for image {first}"
                )
        for key in ("pool", "logits"):
            if key in batch.values:
                if key not in self.kept:
                    self.kept[key] = torch.empty(self.total, batch.values[key].shape[1])
                self.kept[key][start:end] = batch.values[key]
        if "spatial" in batch.values:
            self._waiting.append(batch.values["spatial"])
            if sum(map(len, self._waiting)) >= _ROWS:
                self._take_spatial()
        self.done = end

    def _take_spatial(self) -> None:
        features = torch.cat(self._waiting)
        self._waiting.clear()
        if self._spatial is None:
            self._spatial = FeatureStatistics.empty(features.shape[1], features.device)
        self._spatial.update(features)

    def statistics(self) -> dict[str, FeatureStatistics]:
        pool = FeatureStatistics.empty(self.kept["pool"].shape[1])
        for rows in self.kept["pool"].split(4 * _ROWS):
            pool.update(rows)
        if self._waiting:
            self._take_spatial()
        return {"pool": pool} | ({} if self._spatial is None else {"spatial": self._spatial})


def _digest(described: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(described.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {list(tensors[key].shape)} {tensors[key].dtype}".encode())
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()
