"""A network as it is trained, on one process or several; its optimizer step and its average."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lwd import distributed
from lwd.compute import Precision, autocast, compile_blocks

Parallel = Literal["ddp", "fsdp"]


class Trained:
    """`denoiser` ready for training steps; call it as the denoiser itself.

    With several processes the gradients are averaged over them: by DDP, where each process holds the whole network, or
    by FSDP2, where each holds a share of every weight (`denoiser` is changed in place then).

    Args:
        recompute: blocks, from the first, whose activations are computed again in the backward pass instead of kept.
        unused: names of submodules that get no gradient in this training; they are frozen.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        device: torch.device,
        *,
        precision: Precision,
        compiled: bool = False,
        parallel: Parallel = "ddp",
        recompute: int = 0,
        unused: Sequence[str] = (),
    ) -> None:
        self.precision, self.device, self.spec = precision, device, getattr(denoiser, "spec", None)
        for name in unused:
            if (module := getattr(denoiser, name, None)) is not None:
                module.requires_grad_(False)
        blocks = getattr(denoiser, "blocks", None)
        if recompute:
            if blocks is None or not hasattr(denoiser, "recompute") or recompute > len(blocks):
                raise ValueError(f"cannot recompute {recompute} blocks of this network: it has {len(blocks or [])}")
            setattr(denoiser, "recompute", recompute)  # noqa: B010  (nn.Module declares no such attribute)
        if distributed.world() > 1 and parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in blocks or []:
                fully_shard(block)
            fully_shard(denoiser)
        if compiled:
            compile_blocks(denoiser)
        run: Any = denoiser
        if distributed.world() > 1 and parallel == "ddp":
            ids = [device.index] if device.type == "cuda" else None
            with warnings.catch_warnings():
                # torch 2.13 announces another name for broadcast_buffers, which 2.9 does not know yet.
                warnings.simplefilter("ignore", FutureWarning)
                run = DistributedDataParallel(
                    run, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self._run, self._denoiser = run, denoiser

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        with autocast(self.precision, self.device):
            return self._run(z, t, labels, **kwargs)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a batch: only after the `last` are gradients exchanged."""
        if isinstance(self._run, DistributedDataParallel):
            with nullcontext() if last else self._run.no_sync():
                yield
            return
        if (synchronise := getattr(self._denoiser, "set_requires_gradient_sync", None)) is not None:
            synchronise(last)
        yield


def adamw(groups: Iterable[Any], device: torch.device, **settings: Any) -> torch.optim.AdamW:
    """AdamW, fused where there is such a thing."""
    return torch.optim.AdamW(list(groups), fused=device.type in ("cpu", "cuda"), **settings)


def guarded_step(optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of `optimizer`, unless a gradient is NaN or infinite: then nothing changes. Returns the gradients' norm.

    The fused optimizer decides on the device, so nobody waits.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm


class Average:
    """The exponential moving average of a network's weights."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self._names = [name for name, p in network.named_parameters() if p.requires_grad]
        self._values = [p.detach().clone() for p in self._parameters()]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(_local(self._values), _local(self._parameters()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with the averaged weights, for the length of the block."""
        kept = [p.detach().clone() for p in self._parameters()]
        self.copy_to_network()
        try:
            yield
        finally:
            self._fill(kept)

    def copy_to_network(self) -> None:
        self._fill(self._values)

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for module in self.network.modules():
            # A forward pass without a backward one leaves the whole weights of the outermost unit with each process.
            if (reshard := getattr(module, "reshard", None)) is not None:
                reshard()
        torch._foreach_copy_(_local(self._parameters()), _local(values))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._values, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def whole(self) -> dict[str, Tensor]:
        """The averaged weights by name on the CPU, put together from all processes, which must all ask."""
        return {name: _whole(value).cpu() for name, value in self.state_dict().items()}

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.network.parameters() if p.requires_grad]


def network_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by name, in this process's share; allocated even before the first step."""
    return {"network": get_model_state_dict(network), "optimizer": get_optimizer_state_dict(network, optimizer)}


def load_network_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_model_state_dict(network, state["network"])
    set_optimizer_state_dict(network, optimizer, state["optimizer"])


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of `network` on the CPU, put together from all processes, which must all ask."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=distributed.world() > 1)
    return cast(dict[str, Tensor], get_model_state_dict(network, options=options))


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
