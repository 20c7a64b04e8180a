"""How time and memory grow with batch, tokens, groups and processes, beside what the mathematics says.

    python benchmarks/growth.py --json growth.json --figure growth.png

Of a training step and of one evaluation for sampling. Every point is measured in processes of its own, in turns; its
seconds are the median of all steps, its bytes the most that any process held beyond the interpreter and its libraries.
Expected are the operations of `lwd.cost`, scaled to the first point of a series, and its estimate of memory. Processes
have one thread each and share one batch, so that they can be no more than cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from floor import timed
from lwd import Group, LightningDiT, LightningDiTConfig, SynchronousSchedule, TrainConfig, distributed
from lwd import lightningdit_config as sized
from lwd.compute import autocast
from lwd.cost import activation_bytes, forward_flops, parameter_count, state_bytes
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.machine import default_precision, describe_machine, describe_versions, own_device
from lwd.memory import keep_freed_memory
from lwd.training import _Training
from train_step import peak

CHANNELS = 48


@dataclass(frozen=True)
class Point:
    """What is measured: `batch` images of side^2 tokens in `groups` groups, on `processes` processes of `threads`
    threads each, where 0 stands for as many as torch takes."""

    batch: int = 4
    side: int = 16
    groups: int = 2
    processes: int = 1
    threads: int = 0

    @property
    def tokens(self) -> int:
        return self.side**2

    def config(self, size: str) -> LightningDiTConfig:
        groups = [Group(f"g{g}", CHANNELS // self.groups) for g in range(self.groups)]
        return sized(size, groups, input_size=self.side, num_classes=1000)


def series(largest: int) -> dict[str, list[Point]]:
    """Points by the name of what varies.

    Args:
        largest: batch of the last point of the first series.
    """
    batches = [b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) if b <= largest]
    processes = [n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() or os.cpu_count() or 1)]
    return {
        "batch": [Point(batch=b) for b in batches],
        "tokens": [Point(batch=2, side=side) for side in (16, 20, 24, 28, 32)],
        "groups": [Point(groups=g) for g in (1, 2, 3, 4)],
        "processes": [Point(batch=8, processes=n, threads=1) for n in processes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--batch", type=int, default=16, help="the largest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4, help="steps that are timed in every process")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--figure", type=Path, help="draw it here")
    parser.add_argument("--read", type=Path, help="draw this earlier result instead of measuring")
    parser.add_argument("--one", type=json.loads, help="measure this point in this process")
    chosen = parser.parse_args()
    if chosen.one:
        with distributed.joined():
            measured = measure(Point(**chosen.one), chosen)
            if distributed.rank() == 0:
                print(json.dumps(measured))
        return
    result = json.loads(chosen.read.read_text()) if chosen.read else grow(chosen)
    for name, rows in result["series"].items():
        for before, after in pairwise(rows):
            told = [f"{name} {before[name]} -> {after[name]}:"]
            for kind in ("training", "sampling"):
                real, expected = (after[kind][key] / before[kind][key] for key in ("seconds", "expected_seconds"))
                told.append(f"{kind} {real:.2f} times the seconds, expected {expected:.2f};")
            print(*told)
    if chosen.json is not None:
        write_json(chosen.json, result)
    if chosen.figure is not None:
        draw(result, chosen.figure)


def grow(chosen: argparse.Namespace) -> dict[str, Any]:
    points = series(chosen.batch)
    distinct = list(dict.fromkeys(point for row in points.values() for point in row))
    found: dict[Point, list[dict[str, Any]]] = {point: [] for point in distinct}
    start = time.monotonic()
    for number in range(chosen.rounds):
        for point in distinct:
            found[point].append(launch(point))
            done = number * len(distinct) + distinct.index(point) + 1
            left = (time.monotonic() - start) / done * (chosen.rounds * len(distinct) - done)
            print(f"round {number + 1}: {point}, about {left / 60:.0f} min to go", file=sys.stderr)
    device = own_device(chosen.device)
    rows = {name: [describe(p, found[p], chosen, line[0], found) for p in line] for name, line in points.items()}
    described = {"machine": describe_machine(device), "versions": describe_versions()}
    setting = {"size": chosen.size, "precision": default_precision(device), "compiled": chosen.compile}
    return {"series": rows, **setting, **described}


def launch(point: Point) -> dict[str, Any]:
    """The measurement of `point`, from a process of its own or, under torchrun, several."""
    script = [*sys.argv, "--one", json.dumps(asdict(point))]
    command = [sys.executable, *script]
    environment = dict(os.environ)
    if point.processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.processes}"]
        command = [sys.executable, *run, *script]
    if point.threads:
        environment["OMP_NUM_THREADS"] = str(point.threads)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(point: Point, chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of single steps and evaluations, and the bytes that they took."""
    keep_freed_memory()
    device = own_device(chosen.device)
    config, precision = point.config(chosen.size), default_precision(device)
    base = peak(device)
    network = LightningDiT(config).to(device)
    latents = torch.randn(2 * point.batch, CHANNELS, point.side, point.side, device=device)
    labels = torch.arange(2 * point.batch, device=device)
    data = TensorLatents(config.spec, latents, labels)
    settings = {"batch_size": point.batch, "precision": precision, "compile": chosen.compile}
    schedule = SynchronousSchedule(point.groups, names=config.spec.names).to(device)

    def evaluate() -> None:
        with torch.no_grad(), autocast(precision, device):
            network(latents[: point.batch], torch.rand(point.batch, point.groups, device=device), labels[: point.batch])

    # First, because the most that a process ever held does not go down again.
    evaluate()
    sampling = {"seconds": [timed(evaluate, device) for _ in range(chosen.repeats)], "bytes": peak(device) - base}
    update = _Training(network, schedule, data, TrainConfig(repa=0.0, **settings), None, device).update
    for step in range(2):
        update(step)
    seconds = [timed(partial(update, step), device) for step in range(2, 2 + chosen.repeats)]
    return {"training": {"seconds": seconds, "bytes": peak(device) - base}, "sampling": sampling}


