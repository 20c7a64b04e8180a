"""A training step beside that of SFD's public code, with the same weights, on the same machine, in one run.

    git clone https://github.com/yuemingPAN/SFD
    python benchmarks/against_sfd.py SFD --json against_sfd.json

A step is forward, loss (offset 0.3, cosine term; with --repa REPA too), backward, AdamW and the moving average. SFD is
compiled as it comes, by its decorators. Every contender runs in a process of its own, several times in turns: ours as
the command line runs it, which keeps freed memory, and "lwd compiled, as a library" without that. Ratios are of
medians. Before, the velocities of both for one batch are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floor import Limits, measure_limits, timed, training_work
from lwd import IMAGENET_SPEC, LightningDiT, OffsetSchedule, TrainConfig
from lwd.compute import Precision, autocast
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions, pick_device
from lwd.memory import keep_freed_memory
from lwd.training import _Training
from sfd_code import import_sfd, sfd_network, sfd_transport
from train_step import peak

CONTENDERS = ("SFD", "lwd", "lwd compiled", "lwd compiled, as a library")
WARM_UP = 3


def main() -> None:
    chosen = parse()
    import_sfd(chosen.sfd)
    device = pick_device(chosen.device)
    if chosen.one:
        precision, name = chosen.one
        print(json.dumps(measure(name, precision, chosen, device)))
        return
    rows = []
    for precision in chosen.precisions:
        rows.append(compare(precision, chosen, device))
        for name, value in rows[-1].items():
            print(f"{name:<52}{value:.4g}" if isinstance(value, float) else f"{name:<52}{value}")
        print()
    if chosen.json is not None:
        described = {"machine": describe_machine(device), "versions": describe_versions()}
        write_json(chosen.json, {"steps": rows, **described})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sfd", type=Path, help="a checkout of yuemingPAN/SFD")
    parser.add_argument("--size", default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precisions", nargs="*", default=["float32", "bf16"])
    parser.add_argument("--repa", action="store_true")
    parser.add_argument("--recompute", type=int, default=0, help="blocks of ours whose activations are computed again")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that ours computes its batch in")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contender's process is started")
    parser.add_argument("--repeats", type=int, default=6, help="steps that are timed in every process")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--one", nargs=2, metavar=("PRECISION", "CONTENDER"), help="measure this one in this process")
    return parser.parse_args()


def compare(precision: Precision, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    difference = velocity_difference(chosen.size, min(chosen.batch, 8), precision, device)
    limits = [measure_limits(device, precision)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.contenders}
    failed: dict[str, str] = {}
    for number in range(chosen.rounds):
        for name in chosen.contenders:
            if name in failed:
                continue
            command = [sys.executable, *sys.argv, "--one", precision, name]
            done = subprocess.run(command, capture_output=True, text=True)
            print(f"{precision}, round {number + 1} of {chosen.rounds}: {name}", file=sys.stderr)
            if done.returncode:  # out of memory, most of all, which is a result too
                failed[name] = done.stderr.strip().splitlines()[-1]
            else:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    limits.append(measure_limits(device, precision))  # a limit is the best that the machine gave, before or after
    best = Limits(max(limit.operations for limit in limits), max(limit.bytes for limit in limits))
    config = LightningDiT.from_sfd(sfd_network(chosen.size, repa=chosen.repa).state_dict()).config
    floor = best.floor(*training_work(config, precision, chosen.batch, projector=chosen.repa))
    found = {name: runs for name, runs in found.items() if name not in failed}
    middle = {name: statistics.median(t for run in runs for t in run["seconds"]) for name, runs in found.items()}
    row: dict[str, Any] = {
        "size": chosen.size, "batch": chosen.batch, "precision": precision, "repa": chosen.repa,
        "recompute": chosen.recompute, "accumulate": chosen.accumulate, "failed": failed,
        "relative difference of velocities": difference, "floor seconds": floor,
    }  # fmt: skip
    for name, runs in found.items():
        seconds = [t for run in runs for t in run["seconds"]]
        row |= {f"{name}: seconds": middle[name], f"{name}: fastest, slowest": [min(seconds), max(seconds)]}
        row |= {f"{name}: images per second": chosen.batch / middle[name]}
        row |= {f"{name}: peak GB": max(run["peak"] for run in runs) / 1e9}
        row |= {f"{name}: share of the floor": floor / middle[name]}
        if "SFD" in middle:
            row |= {f"{name}: ratio to SFD": middle["SFD"] / middle[name]}
    return row


def measure(name: str, precision: Precision, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of single steps and peak bytes of the contender `name`."""
    if name.startswith("lwd") and "library" not in name:
        keep_freed_memory()
    theirs = sfd_network(chosen.size, repa=chosen.repa).to(device)
    if name == "SFD":
        step = their_step(theirs, chosen.batch, precision, chosen.repa, device)
    else:
        ours = LightningDiT.from_sfd(theirs.state_dict(), **({} if chosen.repa else {"repa_depth": None})).to(device)
        del theirs
        memory = {"recompute": chosen.recompute, "accumulate": chosen.accumulate}
        step = our_step(ours, chosen.batch, precision, chosen.repa, device, compile="compiled" in name, **memory)
    times = [timed(lambda number=number: step(number), device) for number in range(WARM_UP + chosen.repeats)]
    return {"seconds": times[WARM_UP:], "peak": peak(device)}


