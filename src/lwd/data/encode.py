"""Images to a latent set: the plan of it, what it will take, and the manifest at its end."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lwd.data.images import ImageSource
from lwd.data.layout import FLIP, Row, group_key, write_manifest
from lwd.data.reading import Reading, read_batches
from lwd.data.sharding import RECORDS, Record, ShardPlan, Share, agree_on_plan, make_shards
from lwd.data.statistics import ChannelStatistics
from lwd.data.writer import feature_arrays, not_finite
from lwd.encoders.composite import CompositeEncoder
from lwd.files import write_text
from lwd.latents import Normalization
from lwd.randomness import derived_seed, stream

Storage = Literal["float32", "bfloat16", "float16"]
FeatureStorage = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class EncodeConfig:
    """How a set of images is encoded.

    Attributes:
        size: pixels per side after ADM's centre crop.
        grey: read the images as grey instead of RGB.
        flips: encode the mirrored images too.
        shard_size: images per shard.
        dtype: that latents are stored in.
        features: what REPA features are stored in; int8 has one scale per token.
        statistics: how many images, drawn at random, the normalisation statistics are of; None for all.
        seed: of posterior samples and of that draw.
        skip_corrupt: list images that cannot be read in ``failed.jsonl`` and go on, instead of stopping.
        batch: images at a time.
        workers: threads that read images.
    """

    size: int = 256
    grey: bool = False
    flips: bool = True
    shard_size: int = 1000
    dtype: Storage = "float32"
    features: FeatureStorage = "float16"
    statistics: int | None = None
    seed: int = 0
    skip_corrupt: bool = False
    batch: int = 64
    workers: int = 8

    def __post_init__(self) -> None:
        if min(self.size, self.shard_size, self.batch, self.workers) < 1:
            raise ValueError("size, shard_size, batch and workers must be at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that goes on must not change."""
        return {k: v for k, v in asdict(self).items() if k not in ("skip_corrupt", "batch", "workers")}

    @property
    def reading(self) -> Reading:
        return Reading(self.size, 1 if self.grey else 3, self.skip_corrupt, self.batch, self.workers)


@dataclass(frozen=True)
class Estimate:
    """What an encoding will take.

    Attributes:
        images, shards: of the whole set.
        remaining: images that this process has still to encode.
        bytes_per_image: on disk, all views and arrays.
        seconds: for this process, from one batch that was timed.
        memory, device_memory: bytes; the latter is 0 without a GPU.
        free: bytes on the disk.
    """

    images: int
    shards: int
    remaining: int
    bytes_per_image: int
    seconds: float
    memory: int
    device_memory: int
    free: int

    @property
    def bytes(self) -> int:
        return self.images * self.bytes_per_image