def describe(
    point: Point,
    runs: list[dict[str, Any]],
    chosen: argparse.Namespace,
    first: Point,
    found: dict[Point, list[dict[str, Any]]],
) -> dict[str, Any]:
    """A row: what was measured, and what was expected from the `first` point of the series."""
    row: dict[str, Any] = asdict(point) | {"tokens": point.tokens}
    precision = default_precision(own_device(chosen.device))

    def work(p: Point, kind: str) -> float:
        # Every process samples for itself; it is the training's batch that they share.
        share = p.batch / p.processes if kind == "training" else p.batch
        return share * forward_flops(p.config(chosen.size))

    def middle(p: Point, kind: str) -> float:
        return statistics.median(t for run in found[p] for t in run[kind]["seconds"])

    config = point.config(chosen.size)
    parameters = parameter_count(config)
    activations = point.batch / point.processes * (activation_bytes(config, precision) + extra_bytes(config, chosen))
    estimates = {"training": state_bytes(parameters, precision) + activations, "sampling": 4 * parameters}
    for kind, estimate in estimates.items():
        times = [t for run in runs for t in run[kind]["seconds"]]
        row[kind] = {
            "seconds": statistics.median(times),
            "fastest, slowest": [min(times), max(times)],
            "expected_seconds": middle(first, kind) * work(point, kind) / work(first, kind),
            "bytes": max(run[kind]["bytes"] for run in runs),
            "expected_bytes": estimate,
        }
    return row


def extra_bytes(config: LightningDiTConfig, chosen: argparse.Namespace) -> int:
    """What an image takes on a CPU beyond `activation_bytes`, see there: the norm keeps a copy, attention copies its
    output, and in bf16 keeps its matrix."""
    device = own_device(chosen.device)
    if device.type != "cpu":
        return 0
    tokens, bf16 = config.input_size**2, default_precision(device) == "bf16"
    matrix = 2 * config.num_heads * tokens**2 if bf16 else 0
    return config.depth * (tokens * config.hidden_size * (18 if bf16 else 20) + matrix)


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds above, memory below; a column for each series."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(result["series"]), figsize=(14, 6.4), layout="constrained")
    for column, (name, rows) in zip(axes.T, result["series"].items(), strict=True):
        x = [row[name] for row in rows]
        for panel, key, scale in ((column[0], "seconds", 1), (column[1], "bytes", 1e9)):
            for kind, colour in (("training", "#0072b2"), ("sampling", "#d55e00")):
                panel.plot(x, [row[kind][key] / scale for row in rows], "o-", color=colour, label=kind)
                if key == "seconds" or kind == "training":
                    expected = [row[kind][f"expected_{key}"] / scale for row in rows]
                    panel.plot(x, expected, "--", color=colour, linewidth=1.3, label=f"{kind}, expected")
            panel.set(xlabel=name, xticks=x, ylim=(0, None))
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#dfe3e8", linewidth=0.8)
            panel.set_axisbelow(True)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("GB")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
