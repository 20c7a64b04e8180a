"""Encoders by name, as commands and manifests give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lwd.compute import Precision
from lwd.encoders.composite import (
    CompositeEncoder,
    FeatureNetwork,
    GroupEncoder,
    Posterior,
    ProjectedFeatures,
    Projection,
    SharedFeatures,
)
from lwd.encoders.efficientnet import EfficientNetMaps
from lwd.encoders.pca import PCA
from lwd.encoders.pixels import PixelPatches
from lwd.latents import LatentSpec, Normalization


class Decoder(Protocol):
    """Latents of the texture group back to images."""

    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w], not normalised -> uint8 [N, c, H, W]."""
        ...


def texture_encoder(name: str, *, posterior: Posterior = "sample", device: torch.device | str = "cpu") -> GroupEncoder:
    """The texture encoder called `name`.

    Args:
        name: ``pixels:8`` for patches of 8 x 8 pixels; else an image autoencoder: a checkpoint of LDM or VA-VAE
            (.ckpt, .pt, .safetensors), a directory of diffusers, or a name on the Hugging Face hub.
        posterior: whether an autoencoder's latents are samples or means.
    """
    if name.startswith("pixels"):
        return PixelPatches(_numbers(name, "pixels:PATCH", 1)[0])
    from lwd.encoders.autoencoder import ImageAutoencoder

    return ImageAutoencoder.load(name, posterior=posterior, device=device)