def velocity_difference(size: str, batch: int, precision: Precision, device: torch.device) -> float:
    """In evaluation mode, where neither drops labels."""
    theirs = sfd_network(size, repa=False).to(device)
    ours = LightningDiT.from_sfd(theirs.state_dict()).to(device)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, 48, 16, 16, generator=generator).to(device)
    t = torch.rand(batch, 2, generator=generator).to(device)
    labels = torch.arange(batch, device=device)
    with torch.no_grad(), autocast(precision, device):
        found = ours.eval()(z, t, labels)
        expected = theirs.eval()(z, (t[:, 0], t[:, 1]), labels)
    return float((found - expected).norm() / expected.norm())


def their_step(
    model: nn.Module, batch: int, precision: Precision, repa: bool, device: torch.device
) -> Callable[[int], None]:
    """As its train.py does it."""
    transport, average = sfd_transport(), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, betas=(0.9, 0.999))
    x1, features = torch.randn(batch, 48, 16, 16, device=device), torch.randn(batch, 768, 16, 16, device=device)
    labels = torch.arange(batch, device=device)

    def step(_: int) -> None:
        with autocast(precision, device):
            terms = transport.training_losses(
                model, x1, {"y": labels}, use_repa=repa, feature_dino=features if repa else None
            )
        loss = sum(terms[name].mean() for name in ("loss", "cos_loss", *(["repa_loss"] if repa else [])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            averaged = dict(average.named_parameters())
            for name, parameter in model.named_parameters():
                averaged[name].mul_(0.9999).add_(parameter.data, alpha=1e-4)
        loss.item()  # it logs every step's loss

    return step


def our_step(
    model: LightningDiT, batch: int, precision: Precision, repa: bool, device: torch.device, **settings: Any
) -> Callable[[int], Any]:
    """As `lwd.train` does it, with further `settings` of `lwd.TrainConfig`."""
    latents = torch.randn(4 * batch, 48, 16, 16, device=device)
    features = torch.randn(4 * batch, 768, 16, 16, device=device) if repa else None
    labels = torch.arange(4 * batch, device=device) % 1000
    data = TensorLatents(IMAGENET_SPEC, latents, labels, features=features)
    settings = {"precision": precision, "repa": float(repa), "tau": "logit_normal", "jacobian": "none"} | settings
    config = TrainConfig(batch_size=batch, **settings)
    return _Training(model, OffsetSchedule(0.3).to(device), data, config, None, device).update


if __name__ == "__main__":
    main()
