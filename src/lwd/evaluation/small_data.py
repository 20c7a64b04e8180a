"""Scores for small images, where Inception has nothing to say: two independent networks, each with its own bias.

`fd_embedded` is a Frechet distance in the features of the embedded pretrained network. That network also makes the
semantic latents, so it favours whoever generates those well. `fd_judge`, precision, recall and accuracy come from
a judge that never saw a latent. Neither distance is an FID.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwd.evaluation.distances import frechet_distance
from lwd.evaluation.images import SAMPLES, open_images
from lwd.evaluation.judge import Judge, check_images, check_labels
from lwd.evaluation.neighbours import precision_recall
from lwd.files import read_json, sha256_of
from lwd.machine import describe_machine, describe_versions

METRICS = ("fd_embedded", "fd_judge", "precision", "recall", "accuracy")


def evaluate_images(
    generated: Tensor,
    labels: Tensor,
    *,
    judge: Judge,
    embedded: Callable[[Tensor], Tensor],
    reference: Mapping[str, Tensor],
    k: int = 3,
) -> dict[str, float]:
    """Scores of generated images against reference features; lower is better for the two distances.

    Args:
        generated: uint8, grey [N, S, S] or colour [N, 3, S, S], as the judge was trained on.
        labels: int64 [N], the classes that were asked for.
        judge: trained on real images, see `train_judge`.
        embedded: the same images to features [N, D] of the embedded pretrained network.
        reference: features [M, D] of real images under "embedded" and "judge", see `reference_features`.
        k: neighbour of precision and recall.

    Returns:
        fd_embedded, fd_judge, precision, recall (both in the judge's features), accuracy (share of images that the
        judge assigns to the class asked for), k, images (N), reference_images (M).

    Raises:
        ValueError: wrong shapes, dtypes or labels, missing reference, NaN in features, too few images.
    """
    check_images(generated)
    check_labels(labels, len(generated), judge.classes)
    missing = {"embedded", "judge"} - set(reference)
    if missing:
        raise ValueError(f"reference features lack {sorted(missing)}; make them with reference_features")
    if len(reference["embedded"]) != len(reference["judge"]):
        raise ValueError(
            f"reference features are of {len(reference['embedded'])} (embedded) and {len(reference['judge'])} (judge) "
            "images; both networks must see the same ones"
        )
    judged = judge.features(generated)
    near = precision_recall(reference["judge"], judged, k)
    correct = judge.classify(judged).argmax(dim=1).cpu() == labels.cpu()
    return {
        "fd_embedded": frechet_distance(reference["embedded"], embedded(generated)),
        "fd_judge": frechet_distance(reference["judge"], judged),
        "precision": near.precision,
        "recall": near.recall,
        "accuracy": float(correct.double().mean()),
        "k": float(k),
        "images": float(len(generated)),
        "reference_images": float(len(reference["judge"])),
    }


def reference_features(images: Tensor, *, judge: Judge, embedded: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Both networks' features of held-out real images, uint8 [M, S, S] or [M, 3, S, S]."""
    check_images(images)
    return {"embedded": embedded(images), "judge": judge.features(images)}


def evaluate_files(
    samples: Path, reference: Path, judge: Path, *, k: int = 3, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """`evaluate_images` from files: scores under "metrics", what was compared under "generated" and "settings".

    Args:
        samples: npz with `images` uint8 [N, S, S] or [N, S, S, 3] and `labels` [N], the classes asked for (or `arr_0`
            and `arr_1`, ADM's names); or a directory that `lwd sample` wrote.
        reference: of the same form, real images.
        judge: file of `Judge.save`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds something else, or as `evaluate_images`.
        ImportError: the embedded network is not installed (extra `demo`).
    """
    images, labels = _read_labelled(Path(samples))
    real, _ = _read_labelled(Path(reference))
    loaded = Judge.load(judge, device)

    from lwd.encoders.efficientnet import EfficientNetFeatures

    embedded = EfficientNetFeatures.load(device).pooled
    scores = evaluate_images(
        images,
        labels,
        judge=loaded,
        embedded=embedded,
        reference=reference_features(real, judge=loaded, embedded=embedded),
        k=k,
    )
    judged_by = {"path": str(judge), "sha256": sha256_of(judge)}
    reference_of = _described(Path(reference), real)
    metrics = {name: scores[name] for name in METRICS}
    return scored(metrics, _described(Path(samples), images), reference_of, judged_by, k, device)


def scored(
    metrics: Mapping[str, float],
    generated: Mapping[str, Any],
    reference: Mapping[str, Any],
    judge: Mapping[str, Any],
    k: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """One entry of a file of evaluations: scores, what was compared by what, machine and versions."""
    settings = {"reference": dict(reference), "judge": dict(judge), "embedded": "efficientnet-lite0, pooled", "k": k}
    machine = describe_machine(torch.device(device))
    return {
        "metrics": dict(metrics), "generated": dict(generated), "settings": settings,
        "machine": machine, "versions": describe_versions(),
    }  # fmt: skip


def _described(path: Path, images: Tensor) -> dict[str, Any]:
    """Where a file or a set of samples is, its hash, and how it was generated where that is known."""
    found = open_images(path)
    shape = list(images.shape[1:]) if images.ndim == 4 else [1, *images.shape[1:]]
    described = {"name": str(path), "sha256": found.sha256(), "count": len(images), "shape": shape}
    origin = getattr(found, "origin", None)
    return described if origin is None else described | {"origin": origin}


def _read_labelled(path: Path) -> tuple[Tensor, Tensor]:
    """Images and int64 labels of an npz file or a set of samples; errors name it."""
    if path.is_dir():
        return _read_samples(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of images at {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = ("arr_0", "arr_1") if "arr_0" in arrays else ("images", "labels")
            images, labels = torch.from_numpy(arrays[keys[0]]), torch.from_numpy(arrays[keys[1]]).to(torch.int64)
        images = images.movedim(-1, 1) if images.ndim == 4 else images
        check_images(images)
        check_labels(labels, len(images))
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not an npz of `images` uint8 [N, S, S] or [N, S, S, 3] and `labels` [N] (or `arr_0` and "
            f"`arr_1`), or is damaged ({error})"
        ) from error
    return images, labels


def _read_samples(directory: Path) -> tuple[Tensor, Tensor]:
    found = open_images(directory)
    if not (directory / SAMPLES).is_file():
        raise ValueError(f"{directory} is not a set that `lwd sample` wrote, so the classes of its images are unknown")
    images = torch.cat(list(found.batches(1024)))
    images = images[:, 0] if found.shape[0] == 1 else images
    classes = torch.as_tensor(read_json(directory / SAMPLES)["classes"], dtype=torch.int64)
    labels = classes[torch.arange(len(images)) % len(classes)]
    try:
        check_images(images)
        check_labels(labels, len(images))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return images, labels
