"""SemVAE (Semantic-First Diffusion): a variational autoencoder of patch features, the paper's semantic encoder.

It turns the 16 x 16 patch features of DINOv2-B (768 each) into 16 channels per position and back. Both halves are
transformers without positions, so any grid of patches will do.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lwd.encoders.composite import Posterior
from lwd.files import read_json, sha256_of, write_atomically, write_json
from lwd.linear import Linear
from lwd.randomness import stream

PUBLISHED_HEADS = 6
LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this range, as in diffusers, from which the published code takes its posterior."""

# Our names inside a block, and the published ones.
_RENAMES = (
    ("attention_norm.", "norm1."),
    ("attention.qkv.", "attn.in_proj_"),
    ("attention.output.", "attn.out_proj."),
    ("mlp_norm.", "norm2."),
)


@dataclass(frozen=True)
class SemVAEConfig:
    """Sizes of a SemVAE; the defaults are the published ones.

    Attributes:
        features: numbers per patch that are encoded.
        channels: numbers per patch of the latent.
        width, depth, heads: of the transformers, encoder and decoder alike.
    """

    features: int = 768
    channels: int = 16
    width: int = 768
    depth: int = 4
    heads: int = PUBLISHED_HEADS

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into heads={self.heads}")


class SemVAE(nn.Module):
    """The autoencoder; freshly initialised weights are drawn from torch's global generator.

    Args:
        posterior: what `transform` returns. The published extraction draws one ``"sample"`` of the posterior per
            image, so that is the default; ``"mean"`` is deterministic.
    """

    def __init__(self, config: SemVAEConfig | None = None, *, posterior: Posterior = "sample") -> None:
        super().__init__()
        if posterior not in get_args(Posterior):
            raise ValueError(f"posterior is 'sample' or 'mean', not {posterior!r}")
        self.config = config or SemVAEConfig()
        self.posterior = posterior
        c = self.config
        self.encoder = _Transformer(c.features, 2 * c.channels, c)
        self.decoder = _Transformer(c.channels, c.features, c)
        self.channels = c.channels
        self._file: dict[str, str | None] = {"source": None, "sha256": None}

    def moments(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each float32 [N, channels, h, w], of feature maps [N, F, h, w].

        Log-variances are clamped to `LOGVAR_RANGE`. Gradients flow.

        Raises:
            ValueError: maps of another number of features.
        """
        mean, logvar = self._run(self.encoder, maps, "feature maps", self.config.features).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def draw(self, mean: Tensor, logvar: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Latents from the posterior [N, channels, h, w]: its mean, or a sample, as `posterior` says.

        Args:
            seeds: one per image. Its noise is a function of its seed and shape only, drawn on the CPU, so it depends
                neither on the other images of the batch nor on the device.

        Raises:
            ValueError: samples are asked for without one seed per image.
        """
        if self.posterior == "mean":
            return mean
        if seeds is None or len(seeds) != len(mean):
            given = 0 if seeds is None else len(seeds)
            raise ValueError(
                f"posterior samples of {len(mean)} images need as many seeds, {given} are given: "
                "pass seeds= (for example the images' numbers), or make the SemVAE with posterior='mean'"
            )
        noise = [torch.randn(mean.shape[1:], generator=stream(int(seed), "semvae posterior")) for seed in seeds]
        return mean + (logvar / 2).exp() * torch.stack(noise).to(mean)

    @torch.no_grad()
    def transform(self, maps: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Feature maps [N, F, h, w] -> latents float32 [N, channels, h, w] on the model's device; see `draw`."""
        return self.draw(*self.moments(maps), seeds)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, channels, h, w] -> feature maps float32 [N, F, h, w]. Gradients flow."""
        return self._run(self.decoder, latents, "latents", self.config.channels)

    def forward(self, maps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step of training: the maps decoded from mean + deviation * `noise` [N, channels, h, w], mean, logvar."""
        mean, logvar = self.moments(maps)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar

    def describe(self) -> dict[str, Any]:
        """The encoder's entry in a manifest; source and sha256 are None unless the weights were read from a file."""
        sizes = {"channels": self.channels, "features": self.config.features, "heads": self.config.heads}
        return {"encoder": "semvae", **self._file, **sizes, "posterior": self.posterior}

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``model.safetensors`` and then ``config.json`` into `directory`, each atomically."""
        directory = Path(directory)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomically(directory / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
        write_json(directory / "config.json", {"encoder": "semvae", **asdict(self.config)})
        return directory

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        heads: int | None = None,
        posterior: Posterior = "sample",
        device: torch.device | str = "cpu",
    ) -> Self:
        """A trained SemVAE, float32 and in eval mode.

        Args:
            path: a directory that `save_pretrained` wrote, or a published checkpoint file (``.pt``): a training
                checkpoint with ``model_state_dict``, or the state dict by itself.
            heads: attention heads, the one size that a checkpoint file does not tell; 6 by default, as published.
                A directory knows its own.

        Raises:
            FileNotFoundError: nothing there, or a file is missing in the directory.
            ValueError: a damaged file, one that holds more than tensors (the message says how to convert it), or
                weights of another architecture (the names and shapes that differ are listed).
        """
        source, path = str(path), Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint file or directory {path}")
        weights = path / "model.safetensors" if path.is_dir() else path
        try:
            if path.is_dir():
                model = cls._with_weights(_read_config(path, heads), load_file(weights), str, posterior)
            else:
                state = _read_checkpoint(weights)
                model = cls.from_published(state, heads=heads or PUBLISHED_HEADS, posterior=posterior)
        except SafetensorError as error:
            raise ValueError(f"{weights} is damaged or truncated ({error}); copy it again") from error
        except ValueError as error:
            raise ValueError(f"cannot read {path} as a SemVAE: {error}") from error
        model._file = {"source": source, "sha256": sha256_of(weights)}
        return model.to(device)

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], *, heads: int = PUBLISHED_HEADS, posterior: Posterior = "sample"
    ) -> Self:
        """The published model from its state dict, whose tensors are copied; sizes other than `heads` are read off.

        Raises:
            ValueError: weights of another architecture; the names and shapes that differ are listed.
        """
        config = _sizes(state, heads)
        return cls._with_weights(config, state, lambda name: _published_name(name, config.depth), posterior)

    @classmethod
    def _with_weights(
        cls, config: SemVAEConfig, state: Mapping[str, Tensor], theirs: Callable[[str], str], posterior: Posterior
    ) -> Self:
        """A model with float32 copies of `state`, where our tensor n is called theirs(n); draws nothing random."""
        with torch.device("meta"):
            model = cls(config, posterior=posterior)
        expected = model.state_dict()
        _check_shapes(state, {theirs(name): value.shape for name, value in expected.items()})
        copies = {name: state[theirs(name)].detach().to("cpu", torch.float32, copy=True) for name in expected}
        model.load_state_dict(copies, assign=True)
        return model.eval()

    def _run(self, network: _Transformer, x: Tensor, what: str, channels: int) -> Tensor:
        """`network` on the positions of `x` [N, `channels`, h, w], float32 [N, C', h, w] on the model's device."""
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{what} have shape {tuple(x.shape)}, this SemVAE needs [N, {channels}, h, w]")
        tokens = x.to(network.input.weight).flatten(2).transpose(1, 2)
        return network(tokens).float().transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()


class _Transformer(nn.Module):
    """Linear, pre-norm transformer blocks, LayerNorm, Linear; on tokens [N, L, inputs] -> [N, L, outputs]."""

    def __init__(self, inputs: int, outputs: int, config: SemVAEConfig) -> None:
        super().__init__()
        self.input = Linear(inputs, config.width)
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.output = Linear(config.width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.input(tokens)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)
        # As nn.MultiheadAttention begins, which the published model is trained with.
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# --- reading weights ---------------------------------------------------------------------------------------------


def _published_name(ours: str, depth: int) -> str:
    """The published name of a tensor; there the layers of each half are numbered from 0."""
    half, layer, rest = ours.split(".", 2)
    if layer != "blocks":
        return f"{half}.{dict(input=0, norm=depth + 1, output=depth + 2)[layer]}.{rest}"
    block, rest = rest.split(".", 1)
    for name, published in _RENAMES:
        rest = published + rest.removeprefix(name) if rest.startswith(name) else rest
    return f"{half}.{int(block) + 1}.{rest}"


def _sizes(state: Mapping[str, Tensor], heads: int) -> SemVAEConfig:
    """The sizes that a published state dict has; the published ones where it is of another architecture altogether."""
    depth = len([key for key in state if re.fullmatch(r"encoder\.\d+\.attn\.in_proj_weight", key)])
    into, out = state.get("encoder.0.weight"), state.get("decoder.0.weight")
    if not depth or into is None or out is None or into.ndim != 2 or out.ndim != 2:
        return SemVAEConfig()
    width, features = into.shape
    if width % heads:
        raise ValueError(f"its width of {width} does not divide into {heads} heads; pass heads=")
    return SemVAEConfig(features=features, channels=out.shape[1], width=width, depth=depth, heads=heads)


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """ValueError that lists the tensors, with shapes, that are missing, unknown or of another shape."""

    def listed(names: Sequence[str], most: int = 8) -> str:
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

    findings = {
        "missing": [f"{name} {tuple(shape)}" for name, shape in expected.items() if name not in state],
        "unexpected": [f"{name} {tuple(value.shape)}" for name, value in state.items() if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
    }
    if any(findings.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in findings.items() if names)
        raise ValueError(f"the weights are of another architecture. Tensors {found}")


def _read_config(directory: Path, heads: int | None) -> SemVAEConfig:
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not a saved SemVAE: it has no {name}")
    settings = read_json(directory / "config.json")
    if not isinstance(settings, dict) or settings.pop("encoder", None) != "semvae":
        raise ValueError("its config.json is not that of a SemVAE")
    try:
        config = SemVAEConfig(**settings)
    except TypeError as error:
        raise ValueError(f"its config.json has other settings: {error}") from error
    if heads not in (None, config.heads):
        raise ValueError(f"heads={heads} was asked for, but its config.json says {config.heads}")
    return config


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a published checkpoint, by itself or under ``model_state_dict``, without wrappers' prefixes."""
    if path.suffix == ".safetensors":
        raise ValueError("give the directory that holds it and its config.json")
    try:
        # Mapped, because most of a training checkpoint is the optimizer's state, which is not read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"it is damaged, or holds more than tensors and plain values ({str(error).splitlines()[0]}). If you trust "
            f"where it comes from, keep the weights alone: torch.save(torch.load({path.name!r}, weights_only=False)"
            "['model_state_dict'], 'semvae.pt'), and give that file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"it is truncated or not a checkpoint ({error}); copy or download it again") from error
    state = content.get("model_state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds no weights: neither model_state_dict nor a plain state dict of tensors")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in state.items()}
