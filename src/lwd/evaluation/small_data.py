"""Scores for small images, where Inception has nothing to say: two independent networks, each with its own bias.

`fd_embedded` is a Frechet distance in the features of the embedded pretrained network. That network also makes the
semantic latents, so it favours whoever generates those well. `fd_judge`, precision, recall and accuracy come from
a judge that never saw a latent. Neither distance is an FID.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwd.evaluation.distances import frechet_distance
from lwd.evaluation.images import TensorImages, open_images
from lwd.evaluation.judge import Judge, check_images, check_labels
from lwd.evaluation.neighbours import precision_recall
from lwd.files import read_json
from lwd.machine import describe_machine, describe_versions


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
        generated: uint8 [N, 32, 32].
        labels: int64 [N], the classes that were asked for.
        judge: trained on real images, see `train_judge`.
        embedded: images uint8 [N, 32, 32] to features [N, D] of the embedded pretrained network.
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
    """Both networks' features of held-out real images uint8 [M, 32, 32]."""
    check_images(images)
    return {"embedded": embedded(images), "judge": judge.features(images)}


def evaluate_files(
    samples: Path, reference: Path, judge: Path, *, k: int = 3, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """`evaluate_images` from files: scores under "metrics", what was compared under "generated" and "settings".

    Args:
        samples: npz with `images` uint8 [N, 32, 32] and `labels` [N] (or ADM's names, `arr_0` and `arr_1`), the
            classes asked for; or a directory of `lwd sample`.
        reference: npz of the same form, real images.
        judge: file of `Judge.save`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds something else, or as `evaluate_images`.
        ImportError: the embedded network is not installed (extra `demo`).
    """
    images, labels, origin = _read_samples(samples)
    real, _ = _read_npz(reference)
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
    settings: dict[str, Any] = {
        name: {"path": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        for name, path in {"reference": reference, "judge": judge}.items()
    }
    settings |= {"embedded": "efficientnet-lite0, pooled", "k": k, "reference_images": int(scores["reference_images"])}
    measured = ("fd_embedded", "fd_judge", "precision", "recall", "accuracy")
    digest = TensorImages(images).sha256()
    generated = {"name": str(samples), "sha256": digest, "count": len(images), "shape": [1, *images.shape[1:]]}
    return {
        "metrics": {name: scores[name] for name in measured},
        "generated": generated if origin is None else generated | {"origin": origin},
        "settings": settings,
        "machine": describe_machine(torch.device(device)),
        "versions": describe_versions(),
    }


def _read_samples(path: Path) -> tuple[Tensor, Tensor, dict[str, Any] | None]:
    """Images, labels and, where it is known, the origin of a directory of `lwd sample` or an npz."""
    if not Path(path).is_dir():
        return *_read_npz(path), None
    source = open_images(path)
    if source.origin is None:
        raise ValueError(f"{path} is no directory of `lwd sample`, so the classes of its images are not known")
    images = torch.cat(list(source.batches(250)))[:, 0]
    classes = read_json(Path(path) / "samples.json")["classes"]
    check_images(images)
    return images, torch.tensor([classes[i % len(classes)] for i in range(len(images))]), source.origin


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """Images and int64 labels of an npz file; errors name the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of images at {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = ("images", "labels") if "images" in arrays else ("arr_0", "arr_1")
            images, labels = torch.from_numpy(arrays[names[0]]), torch.from_numpy(arrays[names[1]]).to(torch.int64)
        check_images(images)
        check_labels(labels, len(images))
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not an npz of `images` uint8 [N, 32, 32] and `labels` [N], or is damaged ({error})"
        ) from error
    return images, labels
