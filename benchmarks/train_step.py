"""Time and memory of training steps by size and batch; the probe's step against the plain one; what bookkeeping costs.

    python benchmarks/train_step.py --json train_step.json

Steps of stage II (with the cosine term, without REPA) on 256 tokens, and of the probe. Plain is the denoiser's loss
with forward, backward and AdamW alone. Variants take turns, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lwd import IMAGENET_SPEC, OffsetSchedule, PolynomialSchedule, ProbeConfig, TrainConfig, lightningdit_config
from lwd.backbones import LightningDiT
from lwd.batches import Batches
from lwd.cost import activation_bytes, forward_flops, state_bytes
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.machine import default_precision, describe_machine, describe_versions, pick_device
from lwd.memory import keep_freed_memory
from lwd.objective import denoiser_objective
from lwd.parallel import Trained, adamw
from lwd.probe import _Probe
from lwd.training import _Training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["S", "B"])
    parser.add_argument("--batches", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "BATCH"), help="measure one step and its peak memory only")
    chosen = parser.parse_args()
    keep_freed_memory()
    device = pick_device(chosen.device)
    if chosen.one:
        size, batch = chosen.one[0], int(chosen.one[1])
        update = make_step("train", size, batch, device, chosen.compile)
        times = [timed(update, step, device) for step in range(3)]
        print(f"{min(times)} {peak(device)}")
        return
    rows = []
    for size in chosen.sizes:
        for batch in chosen.batches:
            # A process of its own: the peak is that of this size and batch alone.
            command = [sys.executable, __file__, "--one", size, str(batch), "--device", chosen.device]
            command += ["--compile"] if chosen.compile else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, memory = (float(word) for word in done.stdout.split()[-2:])
            config = lightningdit_config(size, IMAGENET_SPEC, input_size=16, num_classes=1000)
            precision = default_precision(device)
            parameters = sum(p.numel() for p in LightningDiT(config).parameters())
            estimate = state_bytes(parameters, precision) + batch * activation_bytes(config, precision)
            flops = 3 * forward_flops(config) * batch / seconds
            rows.append({"size": size, "batch": batch, "seconds": seconds, "peak_bytes": memory,
                         "estimated_bytes": estimate, "operations_per_second": flops})  # fmt: skip
            print(f"{size} batch {batch}: {seconds:.2f} s, {batch / seconds:.1f} images/s, {flops / 1e9:.0f} GFLOP/s, "
                  f"{memory / 1e9:.2f} GB at most (estimate {estimate / 1e9:.2f})")  # fmt: skip
    ratios = compare(chosen.sizes[0], chosen.batches[-1], device, chosen.compile, chosen.repeats)
    for name, ratio in ratios.items():
        print(f"{name:<60}{ratio:.3f}")
    if chosen.json is not None:
        machine = {"machine": describe_machine(device), "versions": describe_versions()}
        write_json(chosen.json, {"steps": rows, "ratios": ratios, **machine})


def make_step(kind: str, size: str, batch: int, device: torch.device, compiled: bool) -> Callable[[int], Any]:
    """One step of ``plain``, ``train`` or ``probe``, with a network of its own."""
    network = LightningDiT(lightningdit_config(size, IMAGENET_SPEC, input_size=16, num_classes=1000)).to(device)
    latents = torch.randn(64, 48, 16, 16, device=device)
    data = TensorLatents(IMAGENET_SPEC, latents, torch.arange(64, device=device))
    schedule, precision = OffsetSchedule(0.3).to(device), default_precision(device)
    settings: dict[str, Any] = {"batch_size": batch, "precision": precision, "compile": compiled}
    if kind == "train":
        return _Training(network, schedule, data, TrainConfig(repa=0.0, **settings), None, device).update
    if kind == "probe":
        return _Probe(network, PolynomialSchedule().to(device), data, ProbeConfig(**settings), device).update
    batches = Batches(data, TrainConfig(repa=0.0, **settings), network, device)
    forward = Trained(network.train(), device, precision=precision, compiled=compiled)
    optimizer = adamw(network.parameters(), device, lr=1e-4)

    def plain(step: int) -> None:
        part = batches.draw(step)
        optimizer.zero_grad(set_to_none=True)
        denoiser_objective(
            forward, schedule, IMAGENET_SPEC, part.x0, part.x1, part.labels, part.tau, repa=0.0
        ).total.backward()
        optimizer.step()

    return plain


def compare(size: str, batch: int, device: torch.device, compiled: bool, repeats: int) -> dict[str, float]:
    variants = {kind: make_step(kind, size, batch, device, compiled) for kind in ("plain", "train", "probe")}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(repeats + 2):
        for name, update in variants.items():
            seconds = timed(update, step, device)
            if step >= 2:
                times[name].append(seconds)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        f"{size}, batch {batch}: probe's step to the plain one": middle["probe"] / middle["plain"],
        f"{size}, batch {batch}: EMA, gradient norm and metrics, to the plain step": middle["train"] / middle["plain"],
    }


def timed(update: Callable[[int], Any], step: int, device: torch.device) -> float:
    start = time.perf_counter()
    update(step)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
