"""What each choice about a training step's speed gives here: the step with one of them undone, or another one made.

    python benchmarks/ablation.py --json ablation.json

Steps with the cosine term and REPA, compiled. All variants live in one process, take turns, and are compared by the
median of the ratios to our step of the same turn. What memory that is kept gives is in
`against_sfd.py`: it is the whole process's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.linalg import vecdot, vector_norm
from torch.nn import functional as F

from floor import timed
from lwd import IMAGENET_SPEC, LightningDiT, OffsetSchedule, TrainConfig, lightningdit_config
from lwd.compute import Precision, compile_blocks
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.machine import default_precision, describe_machine, describe_versions, pick_device
from lwd.memory import keep_freed_memory
from lwd.training import _Training

Patch = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=["float32", "bf16"], help="what the device is best at, if not given")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS)[1:], choices=list(VARIANTS)[1:], metavar="NAME")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    keep_freed_memory()
    device = pick_device(chosen.device)
    config = lightningdit_config(chosen.size, IMAGENET_SPEC, input_size=16, num_classes=1000, repa_depth=2)
    network = LightningDiT(config).to(device)
    precision = chosen.precision or default_precision(device)
    steps = {
        name: make(copy.deepcopy(network), VARIANTS[name], chosen.batch, precision, device)
        for name in ("lwd", *chosen.variants)
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(chosen.repeats + 2):
        for name, step in steps.items():
            seconds = timed(lambda step=step, number=number: step(number), device)
            times[name] += [seconds] if number >= 2 else []
    whole, rows = times["lwd"], []
    for name, values in times.items():
        ratios = sorted(value / reference for value, reference in zip(values, whole, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append({"variant": name, "seconds": statistics.median(values), "ratio": statistics.median(ratios),
                     "ratio, middle half": [quartiles[0], quartiles[2]]})  # fmt: skip
        print(f"{name:<52}{rows[-1]['seconds']:.3f} s  {rows[-1]['ratio']:.3f} times "
              f"({quartiles[0]:.3f} to {quartiles[2]:.3f})")  # fmt: skip
    if chosen.json is not None:
        described = {"machine": describe_machine(device), "versions": describe_versions()}
        setting = {"size": chosen.size, "batch": chosen.batch, "precision": precision}
        write_json(chosen.json, {"variants": rows, **setting, **described})


def make(
    network: LightningDiT, patch: Patch, batch: int, precision: Precision, device: torch.device
) -> Callable[[int], None]:
    """Steps of a training in which `patch` holds."""
    latents, features = torch.randn(32, 48, 16, 16, device=device), torch.randn(32, 768, 16, 16, device=device)
    data = TensorLatents(IMAGENET_SPEC, latents, torch.arange(32, device=device), features=features)
    config = TrainConfig(batch_size=batch, precision=precision, compile=True)
    with patch():
        if patch is scattered:
            network.blocks[0].register_forward_pre_hook(scatter)
        training = _Training(network, OffsetSchedule(0.3).to(device), data, config, None, device)

    def step(number: int) -> None:
        with patch():
            training.update(number)

    return step


def scatter(module: nn.Module, arguments: Any) -> Any:
    """Tokens laid out as the convolution leaves them, channel by channel."""
    x, *rest = arguments
    return x.transpose(1, 2).contiguous().transpose(1, 2), *rest


@contextlib.contextmanager
def scattered() -> Iterator[None]:
    yield


def replaced(target: str, value: Any) -> Patch:
    return lambda: mock.patch(target, value)


def compile_final_layer_too(network: nn.Module, **settings: Any) -> None:
    compile_blocks(network)
    network.final_layer.compile(dynamic=False)  # type: ignore[operator, union-attr]


def by_products(tokens: torch.Tensor, features: torch.Tensor, loss: str) -> torch.Tensor:
    """REPA's cosine as a scalar product over two lengths."""
    x, y = tokens.float(), features.flatten(2).transpose(1, 2).float().contiguous()
    lengths = vector_norm(x, dim=-1).clamp(min=1e-8) * vector_norm(y, dim=-1).clamp(min=1e-8)
    return (1 - vecdot(x, y) / lengths).mean()


@torch.no_grad()
def one_by_one(average: Any) -> None:
    for value, parameter in zip(average._values, average._parameters(), strict=True):
        value.mul_(average.decay).add_(parameter, alpha=1 - average.decay)


def unfused(groups: Any, device: torch.device, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(groups), foreach=True, **settings)


VARIANTS: dict[str, Patch] = {
    "lwd": contextlib.nullcontext,
    "not compiled": replaced("lwd.parallel.compile_blocks", lambda network: None),
    "tokens channel by channel": scattered,
    "PyTorch's fused attention": replaced("lwd.backbones.lightningdit.attend", F.scaled_dot_product_attention),
    "average tensor by tensor": replaced("lwd.parallel.Average.update", one_by_one),
    "AdamW by foreach": replaced("lwd.training.adamw", unfused),
    "float32 products by MKL": replaced("lwd.linear.AVX512", False),
    # Not done, but tried.
    "compiled as one graph": replaced("lwd.parallel.compile_blocks", lambda network: network.compile(dynamic=False)),
    "the final layer compiled too": replaced("lwd.parallel.compile_blocks", compile_final_layer_too),
    "REPA's cosine by products": replaced("lwd.objective.repa_alignment", by_products),
}


if __name__ == "__main__":
    main()
