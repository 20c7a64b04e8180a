"""LightningDiT (Yao & Wang 2025) with one clock per group, as in Semantic-First Diffusion (arXiv 2512.04926).

A transformer over the patches of the composite latent: RMSNorm, attention with normalised queries and keys and 2-D
rotary positions, SwiGLU, and AdaLN modulation from time and class. Modules and parameters carry the reference's names.

Precision: under autocast the residual stream, norms, rotation and time embedding stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lwd.backbones.config import LightningDiTConfig
from lwd.linear import Linear

EPS = 1e-6
TIME_FREQUENCIES = 256


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the precision of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPS).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with per-head RMSNorm and rotation of queries and keys."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.qkv = Linear(width, 3 * width)
        self.q_norm, self.k_norm = (RMSNorm(width // self.heads) if config.qk_norm else nn.Identity() for _ in range(2))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q.float()), cos, sin), rotate(self.k_norm(k.float()), cos, sin)
        out = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), with W1 and W2 in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and SwiGLU, each normalised, modulated and gated by the condition (AdaLN-zero)."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(config)
        self.mlp = SwiGLU(width, config.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # In the precision of x, because 1 + scale in bfloat16 would round scale to 8 bits behind the 1.
        modulation = self.adaLN_modulation(condition)[:, None].to(x.dtype).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn, cos, sin)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """Modulated norm and projection to the patch's velocities."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = RMSNorm(width)
        self.linear = Linear(width, config.patch_size**2 * config.spec.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].to(x.dtype).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimeEmbedder(nn.Module):
    """A time in [0, 1], unscaled, to a vector through cosines and sines of geometric frequencies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, frequencies: Tensor) -> Tensor:
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LightningDiT(nn.Module):
    """The denoiser: (z, t, labels) -> local velocities of all groups.

    Attributes:
        config, spec: sizes and latent groups.
        null_label: the label that means "no class"; label dropout is the training loop's, so this is deterministic.
        recompute: blocks, from the first, whose activations training computes again instead of keeping them.
    """

    positions: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor
    time_frequencies: Tensor

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        self.config, self.spec, self.null_label = config, config.spec, config.num_classes
        self.recompute = 0
        width, patch = config.hidden_size, config.patch_size
        self.x_embedder = nn.Conv2d(self.spec.channels, width, patch, stride=patch)
        self.t_embedders = nn.ModuleList(TimeEmbedder(w) for w in config.clock_widths)
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.repa_projector: nn.Sequential | None = None
        if config.repa_depth is not None:
            inner = config.repa_projector_dim
            self.repa_projector = nn.Sequential(
                Linear(width, inner),
                nn.SiLU(),
                Linear(inner, inner),
                nn.SiLU(),
                Linear(inner, config.repa_dim),
            )
        self.reset_parameters()

    @overload
    def forward(self, z: Tensor, t: Tensor, labels: Tensor, return_projection: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, z: Tensor, t: Tensor, labels: Tensor, return_projection: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, z: Tensor, t: Tensor, labels: Tensor, return_projection: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Local velocities at state `z`, and on demand the REPA projection; both in the dtype of `z`.

        Args:
            z: [B, C, H, W], normalised latents.
            t: local times [B, G].
            labels: [B], 0 ... num_classes (the last one is `null_label`).
            return_projection: also return the REPA projection [B, N, repa_dim] of the tokens after `repa_depth`.

        Returns:
            Velocity [B, C, H, W], or (velocity, projection).

        Raises:
            ValueError: shapes that do not fit the configuration, or labels out of range (checked on the CPU only,
                where looking costs no synchronisation).
        """
        if not torch.compiler.is_compiling():
            self._check(z, t, labels, return_projection)
        # Contiguous, or all that follows would keep the convolution's layout, in which a token's channels lie apart.
        x = self.x_embedder(z.to(self.x_embedder.weight.dtype)).flatten(2).transpose(1, 2).contiguous() + self.positions
        condition = self._time_condition(t) + self.y_embedder(labels)
        projection = None
        for depth, block in enumerate(self.blocks, start=1):
            if depth <= self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, self.rotary_cos, self.rotary_sin, use_reentrant=False)
            else:
                x = block(x, condition, self.rotary_cos, self.rotary_sin)
            if return_projection and depth == self.config.repa_depth:
                assert self.repa_projector is not None
                projection = self.repa_projector(x)
        velocity = self._unpatch(self.final_layer(x, condition)).to(z.dtype)
        return velocity if projection is None else (velocity, projection.to(z.dtype))

    def _time_condition(self, t: Tensor) -> Tensor:
        # Clock k reads column k; a single clock the last group's, which is the global time (Eq. 17). The reference
        # puts the semantic embedding first, so the groups come in reverse.
        clocks = t[:, -len(self.t_embedders) :].to(self.time_frequencies.dtype).unbind(dim=1)
        # The meta device, on which operations are counted without computing, has no autocast to turn off.
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):
            embeddings = [
                embed(clock, self.time_frequencies) for embed, clock in zip(self.t_embedders, clocks, strict=True)
            ]
        return torch.cat(embeddings[::-1], dim=-1)

    def _unpatch(self, x: Tensor) -> Tensor:
        """[B, N, p p C] -> [B, C, H, W]; within a token, channels vary fastest."""
        patch, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = x.view(len(x), side, side, patch, patch, self.spec.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.spec.channels, side * patch, side * patch)

    def _check(self, z: Tensor, t: Tensor, labels: Tensor, return_projection: bool) -> None:
        self.spec.check(z, "z")
        side = self.config.input_size
        if z.shape[2:] != (side, side):
            raise ValueError(f"the latent grid is {tuple(z.shape[2:])}, this network is built for ({side}, {side})")
        if t.shape != (len(z), len(self.spec)):
            raise ValueError(f"local times have shape {tuple(t.shape)}, expected [{len(z)}, {len(self.spec)}]")
        if labels.shape != (len(z),) or labels.is_floating_point():
            raise ValueError(f"labels must be integers [{len(z)}], not {labels.dtype} of shape {tuple(labels.shape)}")
        if labels.device.type == "cpu" and len(labels) and not 0 <= labels.min() <= labels.max() <= self.null_label:
            raise ValueError(
                f"labels run from {labels.min()} to {labels.max()}; this network knows the classes 0 to "
                f"{self.null_label - 1}, and {self.null_label} for no class"
            )
        if return_projection and self.repa_projector is None:
            raise ValueError("this network has no REPA projector: configure it with repa_depth, or train with repa=0")

    def reset_parameters(self) -> None:
        """Draw the weights and compute the tables, also after ``to_empty`` of a network made on the meta device.

        As the reference: Xavier for linear maps, 0.02 for embeddings and time, zero for modulations and output.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.weight.view(self.config.hidden_size, -1))
        assert self.x_embedder.bias is not None
        nn.init.zeros_(self.x_embedder.bias)
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        for layer in self.t_embedders.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        modulations = [module[1] for name, module in self.named_modules() if name.endswith("adaLN_modulation")]
        for layer in (*modulations, self.final_layer.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self._compute_tables()

    def _compute_tables(self) -> None:
        config = self.config
        side = config.input_size // config.patch_size
        cos, sin = rotary_tables(side, config.hidden_size // config.num_heads)
        tables = {
            "positions": sincos_positions(side, config.hidden_size),
            "rotary_cos": cos,
            "rotary_sin": sin,
            "time_frequencies": time_frequencies(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(self.x_embedder.weight.device), persistent=False)

    @classmethod
    def from_weights(cls, config: LightningDiTConfig, weights: Mapping[str, Tensor]) -> LightningDiT:
        """A network on the CPU with float32 copies of `weights`, in eval mode; draws no random number.

        Raises:
            ValueError: tensors missing, unknown or of another shape than `config` asks for.
        """
        with torch.device("meta"):
            model = cls(config)
        check_shapes(weights, {name: value.shape for name, value in model.state_dict().items()})
        copies = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in weights.items()}
        model.load_state_dict(copies, assign=True)
        model._compute_tables()
        return model.eval()

    @classmethod
    def from_sfd(cls, source: str | Path | Mapping[str, Tensor], **overrides: Any) -> LightningDiT:
        """A network with the weights of an SFD or LightningDiT checkpoint; see `lwd.backbones.sfd.load_sfd`."""
        from lwd.backbones.sfd import load_sfd

        return load_sfd(source, **overrides)

    def save_pretrained(self, directory: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into `directory`, each atomically.

        Args:
            weights: the state dict to write, where the network's own is spread over processes.
        """
        from lwd.backbones.pretrained import save_pretrained

        return save_pretrained(self, directory, weights)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> LightningDiT:
        """Read what `save_pretrained` wrote: a directory, or ``"user/name"`` on the Hugging Face hub."""
        from lwd.backbones.pretrained import load_pretrained

        return load_pretrained(source)


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """ValueError that lists the names that are missing, unknown or of another shape."""
    wrong = [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    findings = (
        ("missing", sorted(expected.keys() - weights.keys())),
        ("unknown", sorted(weights.keys() - expected.keys())),
        ("of another shape", wrong),
    )
    if any(names for _, names in findings):
        raise ValueError("; ".join(f"{what}: {_some(names)}" for what, names in findings if names))


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of [B, heads, N, d]."""
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[2] <= 64):
        # The fused CPU kernel multiplies bfloat16 no faster than float32, and is made for long sequences
        # (benchmarks/short_attention.py).
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x [B, heads, N, d] by the angles behind cos and sin [N, d]."""
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def time_frequencies() -> Tensor:
    """The frequencies 10000^(-k / 128) of the time embedding's 128 cosines and sines."""
    half = TIME_FREQUENCIES // 2
    return torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device="cpu") / half)


def rotary_tables(side: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [side^2, head_width]: half of the channels turn with the row, half with the column."""
    half = head_width // 2
    frequencies = 10_000 ** -(torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
    angles = torch.outer(torch.arange(side, dtype=torch.float32, device="cpu"), frequencies).repeat_interleave(2, dim=1)
    rows = angles[:, None].expand(side, side, half)
    columns = angles[None].expand(side, side, half)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return grid.cos(), grid.sin()


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed positions [1, side^2, width] (DiT): half of the channels encode the column, half the row."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64, device="cpu"), frequencies)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = one_axis[None].expand(side, side, width // 2)
    rows = one_axis[:, None].expand(side, side, width // 2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].float()
