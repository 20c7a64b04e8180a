"""Work on a set of images, shard by shard: resumable, on any number of processes, each image exactly once.

The images are cut into shards before anything is encoded, and what a shard holds depends on the plan alone: not on what
was interrupted when, nor on how many processes share the work. Processes do not talk to each other. Each takes every
n-th shard and leaves a record in ``records/`` for every shard it has finished; whoever finds all of them there is the
last and writes the manifest. Killed at any point, the same command goes on: what has a record and a whole file is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd.data.images import ImageSource
from lwd.data.layout import Row, dtype_name, write_shard
from lwd.data.reading import Reading, read_batches
from lwd.data.statistics import ChannelStatistics
from lwd.files import differences, read_json, write_json

RECORDS = "records"

MakeArrays = Callable[[Sequence[int], Tensor], tuple[dict[str, Tensor], ChannelStatistics]]
"""From the numbers of some images and their pixels uint8 [n, c, S, S]: the arrays to store, and the statistics of
their latents."""


@dataclass(frozen=True)
class Share:
    """One process's part of the work: every `world`-th shard from `rank`."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"ranks run from 0 to {self.world - 1}; there is no rank {self.rank}")

    @classmethod
    def from_environment(cls) -> Share:
        """As torchrun, or srun for a step of several tasks, sets it; all the work without either."""
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if rank in os.environ and world in os.environ:
                return cls(int(os.environ[rank]), int(os.environ[world]))
        return cls()


@dataclass(frozen=True)
class ShardPlan:
    """A shard to make: its file below the directory of the set, and the images of the source it holds, in order."""

    file: str
    indices: Sequence[int]

    def record_path(self, directory: Path) -> Path:
        return directory / RECORDS / f"{self.file}.json"


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard.

    Attributes:
        entry: file, bytes and sha256, as the manifest has them; None when not one image of it could be read.
        count: images in it.
        failed: {"image", "error"} of images that could not be read.
        layout: what one image has of every array.
        statistics: of the latents.
    """

    entry: dict[str, Any] | None
    count: int
    failed: list[dict[str, str]]
    layout: dict[str, Row]
    statistics: ChannelStatistics | None

    def save(self, path: Path) -> None:
        layout = {key: [dtype_name(row.dtype), list(row.shape)] for key, row in self.layout.items()}
        statistics = None if self.statistics is None else self.statistics.to_dict()
        write_json(
            path,
            {
                "entry": self.entry,
                "count": self.count,
                "failed": self.failed,
                "layout": layout,
                "statistics": statistics,
            },
        )

    @classmethod
    def load(cls, directory: Path, plan: ShardPlan) -> Record | None:
        """The record of a shard whose file is whole; None when it is still to be made."""
        path = plan.record_path(directory)
        if not path.exists():
            return None
        data = read_json(path)
        if (entry := data["entry"]) is not None:
            file = directory / entry["file"]
            if not file.exists() or file.stat().st_size != entry["bytes"]:
                return None
        return cls(
            entry=entry,
            count=data["count"],
            failed=data["failed"],
            layout={key: Row(getattr(torch, dtype), tuple(shape)) for key, (dtype, shape) in data["layout"].items()},
            statistics=None if data["statistics"] is None else ChannelStatistics.from_dict(data["statistics"]),
        )


def make_shards(
    directory: Path,
    plans: Sequence[ShardPlan],
    make_arrays: MakeArrays,
    source: ImageSource,
    reading: Reading,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make those shards of `plans` that are not there yet; the next images are read, and the last shard is written,
    while one is encoded.

    Args:
        progress: called with (done, total) images.

    Raises:
        ImageError: an image that cannot be read, unless those are skipped.
        OSError: the disk is full; finished shards stay, and the same call goes on from there.
    """
    pending = [plan for plan in plans if Record.load(directory, plan) is None]
    total = sum(len(plan.indices) for plan in plans)
    done = total - sum(len(plan.indices) for plan in pending)
    batches = read_batches(source, (batch for plan in pending for batch in reading.batches(plan.indices)), reading)
    with ThreadPoolExecutor(1, "lwd-writer") as writer:
        writing: Future[None] | None = None
        for plan in pending:
            shard = _Shard(plan)
            for size in (len(batch) for batch in reading.batches(plan.indices)):
                batch = next(batches)
                if batch.indices:
                    shard.add(*make_arrays(batch.indices, batch.images), [source.names[i] for i in batch.indices])
                shard.failed += [{"image": source.names[i], "error": str(e)} for i, e in batch.failed.items()]
                done += size
                if progress is not None:
                    progress(done, total)
            if writing is not None:
                writing.result()
            writing = writer.submit(shard.write, directory)
        if writing is not None:
            writing.result()


class _Shard:
    """A shard while it is made."""

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan
        self.parts: list[dict[str, Tensor]] = []
        self.names: list[str] = []
        self.failed: list[dict[str, str]] = []
        self.statistics: ChannelStatistics | None = None

    def add(self, arrays: dict[str, Tensor], statistics: ChannelStatistics, names: Sequence[str]) -> None:
        self.parts.append(arrays)
        self.names += names
        self.statistics = statistics if self.statistics is None else self.statistics.merge(statistics)

    def write(self, directory: Path) -> None:
        entry = None
        layout: dict[str, Row] = {}
        if self.parts:
            arrays = {key: torch.cat([part[key] for part in self.parts]) for key in self.parts[0]}
            layout = {key: Row(array.dtype, tuple(array.shape[1:])) for key, array in arrays.items()}
            entry = write_shard(directory / self.plan.file, arrays, self.names) | {"file": self.plan.file}
        record = Record(entry, len(self.names), self.failed, layout, self.statistics)
        record.save(self.plan.record_path(directory))


def agree_on_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Leave `plan` at `path`, or compare it with the one there: shards of two plans must not mix.

    Where the images lie may change; their names and labels may not.

    Raises:
        ValueError: it is another plan; the differences are listed.
    """
    if not path.exists():
        write_json(path, plan)
        return
    there = read_json(path)
    changed = [line for line in differences(there, plan) if not line.startswith("images.path: ")]
    if changed:
        raise ValueError(
            f"{path.parent.parent} was begun with other settings:\n  "
            + "\n  ".join(changed)
            + "\nUse those settings to go on, or another directory."
        )
