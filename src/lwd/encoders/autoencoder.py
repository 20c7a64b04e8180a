"""Image autoencoders as texture encoders: LDM f16d32, VA-VAE, and whatever diffusers' `AutoencoderKL` can express.

Latents are as the network gives them: no scaling factor is applied, for statistics per channel normalise them later.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from lwd.encoders.composite import Posterior
from lwd.encoders.ldm_keys import OTHERS, is_ldm, ldm_config, to_diffusers
from lwd.files import read_json, sha256_of, write_atomically, write_json

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of the posterior's log-variance, as in LDM."""


_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""The files in which diffusers looks for weights, in its order."""


class ImageAutoencoder(nn.Module):
    """A KL-regularised autoencoder of images.

    Args:
        network: diffusers' `AutoencoderKL`.
        source, sha256: where its weights came from, and their hash; for manifests.
        posterior: whether `encode` draws a sample from the posterior, as SFD's extraction does, or gives its mean.

    Attributes:
        channels: of the latents.
        downsampling: pixels per position and side.
    """

    def __init__(self, network: nn.Module, *, source: str, sha256: str, posterior: Posterior = "sample") -> None:
        super().__init__()
        if posterior not in get_args(Posterior):
            raise ValueError(f"posterior must be one of {', '.join(get_args(Posterior))}, not {posterior!r}")
        self.network: Any = network.eval().requires_grad_(False)
        self.source, self.sha256, self.posterior = source, sha256, posterior
        config: Any = network.config
        self.channels = int(config.latent_channels)
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        posterior: Posterior = "sample",
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> Self:
        """The autoencoder in `source`.

        Args:
            source: a checkpoint in LDM's or VA-VAE's names (.ckpt, .pt, .pth, .safetensors; its sizes are read off the
                weights), a directory of diffusers (``vae/`` in it is found too), or a name on the Hugging Face hub.
            posterior: what `encode` gives.
            precision: of the network; latents are float32 whatever it is.

        Raises:
            ImportError: diffusers is missing.
            FileNotFoundError: nothing there, or a name that cannot be fetched from the hub.
            ValueError: a damaged file, or weights of another architecture (the keys that differ are named).
        """
        path = Path(source).expanduser()
        if path.is_file():
            network, weights = _from_checkpoint(path), path
        else:
            network, weights = _from_directory(path if path.is_dir() else _download(str(source)))
        found = cls(network, source=str(source), sha256=sha256_of(weights), posterior=posterior)
        return found.to(device, precision)

    @classmethod
    def from_description(cls, description: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """The autoencoder that `describe` describes; ValueError when its weights have changed since."""
        found = cls.load(description["source"], posterior=description["posterior"], device=device)
        if found.sha256 != description["sha256"]:
            raise ValueError(
                f"{description['source']} has sha256 {found.sha256[:12]}..., but the latents were made with "
                f"{description['sha256'][:12]}...; put the former weights back"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """The encoder's entry in a manifest."""
        return {
            "encoder": "autoencoder",
            "source": self.source,
            "sha256": self.sha256,
            "channels": self.channels,
            "downsampling": self.downsampling,
            "posterior": self.posterior,
        }

    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, C, h, w].

        Args:
            seeds: of the posterior samples, one per image. An image's sample depends on its seed alone, not on its
                batch or the device.

        Raises:
            ValueError: images of another kind or of sides that the downsampling does not divide; samples without seeds.
        """
        mean, log_variance = self.moments(images)
        if self.posterior == "mean":
            return mean
        if seeds is None or len(seeds) != len(images):
            raise ValueError(f"posterior samples of {len(images)} images need as many seeds; or take the mean")
        noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        return mean + (0.5 * log_variance).exp() * torch.stack(noise).to(mean)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, float32 [N, C, h, w] each; raises as `encode` does."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.network.config.in_channels:
            channels = self.network.config.in_channels
            raise ValueError(f"images must be uint8 [N, {channels}, H, W], not {images.dtype} {list(images.shape)}")
        if any(side % self.downsampling for side in images.shape[2:]):
            raise ValueError(f"images of {list(images.shape[2:])} pixels cannot be downsampled by {self.downsampling}")
        x = images.to(self.network.device).float() / 127.5 - 1
        posterior = self.network.encode(x.to(self.network.dtype)).latent_dist
        mean, log_variance = posterior.parameters.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 32) -> Tensor:
        """[N, C, h, w] -> uint8 [N, 3, H, W]: clamp(127.5 x + 128, 0, 255), truncated, as SFD's public code has it.

        Args:
            batch: images at a time, to bound the memory. What is decoded together may change the last bits of the
                network's sums, and so a few values in ten thousand by one level.

        Raises:
            ValueError: latents of another shape; a batch of no images.
        """
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, not {batch}")
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be [N, {self.channels}, h, w], not {list(latents.shape)}")
        parts = (
            self.network.decode(part.to(self.network.device, self.network.dtype)).sample
            for part in latents.split(batch)
        )
        images = [(127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8) for x in parts]
        return torch.cat(images)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the network as diffusers lays it out, in its own precision, so that a conversion can be shared."""
        from safetensors.torch import save_file

        directory = Path(directory)
        state = {name: value.cpu().contiguous() for name, value in self.network.state_dict().items()}
        write_atomically(directory / _WEIGHTS[0], lambda path: save_file(state, path, {"format": "pt"}))
        config = json.loads(self.network.to_json_string())
        config.pop("_name_or_path", None)  # where it lay on this machine is nobody's business
        write_json(directory / "config.json", config)
        return directory


