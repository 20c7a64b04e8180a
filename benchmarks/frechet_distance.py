"""Frechet distance of stored statistics: time of `lwd` against `scipy.linalg.sqrtm`, measured in the same run.

    python benchmarks/frechet_distance.py --dims 2048 --json frechet.json

Both get the same two covariances (features with a power-law spectrum, more samples than features) and are timed
alternately; the ratio is of the fastest of `--repeats` each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import scipy
import torch

from lwd.evaluation import FeatureStatistics, frechet_distance
from lwd.files import write_json
from lwd.runs import describe_machine, describe_versions


def reference(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The usual formula, with a general matrix square root."""
    cov_a, cov_b = a.cov.numpy(), b.cov.numpy()
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def features(dims: int, seed: int) -> np.ndarray:
    """[4 dims, dims] with standard deviations 1, 1/2, ... 1/dims, in mixed directions."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(0).standard_normal((dims, dims)))[0]
    spread = (1 + 0.2 * rng.random(dims)) / np.arange(1, dims + 1)
    return 0.1 * seed / dims + (rng.standard_normal((4 * dims, dims)) * spread) @ mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, default=2048, help="features per sample (Inception's pool3: 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the fastest counts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")
    arguments = parser.parse_args()

    a, b = (FeatureStatistics.of(features(arguments.dims, seed)) for seed in (1, 2))
    values: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for name, distance in (("lwd", frechet_distance), ("scipy", reference)):
            start = time.perf_counter()
            values[name] = distance(a, b)
            seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - start)
    result = {
        "machine": describe_machine(torch.device("cpu")),
        "torch_threads": torch.get_num_threads(),
        "versions": describe_versions() | {"scipy": scipy.__version__},
        "dims": arguments.dims,
        "repeats": arguments.repeats,
        "seconds": seconds,
        "ratio": seconds["scipy"] / seconds["lwd"],
        "distance": values["lwd"],
        "relative_difference": abs(values["lwd"] - values["scipy"]) / values["scipy"],
    }
    for name, value in result.items():
        print(f"{name:20} {value}")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
