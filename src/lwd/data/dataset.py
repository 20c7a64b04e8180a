"""Reading latent sets: ours, and shards that SFD's extraction made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lwd.data.foreign import foreign_manifest
from lwd.data.layout import (
    FEATURES,
    FLIP,
    FORMAT,
    MANIFEST,
    SCALE,
    image_names,
    layout_of,
    read_header,
    spec_of,
)
from lwd.data.mapping import MappedFiles
from lwd.data.memory import NO_FLIPS, Batch, StoredBatch, TensorLatents
from lwd.data.quantize import dequantize
from lwd.files import read_json, sha256_of
from lwd.latents import Normalization


class LatentDataset:
    """A latent set on disk, memory-mapped as a whole: every file is opened once, every batch is a few native calls.

    Attributes:
        flips: whether there are latents of the mirrored images.
        features: whether there are REPA features.
        fingerprint: changes with any of its files; of SFD's, which have no checksums, with their size, beginning,
            middle and end.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.spec = spec_of(manifest)
        self.normalization = Normalization.from_dict(manifest["normalization"])
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.encoders: dict[str, Any] = manifest["encoders"]
        self.flips, self.features = bool(manifest["flips"]), manifest["features"] is not None
        # What was hashed already stands for the arrays, and the groups for what is made of them.
        digests = [entry["sha256"] or _sampled_digest(directory / entry["file"]) for entry in self.files]
        hashed = json.dumps([manifest["groups"], digests], sort_keys=True)
        self.fingerprint = hashlib.sha256(hashed.encode()).hexdigest()
        self._group_keys: list[str] = [group["key"] for group in manifest["groups"]]
        self._ends = torch.tensor([shard["count"] for shard in manifest["shards"]], dtype=torch.int64).cumsum(0)
        self._begins = torch.cat([self._ends.new_zeros(1), self._ends[:-1]])
        self._counts: list[int] = [shard["count"] for shard in manifest["shards"]]
        self._layout = layout_of(manifest)
        self._map_files()

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """The latent set in `directory`: one with a manifest, or SFD's shards with their statistics files.

        Raises:
            FileNotFoundError: no set there or an unfinished one; a shard or SFD's statistics are missing.
            ValueError: the manifest is damaged or of another format; a shard is truncated or differs from it (named).
        """
        directory = Path(directory)
        if not (directory / MANIFEST).exists():
            return cls(directory, foreign_manifest(directory))
        manifest = read_json(directory / MANIFEST)
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise ValueError(f"{directory / MANIFEST} has format {found!r}, expected {FORMAT!r}")
        try:
            count, held = manifest["count"], sum(shard["count"] for shard in manifest["shards"])
            data = cls(directory, manifest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / MANIFEST} is incomplete ({error!r}); encode the set again") from error
        if not held or held != count:
            raise ValueError(f"the shards in {directory / MANIFEST} do not add up to its count of {count}")
        return data

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.directory, self.manifest)  # addresses mean nothing in another process

    def check(self) -> None:
        """Compare every file with its checksum; ValueError naming the first that differs."""
        for entry in self.files:
            path = self.directory / entry["file"]
            if entry.get("sha256") is None:
                raise ValueError(
                    f"{self.directory} has no checksums; `lwd encode --adopt` gives it a manifest with them"
                )
            if sha256_of(path) != entry["sha256"]:
                raise ValueError(f"{path} fails its checksum; {_remake(path)}")

    @property
    def files(self) -> list[dict[str, Any]]:
        """What the manifest says of every file: name, bytes, sha256."""
        return [entry for shard in self.manifest["shards"] for entry in shard["files"]]

    def normalization_of(self, names: Sequence[str]) -> Normalization:
        """The statistics of the groups `names` alone, in the order of the set."""
        owners = [group.name for group in self.spec.groups for _ in range(group.channels)]
        kept = [channel for channel, owner in enumerate(owners) if owner in names]
        mean, std = self.normalization.mean, self.normalization.std
        return Normalization(tuple(mean[c] for c in kept), tuple(std[c] for c in kept))

    def gather(self, indices: Tensor, flip: Tensor | None = None) -> Batch:
        """The images `indices` [B], normalised, on the CPU; those with `flip` [B] mirrored, latents and features alike.

        Raises:
            IndexError: an index outside the set.
            ValueError: `flip` for a set without mirrored latents.
        """
        return self.gather_stored(indices, flip).to("cpu", self.normalization)

    def gather_stored(
        self, indices: Tensor, flip: Tensor | None = None, *, out: StoredBatch | None = None, pinned: bool = False
    ) -> StoredBatch:
        """`gather` without the arithmetic, a plain copy of what is stored.

        Args:
            out: a batch of the same size whose memory may be overwritten.
            pinned: allocate in page-locked memory, from which copies to a GPU run in the background.
        """
        place = self._places(indices, flip)
        batch = out if out is not None else self._empty(len(indices), pinned)
        first = 0
        for key, channels in zip(self._group_keys, self.spec.sizes, strict=True):
            part = batch.latents[:, first : first + channels]
            if self._layout[key].dtype == part.dtype:
                self._copy(key, place, part)
            else:
                stored = torch.empty(part.shape, dtype=self._layout[key].dtype)
                self._copy(key, place, stored)
                part.copy_(stored)
            first += channels
        self._copy("labels", place, batch.labels)
        if batch.features is not None:
            self._copy(FEATURES, place, batch.features)
        if batch.scales is not None:
            self._copy(FEATURES + SCALE, place, batch.scales)
        return batch

    def will_need(self, indices: Tensor, flip: Tensor | None = None) -> None:
        """Have the system read these images from the disk in the background; a later `gather` will not wait for it."""
        place = self._places(indices, flip)
        for key in [*self._group_keys, *([FEATURES] if self.features else [])]:
            self._mapped.will_need(self._offsets(key, place), self._layout[key].bytes)

    def labels(self) -> Tensor:
        """The label of every image, [N]."""
        return self._all_of("labels")

    def names(self) -> list[list[str]]:
        """The images' names, shard by shard in the order of the rows; ValueError when the shards do not hold them."""
        return [image_names(self.directory / shard["files"][0]["file"]) for shard in self.manifest["shards"]]

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self._mapped.size

    def to_memory(self, device: torch.device | str = "cpu") -> TensorLatents:
        """The whole set on `device`: the way to train on sets that fit."""

        def latents(suffix: str) -> Tensor:
            return torch.cat([self._all_of(key + suffix).to(device).float() for key in self._group_keys], dim=1)

        def features(suffix: str) -> Tensor:
            stored = self._all_of(FEATURES + suffix).to(device)
            scale = FEATURES + suffix + SCALE
            if scale not in self._layout:
                return stored
            return dequantize(stored, self._all_of(scale).to(device), torch.empty_like(stored, dtype=torch.float16))

        return TensorLatents(
            self.spec,
            latents(""),
            self.labels().to(device),
            normalization=self.normalization,
            flipped=latents(FLIP) if self.flips else None,
            features=features("") if self.features else None,
            flipped_features=features(FLIP) if self.features and self.flips else None,
            class_names=self.class_names,
            encoders=self.encoders,
            fingerprint=self.fingerprint,
        )

    def _all_of(self, key: str) -> Tensor:
        row = self._layout[key]
        parts = [
            self._mapped.array(start, (count, *row.shape), row.dtype)
            for start, count in zip(self._starts[key].tolist(), self._counts, strict=True)
        ]
        return torch.cat(parts)

    def _places(self, indices: Tensor, flip: Tensor | None) -> tuple[Tensor, Tensor]:
        """For every image the entry of its view and shard in the tables of `_tables`, and its row in the shard."""
        indices = indices.cpu()
        if len(indices):
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= len(self):
                raise IndexError(f"indices run from {low} to {high} in a latent set of {len(self)}")
        shard = torch.searchsorted(self._ends, indices, right=True)
        local = indices - self._begins[shard]
        if flip is None:
            return shard, local
        if not self.flips:
            raise ValueError(NO_FLIPS)
        return torch.add(shard, flip.cpu(), alpha=len(self._counts)), local

    def _offsets(self, key: str, place: tuple[Tensor, Tensor]) -> Tensor:
        entry, local = place
        return torch.add(self._tables[key][entry], local, alpha=self._layout[key].bytes)

    def _copy(self, key: str, place: tuple[Tensor, Tensor], out: Tensor) -> None:
        self._mapped.gather(self._offsets(key, place), out, self._alignment)

    def _empty(self, count: int, pinned: bool) -> StoredBatch:
        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(count, *shape, dtype=dtype, pin_memory=pinned)

        dtypes = {self._layout[key].dtype for key in self._group_keys}
        features, scales = self._layout.get(FEATURES), self._layout.get(FEATURES + SCALE)
        return StoredBatch(
            empty(dtypes.pop() if len(dtypes) == 1 else torch.float32, self.spec.channels, *self.grid),
            empty(torch.int64),
            None if features is None else empty(features.dtype, *features.shape),
            None if scales is None else empty(scales.dtype, *scales.shape),
        )

    def _map_files(self) -> None:
        """Map all files, and find where every array of every shard begins."""
        entries = [(number, entry) for number, shard in enumerate(self.manifest["shards"]) for entry in shard["files"]]
        for _, entry in entries:
            path = self.directory / entry["file"]
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; {_remake(path)}")
            if path.stat().st_size != entry["bytes"]:
                size, expected = path.stat().st_size, entry["bytes"]
                raise ValueError(f"{path} is truncated or changed: {size} bytes, expected {expected}; {_remake(path)}")
        self._mapped = MappedFiles([self.directory / entry["file"] for _, entry in entries])
        self._starts = {key: torch.full((len(self._counts),), -1) for key in self._layout}
        for (number, entry), begin in zip(entries, self._mapped.starts, strict=True):
            path = self.directory / entry["file"]
            for key, array in read_header(path)[0].items():
                if key not in self._layout:
                    continue
                if (array.row, array.count) != (self._layout[key], self._counts[number]):
                    raise ValueError(
                        f"{path} holds {array.count} x {array.row} as {key}, but the set has {self._counts[number]} x "
                        f"{self._layout[key]}; {_remake(path)}"
                    )
                self._starts[key][number] = begin + array.start
        self._alignment = math.gcd(4, *torch.cat(list(self._starts.values())).unique().tolist())
        for key, starts in self._starts.items():
            if (starts < 0).any():
                path = self.directory / self.manifest["shards"][int((starts < 0).nonzero()[0])]["files"][0]["file"]
                raise ValueError(f"{path} holds no {key}; {_remake(path)}")
        # Where each key begins in every shard, then where its mirrored twin does; labels are the same in both views.
        self._tables = {
            key: torch.cat([starts, self._starts.get(_twin(key), starts)]) for key, starts in self._starts.items()
        }


def _twin(key: str) -> str:
    """The key of the mirrored view's array."""
    return f"{key.removesuffix(SCALE)}{FLIP}{SCALE}" if key.endswith(SCALE) else key + FLIP


def _remake(path: Path) -> str:
    return f"delete {path.name} and run the command that encoded the set again: it makes only what is missing"


def _sampled_digest(path: Path, chunk: int = 1 << 16) -> str:
    """Of the size of a file, its beginning, middle and end: for shards that nobody has hashed in full."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in (0, size // 2, max(0, size - chunk)):
            file.seek(start)
            digest.update(file.read(chunk))
    return digest.hexdigest()