def _from_directory(folder: Path) -> tuple[nn.Module, Path]:
    """diffusers' autoencoder in `folder` or its ``vae/``, and the very file its weights came from."""
    folder = folder / "vae" if (folder / "vae" / "config.json").exists() else folder
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if not (folder / "config.json").exists() or weights is None:
        raise FileNotFoundError(
            f"{folder} holds no autoencoder of diffusers (config.json with {' or '.join(_WEIGHTS)} beside it)"
        )
    kind = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ValueError(f"{folder} holds the {kind} of diffusers, not its AutoencoderKL")
    safe = weights.suffix == ".safetensors"
    try:
        network, notes = _autoencoder_kl().from_pretrained(
            str(folder), output_loading_info=True, low_cpu_mem_usage=False, use_safetensors=safe
        )
    except (RuntimeError, OSError) as error:
        shapes = re.findall(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", str(error))
        _require_all(str(folder), [], [], [f"{key} {found} instead of {own}" for key, found, own in shapes])
        raise ValueError(f"{weights} cannot be read ({error}); copy or download it again") from error
    _require_all(str(folder), notes["missing_keys"], notes["unexpected_keys"], notes.get("mismatched_keys", []))
    return network, weights


def _from_checkpoint(path: Path) -> nn.Module:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start not in (b"PK", b"\x80\x02"):  # a zip archive, or a pickle as torch wrote them before
            raise ValueError(f"{path} is no checkpoint: it begins with {start!r}; download it again") from error
        raise ValueError(
            f"{path} holds more than tensors, which is not read for safety. If you trust where it came from, keep "
            "its weights alone: torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({str(error) or type(error).__name__}); copy or download it again"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor) and not OTHERS.match(key)}
    if not is_ldm(state):
        held = ", ".join(list(state)[:4]) or "no tensors"
        raise ValueError(
            f"{path} holds no autoencoder in LDM's names (encoder.down.0 ...), but {held}; give the directory of an "
            "autoencoder of diffusers, or convert it"
        )
    try:
        network = _autoencoder_kl()(**ldm_config(state), norm_num_groups=32, sample_size=256)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    converted, own = to_diffusers(state), network.state_dict()
    shapes = [
        f"{key} {list(converted[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & converted.keys()
        if converted[key].shape != own[key].shape
    ]
    _require_all(str(path), own.keys() - converted.keys(), converted.keys() - own.keys(), shapes)
    network.load_state_dict({key: value.float() for key, value in converted.items()})
    return network


def _require_all(where: str, missing: Any, unexpected: Any, shapes: Any) -> None:
    lists = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": sorted(map(str, shapes))}
    told = [f"{len(keys)} {kind}: {', '.join(keys[:8])}" for kind, keys in lists.items() if keys]
    if told:
        raise ValueError(f"{where} holds weights of another architecture; {'; '.join(told)}")


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"there is no checkpoint and no directory {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError('loading from the hub needs an extra: pip install "lwd[encoders]"') from error
    try:
        # By their exact names: a star matches in subfolders too, and would fetch all of a pipeline.
        wanted = [folder + file for folder in ("", "vae/") for file in ("config.json", _WEIGHTS[0])]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise FileNotFoundError(
            f"there is no file or directory {name}, and it cannot be fetched from the Hugging Face hub ({error}); "
            "download it where there is a network, and give its path"
        ) from error


def _autoencoder_kl() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError('image autoencoders need an extra: pip install "lwd[encoders]"') from error
    return AutoencoderKL
