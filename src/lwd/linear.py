"""Products with a transposed matrix, a b^T: linear maps, and all pairs of two sets of vectors.

PyTorch leaves float32 products on a CPU to MKL. oneDNN, which comes with PyTorch too and does its convolutions,
computes them at twice the rate on AMD's Zen 5, forward and backward (`docs/results/speed.md`; not measured on Intel's
processors, for which both libraries are made). Everything else, and everything on processors without AVX-512, is
computed as PyTorch does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

FEWEST_PRODUCTS = 2**22
"""Multiplications from which on oneDNN gains more than the call costs, some 20 µs."""

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(nn.Linear):
    """`torch.nn.Linear`, x W^T + b over the last axis of x [..., in], through `by_onednn` where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not onednn_is_faster(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return by_onednn(x.reshape(-1, self.in_features), self.weight, self.bias).view(*x.shape[:-1], -1)


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T [m, n] of a [m, k] and b [n, k]."""
    return by_onednn(a, b, None) if onednn_is_faster(a, b) else a @ b.T


def onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., k] times weight [n, k], transposed, is a product that oneDNN computes faster than MKL."""
    return (
        ONEDNN
        and AVX512
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() * len(weight) >= FEWEST_PRODUCTS
    )


@torch.library.custom_op("lwd::by_onednn", mutates_args=())
def by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b^T + bias [m, n] in float32 on a CPU, of a [m, k], b [n, k] and bias [n]; any strides, any derivative.

    An operator of its own, because the compiler would copy what it hands to oneDNN's own ones.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


@by_onednn.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(len(a), len(b))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (a, b), (of_a, of_b, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
    return (
        by_onednn(grad, b.T, None) if of_a else None,
        by_onednn(grad.T, a.T, None) if of_b else None,
        grad.sum(dim=0) if of_bias else None,
    )


by_onednn.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.lwd.by_onednn)
def _operations(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """For `torch.utils.flop_counter`: of the shapes of a and b."""
    return 2 * a.numel() * b[0]
