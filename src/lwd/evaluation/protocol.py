"""ADM's evaluation protocol (Dhariwal and Nichol 2021): FID, sFID, inception score, precision and recall.

The same code scores with any other network; the names of the metrics then carry the network's name.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lwd.evaluation.distances import frechet_distance, inception_score
from lwd.evaluation.features import FeatureExtractor, ImageFeatures, Progress, extract_features
from lwd.evaluation.images import ImageSet
from lwd.evaluation.inception import NAME as INCEPTION
from lwd.evaluation.inception import SHA256_PREFIX
from lwd.evaluation.neighbours import Distances, half_distances_fit, precision_recall
from lwd.evaluation.reference import Reference, load_reference
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions
from lwd.randomness import stream


@dataclass(frozen=True)
class ProtocolSettings:
    """Every knob of the protocol; the defaults are ADM's for ImageNet 256.

    Args:
        images: generated images that are asked for; another number is scored and marked. With Inception so is any
            other than ADM's 50,000.
        reference_images: of the reference, for precision and recall; a larger set is cut to this many.
        reference_choice: which of a larger reference: the first ones, or random ones (by `seed`).
        k: neighbour whose distance is a sample's radius in precision and recall.
        chunk: images per inception score; the mean over chunks is reported.
        shuffle: whether samples are shuffled (by `seed`) before they are cut into chunks. ADM's evaluator does not,
            since ADM's samples come in random order; sorted by class, the score would be far too low.
        seed: of the shuffle and of a random choice.
        distances: arithmetic of precision and recall; "float16" rounds as ADM does.

    Raises:
        ValueError: a number out of range, an unknown choice.
    """

    images: int = 50_000
    reference_images: int = 10_000
    reference_choice: Literal["first", "random"] = "first"
    k: int = 3
    chunk: int = 5000
    shuffle: bool = True
    seed: int = 0
    distances: Distances = "float32"

    def __post_init__(self) -> None:
        if min(self.images, self.reference_images, self.k, self.chunk) < 1:
            raise ValueError(f"images, reference_images, k and chunk must be at least 1, got {self}")
        if self.reference_choice not in ("first", "random"):
            raise ValueError(f"reference_choice must be first or random, got {self.reference_choice!r}")
        if self.distances not in ("float64", "float32", "float16"):
            raise ValueError(f"distances must be float64, float32 or float16, got {self.distances!r}")


ADM = ProtocolSettings()


@dataclass(frozen=True)
class Evaluation:
    """Scores, and everything they depend on.

    Attributes:
        metrics: with Inception "fid", "sfid", "inception_score", "precision", "recall"; with another network "fd_NAME",
            "sfd_NAME", "inception_score_NAME", "precision_NAME", "recall_NAME". Those that the input does not allow are
            absent.
        deviations: sentences; what differs from the protocol. None: the numbers may stand beside published ones. With
            another network than Inception the first says so; the others are about what `settings` asked for.
        settings: the protocol's knobs.
        generated, reference, extractor: names, hashes, counts, shapes; what made the features. `generated` has
            "origin", how the images were generated, where `lwd sample` noted it.
        machine, versions: where.
    """

    metrics: dict[str, float]
    deviations: tuple[str, ...]
    settings: dict[str, Any]
    generated: dict[str, Any]
    reference: dict[str, Any]
    extractor: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `protocol` is "complete" or the list of deviations."""
        result = dataclasses.asdict(self)
        deviations = list(result.pop("deviations"))
        return {"metrics": result.pop("metrics"), "protocol": deviations or "complete", **result}

    def save(self, path: str | Path) -> Path:
        return write_json(path, self.to_dict())


