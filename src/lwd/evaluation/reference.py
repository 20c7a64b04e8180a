"""What generated images are compared with: ADM's reference files, a set of images, or stored statistics."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lwd.evaluation.features import FeatureExtractor, ImageFeatures, Progress, extract_features
from lwd.evaluation.images import NpzImages
from lwd.evaluation.inception import NAME as INCEPTION
from lwd.evaluation.statistics import FeatureStatistics
from lwd.files import sha256_of
from lwd.randomness import stream

ADM_KIND = "ADM reference"
_ADM_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """A reference, ready to be compared with.

    Attributes:
        name: where it is from.
        kind: "ADM reference", "images", "features" or "statistics".
        sha256: of the file, or of the images; None if unknown.
        count: images behind the statistics; None if the file does not say (ADM's do not).
        shape: [channels, height, width] of the images, if there are any.
        statistics: of "pool", and of "spatial" features where known.
        pool: float32 [N, D], features of the images for precision and recall, if there are any.
        extractor: name, sha256 and settings of the network; None if the file does not say.
    """

    name: str
    kind: str
    sha256: str | None
    count: int | None
    shape: list[int] | None
    statistics: dict[str, FeatureStatistics]
    pool: Tensor | None
    extractor: dict[str, Any] | None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "statistics_count": self.count,
            "images": None if self.pool is None else len(self.pool),
            "shape": self.shape,
        }

    def choose(self, count: int, choice: Literal["first", "random"], seed: int) -> Tensor:
        """Features [min(count, N), D] of the first images, or of random ones in their order."""
        assert self.pool is not None
        if choice == "first" or count >= len(self.pool):
            return self.pool[:count]
        chosen = torch.randperm(len(self.pool), generator=stream(seed, "reference-images"))[:count]
        return self.pool[chosen.sort().values]

    def require_comparable(self, features: ImageFeatures) -> None:
        """ValueError unless images have the same size and colours and features come from the same network."""
        if self.shape is not None and self.shape[1:] != features.images["shape"][1:]:
            (h, w), (gh, gw) = self.shape[1:], features.images["shape"][1:]
            raise ValueError(
                f"the reference {self.name} has images of {w}x{h} pixels, {features.images['name']} of {gw}x{gh}; "
                "use the reference of that resolution"
            )
        if self.shape is not None and self.shape[0] != features.images["shape"][0]:
            grey, colour = self.name, features.images["name"]
            if self.shape[0] != 1:
                grey, colour = colour, grey
            raise ValueError(f"{grey} is grey, {colour} in colour; compare sets of the same kind")
        ours, theirs = self.extractor, features.extractor
        if self.kind == ADM_KIND and theirs["name"] != INCEPTION:
            raise ValueError(f"{self.name} holds Inception's statistics, which say nothing about {theirs['name']}")
        if ours is not None and (ours["name"], ours["sha256"]) != (theirs["name"], theirs["sha256"]):
            raise ValueError(
                f"the reference {self.name} has features of {ours['name']} ({ours['sha256'][:8]}...), the generated "
                f"images of {theirs['name']} ({theirs['sha256'][:8]}...); both must come from the same network"
            )
        for key, statistics in self.statistics.items():
            if key in features.statistics and features.statistics[key].width != statistics.width:
                raise ValueError(
                    f"the reference {self.name} has statistics of {statistics.width} {key} features, "
                    f"{theirs['name']} gives {features.statistics[key].width}: they are of another network"
                )


def load_reference(
    source: Any,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Reference:
    """A reference from any of the forms that people keep them in.

    Args:
        source: an npz of ADM (`arr_0` and Inception's `mu, sigma, mu_s, sigma_s`; any of the two parts may be
            missing), a set of images (see `open_images`), `FeatureStatistics` or `ImageFeatures` or a safetensors
            file of either, or a `Reference`. ADM's statistics count for Inception alone: for other networks they are
            computed from `arr_0`.
        extractor: makes the features of images.
        cache, batch_size, progress: as in `extract_features`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file of another kind, or damaged; as `open_images` and `extract_features`.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, FeatureStatistics):
        return Reference("statistics", "statistics", None, source.count, None, {"pool": source}, None, None)
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None and path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"no reference at {path}")
        if not _is_features(path):
            statistics = FeatureStatistics.load(path)
            digest = sha256_of(path)
            return Reference(str(path), "statistics", digest, statistics.count, None, {"pool": statistics}, None, None)
        source = ImageFeatures.load(path)
    if isinstance(source, ImageFeatures):
        return _of_features(source, "features")
    stored: dict[str, FeatureStatistics] = {}
    if path is not None and path.suffix == ".npz" and path.is_file():
        stored = _adm_statistics(path)
        if stored and not _has_images(path):
            if extractor.name != INCEPTION:
                raise ValueError(f"{path} holds Inception's statistics alone, which say nothing about {extractor.name}")
            return Reference(str(path), ADM_KIND, sha256_of(path), None, None, stored, None, None)
    features = extract_features(source, extractor, batch_size=batch_size, cache=cache, progress=progress)
    if stored and extractor.name == INCEPTION:
        shape = features.images["shape"]
        digest = sha256_of(Path(source))
        return Reference(str(path), ADM_KIND, digest, None, shape, stored, features.pool, features.extractor)
    return _of_features(features, "images")


def _of_features(features: ImageFeatures, kind: str) -> Reference:
    about = features.images
    return Reference(
        about["name"],
        kind,
        about["sha256"],
        len(features),
        about["shape"],
        features.statistics,
        features.pool,
        features.extractor,
    )


def _is_features(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file or is damaged ({error}); make it again") from error
    if any(key.startswith("latents") for key in keys):
        raise ValueError(f"{path} holds latents; a reference is made of images, statistics or features of them")
    return "pool" in keys


def _has_images(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return not {"arr_0.npy", "images.npy"}.isdisjoint(archive.namelist())


def _adm_statistics(path: Path) -> dict[str, FeatureStatistics]:
    """Statistics in an npz, none if it has only images; ValueError if it has neither."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {}
            for key, (mean, cov) in _ADM_KEYS.items():
                if mean not in arrays and cov not in arrays:
                    continue
                if arrays[mean].ndim != 1:
                    raise ValueError(f"{mean} has shape {list(arrays[mean].shape)}, not [features]")
                # The file does not say how many images these are of. Two is the least count for which a covariance
                # exists; the count matters only to merging, which a reference never is.
                found[key] = FeatureStatistics(arrays[mean], arrays[cov], count=2)
            names = arrays.files
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a reference npz or is damaged: {error}") from error
    if not found and not _has_images(path):
        raise ValueError(
            f"{path} is no reference: it holds {', '.join(names) or 'nothing'}; a reference npz has images `arr_0`, "
            "statistics `mu`, `sigma` (and `mu_s`, `sigma_s`), or both"
        )
    if found and "pool" not in found:
        raise ValueError(f"{path} has statistics mu_s and sigma_s for sFID, but no mu and sigma for FID")
    if _has_images(path):
        NpzImages(path)  # a wrong array is found before any feature is computed
    return found