def feature_network(
    name: str,
    *,
    image_size: int | None = None,
    grid: int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> FeatureNetwork:
    """The feature network called `name`.

    Args:
        name: ``efficientnet`` or ``efficientnet:BLOCK:SIZE``; ``untrained`` or ``untrained:BLOCK:SIZE`` for the same
            network with random weights, as a baseline; else a DINOv2 or CLIP: ``dinov2-s``, ``dinov2-b``,
            ``dinov2-l`` (with registers), ``clip-b``, ``clip-l``, a directory of transformers, a name on the hub, or
            DINOv2's own .pth.
        image_size: pixels per side that images are resized to; the network's own by default.
        grid: positions per side to which the maps are resized where the network's own grid is another.
    """
    kind = name.split(":")[0]
    if kind in ("efficientnet", "untrained"):
        block, size = _numbers(name, f"{kind}:BLOCK:SIZE", 2) if ":" in name else (10, 64)
        return EfficientNetMaps(block, size, device, untrained=0 if kind == "untrained" else None)
    from lwd.encoders.foundation import FoundationFeatures

    return FoundationFeatures.load(name, image_size=image_size, grid=grid, device=device, precision=precision)


def projection(name: str, *, posterior: Posterior | None = None, device: torch.device | str = "cpu") -> Projection:
    """A fitted projection: ``semvae:PATH`` or ``pca:PATH``. (``pca:CHANNELS`` is one that is still to be fitted.)"""
    kind, _, path = name.partition(":")
    if kind == "pca" and path:
        return PCA.load(path)
    if kind == "semvae" and path:
        from lwd.encoders.semvae import SemVAE

        settings: Any = {} if posterior is None else {"posterior": posterior}
        return SemVAE.load(path, device=device, **settings)
    raise ValueError(f"unknown projection {name!r}; there are pca:CHANNELS, pca:FILE and semvae:FILE")


def decoder(description: Mapping[str, Any], device: torch.device | str = "cpu") -> Decoder:
    """What decodes the texture latents of the encoder that a manifest describes.

    Raises:
        ValueError: an encoder that has no decoder; weights that are not those the latents were made with.
    """
    kind = description.get("encoder")
    if kind == "pixels":
        return PixelPatches(description["patch"])
    if kind == "autoencoder":
        from lwd.encoders.autoencoder import ImageAutoencoder

        return ImageAutoencoder.from_description(dict(description), device)
    raise ValueError(f"latents of {dict(description) or 'an unknown encoder'} cannot be decoded to images")


def decode_texture(
    latents: Tensor, spec: LatentSpec, normalization: Normalization, encoders: Mapping[str, Any]
) -> Tensor:
    """Images uint8 [N, c, H, W], on the device of the latents, from normalised composite latents.

    Raises:
        ValueError: the texture group's encoder is one that cannot be decoded.
    """
    texture = spec.split(normalization.denormalize(latents.float()))[0]
    return _decoder(json.dumps(encoders.get(spec.names[0], {})), latents.device).decode(texture)


@lru_cache(maxsize=2)
def _decoder(description: str, device: torch.device) -> Decoder:
    return decoder(json.loads(description), device)


def encoder_of(
    manifest: Mapping[str, Any],
    directory: Path,
    *,
    device: torch.device | str = "cpu",
) -> CompositeEncoder:
    """The encoder that made the latent set in `directory`: to encode other images the same way.

    Groups that were added to the set (`lwd.data.extend.add_group`) are not among its groups.

    Raises:
        ValueError: a group whose encoder is not one of ours; weights that have changed since.
    """
    networks: dict[str, SharedFeatures] = {}

    def network(description: Mapping[str, Any]) -> SharedFeatures:
        key = json.dumps(description, sort_keys=True)
        if key not in networks:
            networks[key] = SharedFeatures(_network_of(description, device))
        return networks[key]

    groups: dict[str, GroupEncoder] = {}
    for group in manifest["groups"]:
        name, description = group["name"], manifest["encoders"].get(group["name"], {})
        kind = description.get("encoder")
        if description.get("added"):
            continue
        if kind == "pixels":
            groups[name] = PixelPatches(description["patch"])
        elif kind == "autoencoder":
            groups[name] = texture_encoder(description["source"], posterior=description["posterior"], device=device)
        elif kind == "pca" and "network" in description:
            groups[name] = ProjectedFeatures(network(description["network"]), PCA.load(default_pca_path(directory)))
        elif kind == "semvae":
            head = projection(f"semvae:{description['source']}", posterior=description["posterior"], device=device)
            groups[name] = ProjectedFeatures(network(description["network"]), head)
        else:
            raise ValueError(
                f"cannot encode group {name!r} again: it was made by {description or 'an unknown encoder'}"
            )
    features = manifest["encoders"].get("features")
    weights = {group["name"]: group["weight"] for group in manifest["groups"] if group["name"] in groups}
    encoder = CompositeEncoder(groups, weights=weights, repa=None if features is None else network(features))
    for name, description in encoder.describe().items():
        if description != manifest["encoders"][name]:
            raise ValueError(
                f"the encoder of {name!r} is no longer the one that made {directory}: {description} now, "
                f"{manifest['encoders'][name]} then"
            )
    return encoder


def _network_of(description: Mapping[str, Any], device: torch.device | str) -> FeatureNetwork:
    if description["network"].startswith("efficientnet-lite0"):
        return EfficientNetMaps(description["block"], description["size"], device, untrained=description.get("seed"))
    size, grid = description["image_size"], description["grid"][0]
    precision: Precision = description.get("precision", "float32")
    return feature_network(description["source"], image_size=size, grid=grid, device=device, precision=precision)


def channels_to_fit(name: str) -> int | None:
    """The channels of a PCA that is still to be fitted (``pca:16``); None for anything that is fitted already."""
    kind, _, channels = name.partition(":")
    return int(channels) if kind == "pca" and channels.isdigit() else None


def _numbers(text: str, form: str, count: int) -> tuple[int, ...]:
    parts = text.split(":")[1:]
    if len(parts) != count or not all(part.isdigit() for part in parts):
        raise ValueError(f"{text!r} is not of the form {form}, for example {'pixels:8' if count == 1 else form}")
    return tuple(int(part) for part in parts)


def default_pca_path(directory: Path) -> Path:
    """Where a latent set keeps the PCA that was fitted for it."""
    return directory / "encoders" / "pca.safetensors"
