"""What a network costs, on paper: operations, memory, hours of a card.

Operations are counted exactly (2 per multiply-add, matrix products and attention only, as
`torch.utils.flop_counter` does); training is three times the forward pass. Memory is a count of what has to be held:
see `activation_bytes` for how good it is. Hours follow from operations and a card's stated utilisation, nothing else:
data loading, logging and sampling are not in them, and small networks reach far less of a card's peak than is stated
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lwd.backbones import LightningDiTConfig, lightningdit_config
from lwd.backbones.lightningdit import TIME_FREQUENCIES
from lwd.latents import IMAGENET_SPEC

if TYPE_CHECKING:
    from lwd.compute import Precision

TRAINING_FACTOR = 3
"""Operations of a training step over those of its forward pass: the backward pass has two products for each one."""

GIB = 2**30

STATE_BYTES = 20
"""Per parameter, in float32: weight, gradient, two moments of AdamW, moving average."""

FREE_SHARE = 0.1
"""Share of a card's memory left to the CUDA context, libraries' workspaces and fragmentation."""


def token_count(config: LightningDiTConfig) -> int:
    """Length of the sequence of one image."""
    return (config.input_size // config.patch_size) ** 2


def block_flops(config: LightningDiTConfig, tokens: int) -> int:
    """Operations of one block for one image, forward."""
    width = config.hidden_size
    per_token = 4 * width**2 + 3 * width * config.mlp_hidden + 2 * tokens * width
    return 2 * (tokens * per_token + 6 * width**2)


def _projector_weights(config: LightningDiTConfig) -> int:
    inner = config.repa_projector_dim
    return config.hidden_size * inner + inner**2 + inner * config.repa_dim


def forward_flops(config: LightningDiTConfig, tokens: int | None = None, *, projector: bool = False) -> int:
    """Operations of the network for one image, 2 per multiply-add.

    Args:
        tokens: length of the sequence, if another than the configuration's.
        projector: count the REPA projector too, which runs in training only.
    """
    n = token_count(config) if tokens is None else tokens
    width, patch = config.hidden_size, config.patch_size**2 * config.spec.channels
    clocks = sum(TIME_FREQUENCIES * w + w**2 for w in config.clock_widths)
    rest = clocks + 2 * n * patch * width + 2 * width**2 + (n * _projector_weights(config) if projector else 0)
    return config.depth * block_flops(config, n) + 2 * rest


def parameter_count(config: LightningDiTConfig, *, projector: bool = True) -> int:
    """Trainable parameters; fixed positions are none."""
    width, hidden, patch = config.hidden_size, config.mlp_hidden, config.patch_size**2 * config.spec.channels
    head_norms = 2 * width // config.num_heads if config.qk_norm else 0
    attention = 4 * width**2 + 4 * width + head_norms
    swiglu = 3 * width * hidden + 2 * hidden + width
    block = attention + swiglu + 6 * width**2 + 6 * width + 2 * width
    clocks = sum(TIME_FREQUENCIES * w + w + w**2 + w for w in config.clock_widths)
    final = patch * width + patch + 2 * width**2 + 2 * width + width
    total = config.depth * block + clocks + final + (config.num_classes + 1) * width + patch * width + width
    if projector and config.repa_depth is not None:
        total += _projector_weights(config) + 2 * config.repa_projector_dim + config.repa_dim
    return total


def activation_bytes(
    config: LightningDiTConfig, precision: Precision = "bf16", *, projector: bool = False, recompute: int = 0
) -> int:
    """Bytes per image that the forward pass keeps for the backward one, without compilation.

    With N tokens, width D, SwiGLU hidden width M, H heads, and c bytes per value of a matrix product (2 for bf16), a
    block keeps N D (16 + 10 c [+ 8 for bf16]) + 4 c N M + 4 N H bytes:

        float32, 16 ND      the residual stream and the normalised input, before attention and before SwiGLU
        10 c ND             inputs of the two branches, q k v, rotated q and k, attention's output and its projection,
                            output of the SwiGLU
        8 ND, bf16 only     float32 copies of q and k, for their norm
        4 c NM              gate, value, silu(gate), their product
        4 NH                logarithms of attention's denominators

    It assumes a fused RMSNorm and attention that neither stores its matrix nor copies its output, as PyTorch has them
    on CUDA. On the CPU it was compared with the bytes that autograd keeps: those are (16 + c) N D a block more (the
    norm there keeps x / rms(x) as well, attention copies its output); with that added the two agree to 2 %
    (`tests/test_recipes.py`). It was not measured on a GPU. A step's temporaries come on top. A compiled network
    recomputes most of what is not a matrix product and takes less.

    Args:
        projector: REPA is trained.
        recompute: blocks, from the first, that keep their input only and are run again in the backward pass.

    Raises:
        ValueError: `recompute` is not a number of blocks that the network has.
    """
    if not 0 <= recompute <= config.depth:
        raise ValueError(f"recompute {recompute} of {config.depth} blocks: choose 0 to {config.depth}")
    n, width, heads = token_count(config), config.hidden_size, config.num_heads
    c = 2 if precision == "bf16" else 4
    copies = 8 if precision == "bf16" else 0
    block = n * width * (16 + 10 * c + copies) + 4 * c * n * config.mlp_hidden + 4 * n * heads
    # While the first blocks are run again, one at a time, the last ones are done with.
    kept = recompute * 4 * n * width + max(config.depth - recompute, 1) * block
    # The final layer's input, its normalised form and the product's input; the latents.
    kept += n * width * (8 + c) + 4 * config.spec.channels * config.input_size**2
    if projector:
        # A bf16 copy of the tokens, both hidden layers before and after SiLU; projection and features in float32.
        kept += n * ((c * width if copies else 0) + 4 * c * config.repa_projector_dim + 8 * config.repa_dim)
    return kept


def state_bytes(parameters: int, precision: Precision = "bf16") -> int:
    """Float32 weights, gradients, two moments of AdamW and the moving average; bf16 copies of the weights under bf16.

    An upper bound: the copies are freed while gradients come into being. DDP adds 4 bytes a parameter where gradients
    are not views of its buckets; FSDP divides everything but the copies by the number of processes.
    """
    return parameters * (STATE_BYTES + (2 if precision == "bf16" else 0))


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        peak: dense bf16 operations per second that its maker states.
        memory: bytes.
        utilisation: share of `peak` that training is taken to reach (model FLOP utilisation).
    """

    name: str
    peak: float
    memory: int
    utilisation: float

    def hours(self, operations: float) -> float:
        return operations / (self.peak * self.utilisation) / 3600


PAPER_IMAGES_PER_SECOND = 4.6 * 256 / 2
"""Per B200: 4.6 steps of 256 images a second on two of them (Appendix B), with the XL."""

_XL = lightningdit_config("XL", IMAGENET_SPEC, input_size=16, num_classes=1000, repa_depth=2)

H100 = Card("H100", 989e12, 80 * GIB, 0.30)
"""SXM. The utilisation is an assumption, not a measurement."""

B200 = Card(
    "B200",
    2250e12,
    180 * GIB,
    PAPER_IMAGES_PER_SECOND * TRAINING_FACTOR * forward_flops(_XL, projector=True) / 2250e12,
)
"""The utilisation is the paper's own: 19 %."""

RTX4090 = Card("RTX 4090", 165e12, 24 * GIB, 0.40)
"""The utilisation is an assumption, not a measurement."""


def peak_of(device: str) -> float | None:
    """Operations per second that the maker states for the GPU called `device`, if it is one of the cards above."""
    # An H200 is an H100 with more memory.
    named = {"H100": H100, "H200": H100, "B200": B200, "4090": RTX4090}
    return next((card.peak for name, card in named.items() if name in device), None)
