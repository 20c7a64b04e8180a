"""Another group for a latent set that exists: depth, edges, anything computed from the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd.data.dataset import LatentDataset
from lwd.data.encode import merged
from lwd.data.images import ImageSource
from lwd.data.layout import FLIP, MANIFEST, dtype_name, group_key
from lwd.data.reading import Reading
from lwd.data.sharding import RECORDS, Record, ShardPlan, Share, agree_on_plan, make_shards
from lwd.data.statistics import ChannelStatistics
from lwd.data.writer import not_finite
from lwd.files import read_json, write_json
from lwd.latents import Group, Normalization


def add_group(
    directory: Path | str,
    source: ImageSource,
    name: str,
    encode: Callable[[Tensor], Tensor],
    *,
    weight: float | None = None,
    like: Path | str | None = None,
    description: dict[str, Any] | None = None,
    batch: int = 64,
    workers: int = 8,
    share: Share | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Add the group `name` to the latent set in `directory`, behind its other groups; returns whether that is done.

    Nothing that is there is written again: the new arrays lie in a folder of their own, and the manifest, replaced at
    the end, joins them. Interrupted, or on several processes, it goes as `lwd encode` does.

    Args:
        source: the images that the set was encoded from; each is found by its name.
        encode: pixels uint8 [n, c, S, S] to latents [n, C, h, w] on the grid of the set.
        weight: loss weight w_g; by default the channels of the set's first group over those of this one.
        like: a latent set with this group already, whose weight and statistics are used: the training set's, to add
            the group to held-out latents.
        description: what identifies `encode`, for the manifest.

    Raises:
        ValueError: the set has such a group already, or was not made by `lwd encode`; an image is missing in `source`;
            latents on another grid, NaN or infinite; no such group in `like`, or made by another encoder.
    """
    directory, share = Path(directory), share or Share()
    data = LatentDataset.open(directory)
    if name in data.spec.names:
        raise ValueError(f"{directory} has a group {name!r} already; choose another name")
    config = data.manifest["provenance"].get("config")
    if config is None:
        raise ValueError(f"{directory / MANIFEST} does not say how its images were read; only sets of `lwd encode` do")
    number_of = {image: number for number, image in enumerate(source.names)}
    plans = []
    for shard, names in zip(data.manifest["shards"], data.names(), strict=True):
        missing = [image for image in names if image not in number_of]
        if missing:
            raise ValueError(
                f"{shard['files'][0]['file']} holds {missing[0]!r}, which is not among the {len(source)} images given; "
                "give the images that the set was encoded from"
            )
        plans.append(ShardPlan(f"{name}/{shard['files'][0]['file']}", [number_of[image] for image in names]))
    pattern = None if like is None else _pattern(like, name, description, weight)
    key, dtype = group_key(name), getattr(torch, config["dtype"])

    def arrays(indices: Sequence[int], images: Tensor) -> tuple[dict[str, Tensor], ChannelStatistics]:
        made, statistics = {}, None
        for suffix in ("", FLIP) if data.flips else ("",):
            z = encode(images.flip(3) if suffix else images)
            if z.ndim != 4 or len(z) != len(images) or tuple(z.shape[2:]) != data.grid:
                raise ValueError(
                    f"group {name!r} must be [{len(images)}, C, {data.grid[0]}, {data.grid[1]}] for this set, not "
                    f"{list(z.shape)}"
                )
            if bad := not_finite(z):
                raise ValueError(f"{name} of {source.names[indices[bad[0]]]} is NaN or infinite")
            made[key + suffix] = z.to("cpu", dtype)
            statistics = statistics or ChannelStatistics(z.shape[1]).update(z.float())
        assert statistics is not None
        return made, statistics

    reading = Reading(config["size"], 1 if config["grey"] else 3, False, batch, workers)
    agree_on_plan(
        directory / RECORDS / name / "plan.json",
        {"images": source.describe(), "encoder": description or {}},
    )
    make_shards(directory, plans[share.rank :: share.world], arrays, source, reading, progress)
    records = [record for plan in plans if (record := Record.load(directory, plan)) is not None]
    if len(records) < len(plans):
        return False
    channels = records[0].layout[key].shape[0]
    if pattern is None:
        group = Group(name, channels, data.spec.sizes[0] / channels if weight is None else weight)
        normalization = merged([record.statistics for record in records]).normalization()
    else:
        group, normalization = pattern
        if group.channels != channels:
            raise ValueError(f"group {name!r} has {channels} channels here, but {group.channels} in {like}")
    manifest = read_json(directory / MANIFEST)
    if not any(entry["name"] == name for entry in manifest["groups"]):
        manifest["groups"].append(
            {"name": name, "channels": channels, "weight": group.weight, "key": key, "dtype": dtype_name(dtype)}
        )
        manifest["encoders"][name] = (description or {}) | {"added": True}
        for shard, record in zip(manifest["shards"], records, strict=True):
            shard["files"].append(record.entry)
        for statistic in ("mean", "std"):
            manifest["normalization"][statistic] += normalization.to_dict()[statistic]
        write_json(directory / MANIFEST, manifest)
    return True


def _pattern(
    like: Path | str, name: str, description: dict[str, Any] | None, weight: float | None
) -> tuple[Group, Normalization]:
    """The group `name` of the set `like`, and its statistics."""
    data = LatentDataset.open(like)
    if name not in data.spec.names:
        raise ValueError(f"{like} has no group {name!r}, only {', '.join(data.spec.names)}; add it there first")
    made_by = {key: value for key, value in data.encoders[name].items() if key != "added"}
    if made_by != (description or {}):
        raise ValueError(f"group {name!r} of {like} was made by {made_by}, not by {description or {}}")
    group = data.spec.groups[data.spec.names.index(name)]
    if weight not in (None, group.weight):
        raise ValueError(f"the weight of {name!r} in {like} is {group.weight:g}, not {weight:g}; leave out the weight")
    return group, data.normalization_of((name,))
