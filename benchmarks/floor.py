"""The least time that a forward pass and a training step can take on this machine, by size of network.

    python benchmarks/floor.py --json floor.json

From the operations and bytes of one image, counted, and the rates of matrix products and memory of this machine,
measured: nothing is faster than the slower of the two. Other benchmarks report their share of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lwd import IMAGENET_SPEC, LightningDiTConfig, lightningdit_config
from lwd.compute import Precision
from lwd.cost import TRAINING_FACTOR, activation_bytes, forward_flops, parameter_count, state_bytes
from lwd.files import write_json
from lwd.linear import inner_products
from lwd.machine import describe_machine, describe_versions, pick_device

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most: operations per second of matrix products, bytes per second of memory."""

    operations: float
    bytes: float

    def floor(self, operations: float, moved: float) -> float:
        """Seconds."""
        return max(operations / self.operations, moved / self.bytes)


def measure_limits(device: torch.device, precision: Precision, repeats: int = 15) -> Limits:
    """The best rate of the products that a network of this kind has, and of a copy in memory, read and write."""
    dtype, rates = DTYPES[precision], []
    tokens = 2048 if device.type == "cpu" else 65536
    for inputs, outputs in ((384, 1152), (384, 2048), (1152, 3456), (1152, 6144)):
        a, b = torch.randn(tokens, inputs, device=device, dtype=dtype), torch.randn(outputs, inputs, device=device)
        b = b.to(dtype)
        for product in (torch.nn.functional.linear, inner_products):  # by MKL and by oneDNN, in float32 on a CPU
            seconds = quickest(lambda a=a, b=b, product=product: product(a, b), device, repeats)
            rates.append(2 * tokens * inputs * outputs / seconds)
    source = torch.randn(2**26 if device.type == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    seconds = quickest(lambda: target.copy_(source), device, repeats)
    return Limits(max(rates), 2 * source.numel() * 4 / seconds)


def quickest(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of the upper quarter of the runs: a limit is what is reached when nothing else goes on."""
    times = [timed(run, device) for _ in range(repeats + 2)][2:]
    return statistics.quantiles(times, n=4)[0]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_work(config: LightningDiTConfig, precision: Precision, batch: int) -> tuple[float, float]:
    """Operations and least bytes of a forward pass of `batch` images: every weight read once."""
    return batch * forward_flops(config), parameter_count(config) * (4 if precision == "float32" else 2)


def training_work(
    config: LightningDiTConfig, precision: Precision, batch: int, *, projector: bool = False
) -> tuple[float, float]:
    """Operations and least bytes of a training step, with REPA's `projector` or without: what the backward pass needs
    is written and read once, weights, gradients, moments and average are read and written once."""
    state = 2 * state_bytes(parameter_count(config, projector=projector), precision)
    kept = 2 * batch * activation_bytes(config, precision, projector=projector)
    return TRAINING_FACTOR * batch * forward_flops(config, projector=projector), state + kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["S", "B", "XL"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    device = pick_device(chosen.device)
    rows, limits = [], {}
    for precision in ("float32", "bf16"):
        limit = measure_limits(device, precision)  # type: ignore[arg-type]
        limits[precision] = vars(limit)
        print(f"{precision}: {limit.operations / 1e9:,.0f} GFLOP/s, {limit.bytes / 1e9:.1f} GB/s")
        for size in chosen.sizes:
            config = lightningdit_config(size, IMAGENET_SPEC, input_size=16, num_classes=1000)
            for kind, work in (("forward", forward_work), ("training", training_work)):
                operations, moved = work(config, precision, chosen.batch)  # type: ignore[arg-type]
                seconds = limit.floor(operations, moved)
                bound = "products" if operations / limit.operations > moved / limit.bytes else "memory"
                per_image = operations / chosen.batch, moved / chosen.batch
                row = {"size": size, "precision": precision, "kind": kind, "batch": chosen.batch,
                       "operations_per_image": per_image[0], "bytes_per_image": per_image[1],
                       "floor_seconds": seconds, "bound": bound}  # fmt: skip
                rows.append(row)
                print(f"  {size:<3} {kind:<9} {per_image[0] / 1e9:8.1f} GFLOP {per_image[1] / 1e6:8.1f} MB per image; "
                      f"batch {chosen.batch}: {seconds:8.4f} s at least ({bound})")  # fmt: skip
    if chosen.json is not None:
        described = {"machine": describe_machine(device), "versions": describe_versions()}
        write_json(chosen.json, {"limits": limits, "floors": rows, **described})


if __name__ == "__main__":
    main()
