"""Shards without a manifest: those of SFD's extraction, described as if they had one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lwd.data.layout import FEATURES, FLIP, FORMAT, MANIFEST, StoredArray, dtype_name, read_header
from lwd.data.statistics import ChannelStatistics
from lwd.files import sha256_of, write_json
from lwd.latents import Normalization

# Key and name of the groups that SFD's shards may hold, in the order of its channels.
GROUPS = {"latents": "texture", "latents_dino": "semantic", "latents_sv": "semantic"}


def foreign_manifest(directory: Path, *, normalization: Normalization | None = None) -> dict[str, Any]:
    """A manifest, without checksums, for `directory` with SFD's shards.

    As SFD trains them: the texture group has weight 1, the semantic one the ratio of their channels (LWD Appendix B).

    Args:
        normalization: statistics of all channels; by default those in SFD's files ``<key>_stats.pt``, which hold
            ``mean`` and ``std`` of shape [1, C, 1, 1].

    Raises:
        FileNotFoundError: no shards, or no statistics files.
        ValueError: a shard that is damaged, or holds no latents.
    """
    paths = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not paths:
        raise FileNotFoundError(
            f"{directory} holds no finished latent set (neither manifest.json nor *.safetensors); make one with "
            "`lwd encode`"
        )
    headers = [read_header(path)[0] for path in paths]
    first = headers[0]
    if "latents" not in first or "labels" not in first:
        raise ValueError(f"{paths[0]} holds {', '.join(sorted(first))}, not latents and labels; it is no latent shard")
    keys = [key for key in GROUPS if key in first]
    texture = first["latents"].row.shape[0]
    groups = [
        {
            "name": GROUPS[key],
            "channels": first[key].row.shape[0],
            "weight": 1.0 if key == "latents" else texture / first[key].row.shape[0],
            "key": key,
            "dtype": dtype_name(first[key].row.dtype),
        }
        for key in keys
    ]
    features = first.get(FEATURES)
    shards = [
        {"count": header["labels"].count, "files": [{"file": path.name, "bytes": path.stat().st_size, "sha256": None}]}
        for path, header in zip(paths, headers, strict=True)
        if "labels" in header
    ]
    return {
        "format": FORMAT,
        "groups": groups,
        "features": None if features is None else _features(features),
        "flips": "latents" + FLIP in first,
        "encoders": {},
        "grid": list(first["latents"].row.shape[1:]),
        "class_names": [],
        "count": sum(shard["count"] for shard in shards),
        "shards": shards,
        "normalization": (normalization or _read_statistics(directory, keys)).to_dict(),
        "provenance": {"made by": "SFD's extraction"},
    }


def _features(array: StoredArray) -> dict[str, Any]:
    return {"key": FEATURES, "shape": list(array.row.shape), "dtype": dtype_name(array.row.dtype)}


def statistics_of(directory: Path) -> Normalization:
    """The statistics of a latent set, or of SFD's: of all ``<key>_stats.pt`` in `directory`, without any shard.

    Raises:
        FileNotFoundError: no statistics there.
    """
    keys = [key for key in GROUPS if (directory / f"{key}_stats.pt").is_file()]
    return _read_statistics(directory, keys) if keys else Normalization.from_pretrained(directory)


def _read_statistics(directory: Path, keys: list[str]) -> Normalization:
    mean: list[float] = []
    std: list[float] = []
    for key in keys:
        path = directory / f"{key}_stats.pt"
        if not path.exists():
            raise FileNotFoundError(
                f"{directory} holds no finished latent set: shards, but neither {MANIFEST} nor {path.name}. Run the "
                "command that encodes it again to finish it; for SFD's shards without statistics, compute them with "
                f"`lwd encode --out {directory} --adopt`"
            )
        statistics: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        mean += statistics["mean"].double().flatten().tolist()
        std += statistics["std"].double().flatten().tolist()
    return Normalization(tuple(mean), tuple(std))


def adopt(directory: Path | str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Give SFD's shards in `directory` a manifest: checksums, and statistics over all images where none are stored.

    Args:
        progress: called with (done, total) shards.

    Raises:
        FileExistsError: there is a manifest already.
        FileNotFoundError, ValueError: as `foreign_manifest`.
    """
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        raise FileExistsError(f"{directory} has a manifest already; `lwd encode --check` verifies it")
    try:
        manifest = foreign_manifest(directory)
        statistics = None
    except FileNotFoundError:
        # Placeholders until the shards have been read.
        manifest = foreign_manifest(directory, normalization=Normalization((), ()))
        statistics = {group["key"]: ChannelStatistics(group["channels"]) for group in manifest["groups"]}
    for number, shard in enumerate(manifest["shards"]):
        path = directory / shard["files"][0]["file"]
        shard["files"][0]["sha256"] = sha256_of(path)
        if statistics is not None:
            with safe_open(path, "pt") as file:
                for key, channels in statistics.items():
                    channels.update(file.get_tensor(key))
        if progress is not None:
            progress(number + 1, len(manifest["shards"]))
    if statistics is not None:
        parts = [channels.normalization() for channels in statistics.values()]
        joined = Normalization(tuple(m for n in parts for m in n.mean), tuple(s for n in parts for s in n.std))
        manifest["normalization"] = joined.to_dict()
    return write_json(directory / MANIFEST, manifest)
