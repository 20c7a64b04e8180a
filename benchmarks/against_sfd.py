"""A training step beside that of SFD's public code, with the same weights, on the same machine, in one run.

    git clone https://github.com/yuemingPAN/SFD
    python benchmarks/against_sfd.py SFD --json against_sfd.json

A step is forward, loss (offset 0.3, cosine term; with --repa REPA too), backward, AdamW and the moving average. Both
are compiled as they come: theirs by its decorators, ours by `--compile`; they take turns, and ratios are of medians.
Before, the velocities of both for one batch are compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floor import Limits, measure_limits, timed, training_work
from lwd import IMAGENET_SPEC, LightningDiT, OffsetSchedule, TrainConfig
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions, pick_device
from lwd.parallel import Precision, autocast
from lwd.training import _Training
from sfd_code import import_sfd, sfd_network, sfd_transport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sfd", type=Path, help="a checkout of yuemingPAN/SFD")
    parser.add_argument("--size", default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precisions", nargs="*", default=["float32", "bf16"])
    parser.add_argument("--repa", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    import_sfd(chosen.sfd)
    device, rows = pick_device(chosen.device), []
    for precision in chosen.precisions:
        rows.append(compare(chosen.size, chosen.batch, precision, chosen.repa, chosen.repeats, device))
        for name, value in rows[-1].items():
            print(f"{name:<44}{value:.4g}" if isinstance(value, float) else f"{name:<44}{value}")
        print()
    if chosen.json is not None:
        described = {"machine": describe_machine(device), "versions": describe_versions()}
        write_json(chosen.json, {"steps": rows, **described})


def compare(
    size: str, batch: int, precision: Precision, repa: bool, repeats: int, device: torch.device
) -> dict[str, Any]:
    theirs = sfd_network(size, repa=repa).to(device)
    ours = LightningDiT.from_sfd(theirs.state_dict(), **({} if repa else {"repa_depth": None})).to(device)
    difference = velocity_difference(theirs, ours, batch, precision, device)
    before = measure_limits(device, precision)
    steps = {
        "SFD": their_step(theirs, batch, precision, repa, device),
        "lwd": our_step(copy.deepcopy(ours), batch, precision, repa, device, compiled=False),
        "lwd compiled": our_step(ours, batch, precision, repa, device, compiled=True),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 3):
        for name, step in steps.items():
            seconds = timed(lambda step=step, number=number: step(number), device)
            times[name] += [seconds] if number >= 3 else []
    middle = {name: statistics.median(values) for name, values in times.items()}
    after = measure_limits(device, precision)  # a limit is the best that the machine gave, before or after
    limits = Limits(max(before.operations, after.operations), max(before.bytes, after.bytes))
    floor = limits.floor(*training_work(ours.config, precision, batch))
    row: dict[str, Any] = {"size": size, "batch": batch, "precision": precision, "repa": repa,
                           "relative difference of velocities": difference, "floor seconds": floor}  # fmt: skip
    for name, seconds in middle.items():
        row |= {f"{name}: seconds": seconds, f"{name}: fastest, slowest": [min(times[name]), max(times[name])]}
        row |= {f"{name}: share of the floor": floor / seconds, f"{name}: ratio to SFD": middle["SFD"] / seconds}
    return row


def velocity_difference(
    theirs: nn.Module, ours: LightningDiT, batch: int, precision: Precision, device: torch.device
) -> float:
    """In evaluation mode, where neither drops labels."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, 48, 16, 16, generator=generator).to(device)
    t = torch.rand(batch, 2, generator=generator).to(device)
    labels = torch.arange(batch, device=device)
    with torch.no_grad(), autocast(precision, device):
        found = ours.eval()(z, t, labels)
        expected = theirs.eval()(z, (t[:, 0], t[:, 1]), labels)
    theirs.train()
    ours.train()
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
    model: LightningDiT, batch: int, precision: Precision, repa: bool, device: torch.device, *, compiled: bool
) -> Callable[[int], Any]:
    """As `lwd.train` does it."""
    latents = torch.randn(4 * batch, 48, 16, 16, device=device)
    features = torch.randn(4 * batch, 768, 16, 16, device=device) if repa else None
    data = TensorLatents(IMAGENET_SPEC, latents, torch.arange(4 * batch, device=device), features=features)
    config = TrainConfig(
        batch_size=batch, precision=precision, compile=compiled, repa=float(repa), tau="logit_normal", jacobian="none"
    )
    return _Training(model, OffsetSchedule(0.3).to(device), data, config, None, device).update


if __name__ == "__main__":
    main()
