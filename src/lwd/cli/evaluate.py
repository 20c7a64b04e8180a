"""`lwd evaluate`: scores of generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


def evaluate(
    samples: tuple[Path, ...],
    reference: Path,
    judge: Path | None = None,
    weights: Path | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    images: int = 50_000,
    reference_images: int = 10_000,
    distances: Literal["float32", "float64", "float16"] = "float32",
    shuffle: bool = True,
    seed: int = 0,
    batch: int = 64,
    device: str = "auto",
) -> None:
    """Score generated images: FID, sFID, inception score, precision and recall, by ADM's protocol.

    What was computed differently than the protocol asks, fewer images for example, is listed in the result. With
    --judge small data are compared by the embedded network and a judge that `lwd demo` trained; those are not FID.

    Args:
        samples: folders of PNGs or npz files of ADM's form; several are scored one after the other.
        reference: npz of ADM (VIRTUAL_imagenet256_labeled.npz), or another set of images.
        judge: judge.safetensors of a demo; samples and reference are then npz files with images and labels.
        weights: of the FID Inception; by default where torch keeps its downloads.
        out: JSON file for the result: metrics, every setting, hashes, counts.
        cache: directory that features are kept in by content, so that a reference is computed once.
        images: how many generated images the protocol asks for.
        reference_images: how many reference images precision and recall are of.
        distances: arithmetic of precision and recall; float16 rounds as ADM does.
        shuffle: shuffle the samples before the inception score cuts them into chunks.
        seed: of the shuffle.
        batch: images at a time.
        device: auto, cpu, cuda, cuda:1 ...
    """
    import json

    from lwd.files import write_json

    if judge is not None:
        from lwd.evaluation import evaluate_files

        if len(samples) != 1:
            raise ValueError(f"--judge compares one file of samples, not {len(samples)}")
        result: Any = evaluate_files(samples[0], reference, judge)
    else:
        from lwd.evaluation import ProtocolSettings, load_inception, load_reference, score_images
        from lwd.progress import counting
        from lwd.runs import pick_device

        where = pick_device(device)
        extractor = load_inception(weights, where)
        settings = ProtocolSettings(
            images=images, reference_images=reference_images, distances=distances, shuffle=shuffle, seed=seed
        )
        known = load_reference(
            reference, extractor, batch_size=batch, cache=cache, progress=counting("reference", "image")
        )
        scores = {}
        for path in samples:
            report = counting(path.name, "image")
            scores[str(path)] = score_images(
                path, known, extractor, settings=settings, batch_size=batch, cache=cache, device=where, progress=report
            ).to_dict()
        result = scores if len(samples) > 1 else next(iter(scores.values()))
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))
