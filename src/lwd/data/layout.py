"""How a latent set lies on disk.

A latent set is a directory of ``*.safetensors`` shards and a ``manifest.json``. Keys follow SFD's: ``latents`` for the
texture group, ``latents_sv`` for the semantic one, ``latents_<name>`` for any other, ``feats_dino`` for REPA features,
``labels``; latents and features may have a ``_flip`` twin computed from the mirrored pixels, and 8-bit features have
their scales in ``..._scale``. The arrays of one shard may be spread over several files (a group that was added later
has its own), and each file names its images in its metadata. The manifest names groups, encoders, classes and shards
(with checksums) and holds the normalisation statistics.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lwd.files import sha256_of, write_atomically, write_json
from lwd.latents import LatentSpec, Normalization

FORMAT = "lwd-latents/1"
MANIFEST = "manifest.json"
KEYS = {"texture": "latents", "semantic": "latents_sv"}
FEATURES = "feats_dino"
FLIP = "_flip"
SCALE = "_scale"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def group_key(name: str) -> str:
    """The key of a group's array in a shard."""
    return KEYS.get(name, f"latents_{name}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Row:
    """One image's part of an array."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class StoredArray:
    """Where an array of `count` rows lies in a file, `start` bytes from its beginning."""

    row: Row
    count: int
    start: int


def read_header(path: Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """The arrays of a safetensors file by key, and its metadata; without reading the arrays.

    Raises:
        ValueError: not a safetensors file, or truncated: shorter than its header says.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        metadata = header.pop("__metadata__", {})
        arrays = {
            key: StoredArray(
                Row(_DTYPES[entry["dtype"]], tuple(entry["shape"][1:])),
                entry["shape"][0] if entry["shape"] else 1,
                8 + length + entry["data_offsets"][0],
            )
            for key, entry in header.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged ({error!r})") from error
    if size < end:
        raise ValueError(f"{path} is truncated: {size} bytes, its header says {end}")
    return arrays, metadata


def image_names(path: Path) -> list[str]:
    """The images of a shard file, in the order of its rows; ValueError when it does not name them."""
    _, metadata = read_header(path)
    if "images" not in metadata:
        raise ValueError(f"{path} does not say which images it holds; encode the set again with `lwd encode`")
    names: list[str] = json.loads(metadata["images"])
    return names


def write_shard(path: Path, arrays: Mapping[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Write a shard file; returns what the manifest says of it: file, bytes, sha256."""
    metadata = None if names is None else {"images": json.dumps(list(names))}
    contiguous = {key: array.contiguous() for key, array in arrays.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def spec_of(manifest: Mapping[str, Any]) -> LatentSpec:
    return LatentSpec.from_dict([{key: g[key] for key in ("name", "channels", "weight")} for g in manifest["groups"]])


def layout_of(manifest: Mapping[str, Any]) -> dict[str, Row]:
    """What one image has of every array of the set that `manifest` describes."""
    rows = {"labels": Row(torch.int64, ())}
    grid, features = manifest["grid"], manifest["features"]
    for suffix in ("", FLIP) if manifest["flips"] else ("",):
        for group in manifest["groups"]:
            rows[group["key"] + suffix] = Row(getattr(torch, group["dtype"]), (group["channels"], *grid))
        if features is not None:
            row = Row(getattr(torch, features["dtype"]), tuple(features["shape"]))
            rows[FEATURES + suffix] = row
            if row.dtype == torch.int8:
                rows[FEATURES + suffix + SCALE] = Row(torch.float32, row.shape[1:])
    return rows


def write_manifest(
    directory: Path,
    spec: LatentSpec,
    layout: Mapping[str, Row],
    *,
    shards: Sequence[Mapping[str, Any]],
    normalization: Normalization,
    class_names: Sequence[str],
    encoders: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Path:
    """The manifest of finished shards.

    Args:
        layout: what one image has of every array.
        shards: in order, each {"count": images, "files": [what `write_shard` returned, ...]}.
    """
    keys = [group_key(name) for name in spec.names]
    features = None
    if FEATURES in layout:
        row = layout[FEATURES]
        features = {"key": FEATURES, "shape": list(row.shape), "dtype": dtype_name(row.dtype)}
    return write_json(
        directory / MANIFEST,
        {
            "format": FORMAT,
            "groups": [
                group | {"key": key, "dtype": dtype_name(layout[key].dtype)}
                for group, key in zip(spec.to_dict(), keys, strict=True)
            ],
            "features": features,
            "flips": keys[0] + FLIP in layout,
            "encoders": dict(encoders),
            "grid": list(layout[keys[0]].shape[1:]),
            "class_names": list(class_names),
            "count": sum(shard["count"] for shard in shards),
            "shards": list(shards),
            "normalization": normalization.to_dict(),
            "provenance": dict(provenance),
        },
    )
