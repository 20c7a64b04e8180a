"""The five scores of 50,000 images from stored features, and precision and recall against a plain computation.

    python benchmarks/evaluation.py --write

Features are random, of Inception's widths. "plain" computes every distance (both halves of the symmetric ones) in
float64 and sorts whole rows, in blocks; all ways are timed on the same share of the samples.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lwd.evaluation import FeatureStatistics, FunctionExtractor, ImageFeatures, frechet_distance, score_images
from lwd.evaluation.neighbours import precision_recall
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions

OUTPUT = Path(__file__).parent / "results" / "evaluation.json"


def stored_features(count: int, seed: int) -> ImageFeatures:
    """Of a network of Inception's widths: positive, with deviations that fall like 1/sqrt(index)."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, 2049) ** -0.5
    pool = (0.4 + spread * torch.randn(count, 2048, generator=generator)).relu_()
    spatial = statistics_of(pool[:, :2023])
    logits = 4 * torch.randn(count, 1008, generator=generator)
    extractor = {"name": "random", "sha256": "0", "settings": {}}
    images = {"name": f"random {seed}", "sha256": None, "count": count, "shape": [3, 256, 256]}
    return ImageFeatures(extractor, images, pool, logits, {"pool": statistics_of(pool), "spatial": spatial})


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    for rows in features.split(4096):
        statistics.update(rows)
    return statistics


def plain_precision_recall(reference: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    reference, generated = reference.double(), generated.double()

    def radii(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.cdist(rows, x).sort(dim=1).values[:, k] for rows in x.split(1000)])

    def inside(x: torch.Tensor, support: torch.Tensor) -> float:
        limits = radii(support)
        return float(torch.cat([(torch.cdist(r, support) <= limits).any(dim=1) for r in x.split(1000)]).double().mean())

    return inside(generated, reference), inside(reference, generated)


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="generated images")
    parser.add_argument("--reference-images", type=int, default=10_000)
    parser.add_argument("--share", type=int, default=10, help="the plain computation runs on 1/SHARE of the samples")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--write", action="store_true", help=f"write the result to {OUTPUT.name} beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    load = os.getloadavg()[0]
    reference, generated = stored_features(arguments.reference_images, 1), stored_features(arguments.images, 2)
    network = FunctionExtractor("random", "0", lambda images: images)
    parts = {
        "statistics_of_pool": timed(lambda: statistics_of(generated.pool), 1)[0],
        "statistics_of_spatial": timed(lambda: statistics_of(generated.pool[:, :2023]), 1)[0],
        "frechet": timed(lambda: frechet_distance(reference.statistics["pool"], generated.statistics["pool"]), 3)[0],
    }
    seconds, result = timed(lambda: score_images(generated, reference, network), 1)
    parts["scores_from_statistics_and_features"] = seconds
    seconds += parts["statistics_of_pool"] + parts["statistics_of_spatial"]

    few = reference.pool[:: arguments.share], generated.pool[:: arguments.share]
    seconds_ours, ours = timed(lambda: precision_recall(*few), 2)
    seconds_single, single = timed(lambda: precision_recall(*few, distances="float32"), 2)
    seconds_half, _ = timed(lambda: precision_recall(*few, distances="float16"), 2)
    seconds_plain, plain = timed(lambda: plain_precision_recall(*few), 2)
    outcome = {
        "machine": describe_machine(torch.device("cpu")),
        "load_before": load,
        "threads": torch.get_num_threads(),
        "versions": describe_versions(),
        "images": arguments.images,
        "reference_images": arguments.reference_images,
        "seconds_all_five_scores": seconds,
        "seconds_of_parts": parts,
        "metrics": result.metrics,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "precision_recall_on_a_share": {
            "samples": [len(x) for x in few],
            "seconds_plain": seconds_plain,
            "seconds_float64": seconds_ours,
            "seconds_float32": seconds_single,
            "seconds_float16": seconds_half,
            "ratio_float64": seconds_plain / seconds_ours,
            "ratio_float32": seconds_plain / seconds_single,
            "equal": [list(plain) == list(ours), list(plain) == list(single)],
        },
    }
    for name, value in outcome.items():
        print(f"{name:28} {value}")
    if arguments.write:
        write_json(OUTPUT, outcome)


if __name__ == "__main__":
    main()