def score_images(
    generated: str | Path | Tensor | np.ndarray | ImageSet | ImageFeatures,
    reference: Any,
    extractor: FeatureExtractor,
    *,
    settings: ProtocolSettings = ADM,
    batch_size: int = 64,
    cache: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Score generated images against a reference. For several sets, load the reference once with `load_reference`.

    Args:
        generated: folder of PNGs, npz with `arr_0`, tensor, array (see `open_images`), or stored features.
        reference: what `load_reference` takes, or its result.
        extractor: Inception (`load_inception`) for the protocol, or any other network.
        cache: directory of features by content, see `extract_features`.
        device: for the distances of precision and recall; the features are made where the extractor is.
        progress: called as progress(images done, images) while features of `generated` are computed.

    Raises:
        ValueError: as `open_images`, `extract_features` and `load_reference`; a reference of another resolution, or
            of another network.
    """
    settled = load_reference(reference, extractor, batch_size=batch_size, cache=cache)
    if isinstance(generated, ImageFeatures):
        features = generated
    else:
        features = extract_features(generated, extractor, batch_size=batch_size, cache=cache, progress=progress)
    settled.require_comparable(features)

    name = str(features.extractor["name"])
    frechet, suffix = (("fid", "sfid"), "") if name == INCEPTION else ((f"fd_{name}", f"sfd_{name}"), f"_{name}")
    # ADM's protocol is Inception's; with another network what is asked for is what the settings say.
    asked = ADM if name == INCEPTION else settings
    metrics: dict[str, float] = {}
    deviations = _deviations(settings, asked, features, settled)
    for metric, key in zip(frechet, ("pool", "spatial"), strict=True):
        if key in features.statistics and key in settled.statistics:
            metrics[metric] = frechet_distance(settled.statistics[key], features.statistics[key])
        elif name == INCEPTION:
            deviations.append(f"no {metric}: the reference has no statistics of {key} features")
    if features.logits is not None:
        metrics[f"inception_score{suffix}"] = _inception_score(features.logits, settings)
    distances = settings.distances
    if settled.pool is None:
        deviations.append("no precision and recall: the reference is statistics alone, without images")
    else:
        near = settled.choose(settings.reference_images, settings.reference_choice, settings.seed)
        if len(near) != asked.reference_images:
            deviations.append(
                f"precision and recall with {len(near)} reference images instead of {asked.reference_images}"
            )
        if min(len(near), len(features)) <= settings.k:
            deviations.append(f"no precision and recall: they need more than k = {settings.k} images in each set")
        else:
            if distances == "float16" and not half_distances_fit(near, features.pool):
                distances = "float32"
                deviations.append("float16 distances would overflow; float32 was used throughout")
            pool = features.pool.to(device)
            shares = precision_recall(near.to(device), pool, settings.k, distances=distances)
            metrics |= {f"precision{suffix}": shares.precision, f"recall{suffix}": shares.recall}
    return Evaluation(
        metrics=metrics,
        deviations=tuple(deviations),
        settings=dataclasses.asdict(settings) | {"distances": distances, "covariance": "unbiased, float64"},
        generated=features.images,
        reference=settled.describe(),
        extractor=features.extractor,
        machine=describe_machine(torch.device(device)),
        versions=describe_versions(),
    )


def _inception_score(logits: Tensor, settings: ProtocolSettings) -> float:
    """Mean over chunks of the (shuffled) samples; the chunks' probabilities are in float64, one chunk at a time."""
    order = torch.arange(len(logits))
    if settings.shuffle:
        order = torch.randperm(len(logits), generator=stream(settings.seed, "inception-score"))
    parts = order.split(settings.chunk)
    scores = [inception_score(logits[part].double().softmax(dim=1), settings.chunk) for part in parts]
    return math.fsum(scores) / len(scores)


def _deviations(
    settings: ProtocolSettings, asked: ProtocolSettings, features: ImageFeatures, reference: Reference
) -> list[str]:
    """What is not as the protocol asks, of all that is known before scoring."""
    name, digest = features.extractor["name"], features.extractor["sha256"]
    found = []
    if name != INCEPTION:
        found.append(f"features of {name} instead of {INCEPTION}")
    elif not digest.startswith(SHA256_PREFIX):
        found.append(f"Inception's weights have SHA-256 {digest[:8]}..., the published ones {SHA256_PREFIX}...")
    if len(features) != asked.images:
        found.append(f"{len(features)} generated images instead of {asked.images}")
    if settings.images not in (len(features), asked.images):
        found.append(f"{len(features)} generated images where {settings.images} were asked for")
    for knob in ("k", "chunk", "shuffle"):
        if getattr(settings, knob) != getattr(asked, knob):
            found.append(f"{knob} = {getattr(settings, knob)} instead of {getattr(asked, knob)}")
    if features.extractor["settings"].get("tf32"):
        found.append("features in TF32 instead of float32")
    if reference.count is not None and reference.count < asked.images:
        found.append(f"reference statistics of {reference.count} images; below {asked.images} they are biased")
    return found
