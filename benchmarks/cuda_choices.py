"""The choices that only a GPU can decide: attention at head width 72, how to compile, CUDA graphs, float8.

    python benchmarks/cuda_choices.py --json cuda_choices.json

    attention     forward and backward at the network's shape: every backend of PyTorch, and padded head widths
    step          the training step eager, compiled by block, and as one graph; in parts and with blocks computed again
                  for memory; with float8 products (torchao, if installed), and how far its losses are from bf16's
    evaluation    one call of the network as sampling makes it, by batch: eager, by block, one graph, CUDA graphs

Everything is measured in one process, the variants one after the other, each the median of --repeats. What fails here
(a backend that does not take the shape, a package that is missing) is reported as that.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from floor import measure_limits, timed, training_work
from lwd import IMAGENET_SPEC, LightningDiT, OffsetSchedule, TrainConfig, lightningdit_config
from lwd.compute import autocast, compile_blocks
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions, pick_device
from lwd.training import _Training
from train_step import peak

PADDED = (80, 96, 128)
LOSS_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--recompute", type=int, default=8, help="blocks, for the variant that recomputes")
    parser.add_argument("--evaluations", nargs="*", type=int, default=[1, 8, 64], help="batches of the evaluations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    device, result = pick_device(chosen.device), dict[str, Any]()
    for part in chosen.only:
        result[part] = PARTS[part](chosen, device)
        if chosen.json is not None:  # after every part: a time limit then costs only what was not done
            described = {"machine": describe_machine(device), "versions": describe_versions()}
            write_json(chosen.json, result | {"size": chosen.size, "batch": chosen.batch} | described)


def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or why it could not."""
    try:
        row = measure()
    except Exception as error:  # whatever a backend or a compiler raises is the finding
        row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{name:<44}" + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return {"variant": name, **row}


def median(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds, after two runs to warm up."""
    return statistics.median([timed(run, device) for _ in range(repeats + 2)][2:])


def attention(chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    config = lightningdit_config(chosen.size, IMAGENET_SPEC, input_size=16, num_classes=1000)
    heads, width = config.num_heads, config.hidden_size // config.num_heads
    q, k, v = (
        torch.randn(chosen.batch, 256, heads, width, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )

    def run(padded: int, backend: SDPBackend | None) -> Callable[[], None]:
        def step() -> None:
            wide = [pad(x, (0, padded - width)) for x in (q, k, v)]
            with sdpa_kernel(backend or list(SDPBackend.__members__.values())):
                out = scaled_dot_product_attention(*wide, scale=width**-0.5)[..., :width]
            torch.autograd.grad(out.sum(), (q, k, v))

        return step

    backends = {
        "default": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "plain": SDPBackend.MATH,
    }
    rows = []
    for padded in (width, *(p for p in PADDED if p > width)):
        for name, backend in backends.items():
            step = run(padded, backend)
            rows.append(
                attempt(f"{name}, width {padded}", lambda step=step: {"seconds": median(step, device, chosen.repeats)})
            )
    return rows


def steps(chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Training steps with the cosine term and REPA, and the share of the least possible time."""
    config = lightningdit_config(chosen.size, IMAGENET_SPEC, input_size=16, num_classes=1000, repa_depth=2)
    limits = measure_limits(device, "bf16")
    floor = limits.floor(*training_work(config, "bf16", chosen.batch, projector=True))
    bf16 = list[float]()

    def measure(prepare: Callable[[nn.Module], None], **settings: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        network = LightningDiT(config).to(device)
        prepare(network)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        update = training(network, chosen.batch, device, **settings)
        losses = [float(update(step)["loss"]) for step in range(LOSS_STEPS)]
        if not bf16:
            bf16.extend(losses)
        numbers = iter(range(LOSS_STEPS, 10**9))
        seconds = median(lambda: update(next(numbers)), device, chosen.repeats)
        difference = max(abs(a - b) / b for a, b in zip(losses, bf16, strict=True))
        return {
            "seconds": seconds,
            "images per second": chosen.batch / seconds,
            "share of the floor": floor / seconds,
            "peak GB": peak(device) / 1e9,
            "losses, largest difference": difference,
            "loss at the end": losses[-1],
        }

    def whole(network: nn.Module) -> None:
        network.compile(dynamic=False)

    def nothing(network: nn.Module) -> None:
        pass

    def float8(network: nn.Module) -> None:
        from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found, import-untyped]

        # Only the large products of the blocks: their widths are multiples of 16, as float8 needs them.
        wanted = (".qkv", ".proj", ".w12", ".w3")
        convert_to_float8_training(network, module_filter_fn=lambda module, name: name.endswith(wanted))
        compile_blocks(network)

    recompute = min(chosen.recompute, config.depth)
    return [
        attempt("by block", lambda: measure(compile_blocks)),
        attempt("eager", lambda: measure(nothing)),
        attempt("one graph", lambda: measure(whole)),
        attempt("by block, in 2 parts", lambda: measure(compile_blocks, accumulate=2)),
        attempt("by block, in 4 parts", lambda: measure(compile_blocks, accumulate=4)),
        attempt(f"by block, {recompute} blocks recomputed", lambda: measure(compile_blocks, recompute=recompute)),
        attempt("by block, float8", lambda: measure(float8)),
    ]


def training(network: LightningDiT, batch: int, device: torch.device, **settings: Any) -> Callable[[int], Any]:
    latents = torch.randn(2 * batch, 48, 16, 16, device=device)
    features = torch.randn(2 * batch, 768, 16, 16, device=device, dtype=torch.float16)
    data = TensorLatents(IMAGENET_SPEC, latents, torch.arange(2 * batch, device=device) % 1000, features=features)
    config = TrainConfig(batch_size=batch, precision="bf16", **settings)
    return _Training(network, OffsetSchedule(0.3).to(device), data, config, None, device).update


def evaluations(chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    config = lightningdit_config(chosen.size, IMAGENET_SPEC, input_size=16, num_classes=1000)
    base = LightningDiT(config).to(device).eval().requires_grad_(False)
    rows = []
    for batch in chosen.evaluations:
        z, t = torch.randn(batch, 48, 16, 16, device=device), torch.rand(batch, 2, device=device)
        labels = torch.arange(batch, device=device)

        def measure(
            prepare: Callable[[nn.Module], Any], z: Any = z, t: Any = t, labels: Any = labels
        ) -> dict[str, Any]:
            network = copy.deepcopy(base)
            made = prepare(network)
            run = network if made is None else made

            @torch.no_grad()
            def call() -> None:
                with autocast("bf16", device):
                    run(z, t, labels)

            seconds = median(call, device, 3 * chosen.repeats)
            return {"seconds": seconds, "images per second": len(z) / seconds}

        variants: dict[str, Callable[[nn.Module], Any]] = {
            "eager": lambda network: None,
            "by block": compile_blocks,
            "one graph": lambda network: torch.compile(network, dynamic=False),
            "one graph, CUDA graphs": lambda network: torch.compile(network, dynamic=False, mode="reduce-overhead"),
        }
        for name, prepare in variants.items():
            rows.append(attempt(f"{name}, batch {batch}", lambda prepare=prepare, m=measure: m(prepare)))
    return rows


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = {
    "attention": attention,
    "step": steps,
    "evaluation": evaluations,
}


if __name__ == "__main__":
    main()