class Encoding:
    """The encoding of `source` into `directory`.

    Args:
        encoder: of all groups.
        share: this process's part of the work.
        normalization: statistics to use instead of the set's own: those of the training part, for a held-out one.
    """

    def __init__(
        self,
        source: ImageSource,
        encoder: CompositeEncoder,
        config: EncodeConfig,
        directory: Path | str,
        share: Share | None = None,
        normalization: Normalization | None = None,
    ) -> None:
        self.source, self.encoder, self.config, self.directory = source, encoder, config, Path(directory)
        self.share, self.normalization = share or Share(), normalization
        self.shards = [
            ShardPlan(f"shard-{number:05}.safetensors", range(start, min(start + config.shard_size, len(source))))
            for number, start in enumerate(range(0, len(source), config.shard_size))
        ]
        self.plan = {"images": source.describe(), "encoders": encoder.describe(), "config": config.identity}
        drawn = torch.randperm(len(source), generator=stream(config.seed, "statistics"))[: config.statistics]
        self._in_statistics = torch.zeros(len(source), dtype=torch.bool).index_fill_(0, drawn, True)

    @property
    def own_shards(self) -> list[ShardPlan]:
        return self.shards[self.share.rank :: self.share.world]

    def run(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Encode what is missing of this process's share; returns whether the whole set is finished.

        Args:
            progress: called with (done, total) images of this process.

        Raises:
            ValueError: the directory holds shards made with other settings (the differences are listed); latents
                that are NaN or infinite (the images are named).
            ImageError: an image that cannot be read, unless those are skipped.
            OSError: the disk is full; finished shards stay, and the same call goes on from there.
        """
        agree_on_plan(self.directory / RECORDS / "plan.json", self.plan)
        make_shards(self.directory, self.own_shards, self.arrays, self.source, self.config.reading, progress)
        return self._finish()

    def estimate(self) -> Estimate:
        """Encode one batch to see how long it takes and what it leaves.

        Raises:
            OSError: the disk has not enough room.
        """
        images = self._first_images()
        indices = list(range(len(images)))
        on_gpu = torch.cuda.is_available()
        self.arrays(indices, images)  # the first call warms up and allocates
        start = time.perf_counter()
        arrays, _ = self.arrays(indices, images)
        seconds = time.perf_counter() - start
        per_image = sum(Row(array.dtype, tuple(array.shape[1:])).bytes for array in arrays.values())
        missing = {plan.file: len(plan.indices) for plan in self.shards if Record.load(self.directory, plan) is None}
        remaining = sum(missing.get(plan.file, 0) for plan in self.own_shards)
        self.directory.mkdir(parents=True, exist_ok=True)
        # A shard in parts, the same put together and the last one being written; and the pixels read ahead.
        buffers = 3 * self.config.shard_size * per_image + 5 * self.config.batch * images[0].numel()
        # Linux counts in KiB, macOS in bytes.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        result = Estimate(
            images=len(self.source),
            shards=len(self.shards),
            remaining=remaining,
            bytes_per_image=per_image,
            seconds=seconds / len(images) * remaining,
            memory=resident + buffers,
            device_memory=torch.cuda.max_memory_allocated() if on_gpu else 0,
            free=shutil.disk_usage(self.directory).free,
        )
        needed = sum(missing.values()) * per_image
        if needed > result.free:
            raise OSError(
                f"the latents still to be written need {needed / 1e9:.1f} GB, but {self.directory} has only "
                f"{result.free / 1e9:.1f} GB free; use another disk, bfloat16 latents, 8-bit or no features"
            )
        return result

    def arrays(self, indices: Sequence[int], images: Tensor) -> tuple[dict[str, Tensor], ChannelStatistics]:
        """What is stored of the images `indices` with pixels uint8 [n, c, S, S], and the statistics they add."""
        config, arrays = self.config, {"labels": self.source.labels[list(indices)]}
        statistics = None
        for suffix in ("", FLIP) if config.flips else ("",):
            seeds = {
                name: [derived_seed(config.seed, f"posterior of {name}{suffix}", index) for index in indices]
                for name in self.encoder.groups
            }
            # One tensor for all encoders: the network that several of them read runs once for it.
            view = images.flip(3) if suffix else images
            groups, features = self.encoder.encode(view, seeds)
            for name, z in groups.items():
                self._require_finite(z, f"{name} latents", indices)
                arrays[group_key(name) + suffix] = z.to("cpu", getattr(torch, config.dtype))
            if features is not None:
                self._require_finite(features, "features", indices)
                arrays |= feature_arrays(features.cpu(), suffix, getattr(torch, config.features))
            if statistics is None:
                latents = torch.cat([z.float().cpu() for z in groups.values()], dim=1)
                statistics = ChannelStatistics(latents.shape[1]).update(latents[self._in_statistics[list(indices)]])
        assert statistics is not None
        return arrays, statistics

    def _require_finite(self, values: Tensor, what: str, indices: Sequence[int]) -> None:
        if bad := not_finite(values):
            names = ", ".join(self.source.names[indices[row]] for row in bad[:8])
            raise ValueError(f"the {what} of {names} contain NaN or infinity; try float32 instead of half precision")

    def _first_images(self) -> Tensor:
        for batch in read_batches(
            self.source, self.config.reading.batches(range(len(self.source))), self.config.reading
        ):
            if batch.indices:
                return batch.images
        raise ValueError("not one image could be read")

    def _finish(self) -> bool:
        """Write the manifest when every shard is there."""
        records = [record for plan in self.shards if (record := Record.load(self.directory, plan)) is not None]
        if len(records) < len(self.shards):
            return False
        failed = [failure for record in records for failure in record.failed]
        if failed:
            lines = "".join(json.dumps(failure) + "\n" for failure in failed)
            write_text(self.directory / "failed.jsonl", lines)
        kept = [record for record in records if record.entry is not None]
        if not kept:
            raise ValueError(f"not one image could be read; the errors are in {self.directory / 'failed.jsonl'}")
        layout = kept[0].layout
        write_manifest(
            self.directory,
            self.encoder.spec({name: layout[group_key(name)].shape[0] for name in self.encoder.groups}),
            layout,
            shards=[{"count": record.count, "files": [record.entry]} for record in kept],
            normalization=self.normalization or merged([record.statistics for record in kept]).normalization(),
            class_names=self.source.class_names,
            encoders=self.plan["encoders"],
            provenance={
                "images": self.plan["images"],
                "config": self.plan["config"],
                "failed": len(failed),
                "statistics": f"of {int(self._in_statistics.sum())} images" if self.normalization is None else "given",
            },
        )
        return True


def merged(parts: Sequence[ChannelStatistics | None]) -> ChannelStatistics:
    """The statistics of all parts together; in their order, so that the result is the same to the last bit."""
    present = [part for part in parts if part is not None]
    result = ChannelStatistics(len(present[0].mean))
    for part in present:
        result.merge(part)
    return result
