"""Frechet distance of stored statistics: time of `lwd` against `scipy.linalg.sqrtm`, measured in the same run.

    python benchmarks/frechet_distance.py --write

Both get the same pairs of covariances and are timed alternately; the ratio is of the fastest of `--repeats` each.
The cases: a power-law spectrum; a slower decay; a steep one, where the shortcut by eigenvalues is refused
by its own check and singular values decide; and fewer samples than features (compared as features with features).
In the last two the difference is scipy's: a square root of a nearly singular product loses half its digits.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import scipy
import torch

from lwd.evaluation import FeatureStatistics, frechet_distance
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions

OUTPUT = Path(__file__).parent / "results" / "frechet_distance.json"


def reference(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The usual formula, with a general matrix square root."""
    cov_a, cov_b = a.cov.numpy(), b.cov.numpy()
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def features(dims: int, seed: int, decay: float, samples: int) -> np.ndarray:
    """[samples, dims] with standard deviations 1, 2^-decay, ... dims^-decay, in mixed directions."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(0).standard_normal((dims, dims)))[0]
    spread = (1 + 0.2 * rng.random(dims)) / np.arange(1, dims + 1) ** decay
    return 0.1 * seed / dims + (rng.standard_normal((samples, dims)) * spread) @ mix


def compare(a: np.ndarray, b: np.ndarray, repeats: int) -> dict[str, float]:
    statistics = FeatureStatistics.of(a), FeatureStatistics.of(b)
    ours = statistics if len(a) > a.shape[1] else (a, b)
    values: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for _ in range(repeats):
        for name, measured in (("lwd", lambda: frechet_distance(*ours)), ("scipy", lambda: reference(*statistics))):
            start = time.perf_counter()
            values[name] = measured()
            seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - start)
    return {
        "seconds_lwd": seconds["lwd"],
        "seconds_scipy": seconds["scipy"],
        "ratio": seconds["scipy"] / seconds["lwd"],
        "distance": values["lwd"],
        "relative_difference": abs(values["lwd"] - values["scipy"]) / values["scipy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, default=2048, help="features per sample (Inception's pool3: 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the fastest counts")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--write", action="store_true", help=f"write the result to {OUTPUT.name} beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    result = {
        "machine": describe_machine(torch.device("cpu")),
        "load_before": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "versions": describe_versions() | {"scipy": scipy.__version__},
        "dims": arguments.dims,
        "repeats": arguments.repeats,
    }
    cases = {"power_law": (1.0, 4.0), "slow_decay": (0.75, 4.0), "steep": (2.0, 4.0), "few_samples": (1.0, 0.5)}
    for name, (decay, share) in cases.items():
        pair = (features(arguments.dims, seed, decay, int(share * arguments.dims)) for seed in (1, 2))
        result[name] = compare(*pair, arguments.repeats)
    for name, value in result.items():
        print(f"{name:20} {value}")
    if arguments.write:
        write_json(OUTPUT, result)


if __name__ == "__main__":
    main()
