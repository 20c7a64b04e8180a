"""What is in a latent set, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lwd.data.dataset import LatentDataset
from lwd.data.images import ImageError, ImageSource, crop_to_array
from lwd.encoders.choose import Decoder
from lwd.encoders.pca import PCAFit
from lwd.files import sha256_of, write_atomically
from lwd.randomness import stream


@dataclass(frozen=True)
class Findings:
    """What `check` found.

    Attributes:
        problems: one sentence each, with what to do about it; empty for a set that is whole.
        mean, std: largest deviation from 0 and from 1 of any channel of normalised latents, over a sample. Far off
            means statistics of other latents.
    """

    problems: list[str]
    mean: float
    std: float


def check(data: LatentDataset, progress: Callable[[int, int], None] | None = None, sample: int = 1000) -> Findings:
    """Compare every file with its checksum, labels with the classes, and a sample of latents with the statistics.

    That every array has the shape and dtype of the manifest is checked when the set is opened.

    Args:
        progress: called with (done, total) files.
    """
    problems = []
    for number, entry in enumerate(data.files):
        if entry["sha256"] is not None and sha256_of(data.directory / entry["file"]) != entry["sha256"]:
            problems.append(
                f"{entry['file']} fails its checksum: delete it and run the command that encoded the set again; it "
                "makes only what is missing"
            )
        if progress is not None:
            progress(number + 1, len(data.files))
    indices = torch.randperm(len(data), generator=stream(0, "check"))[:sample]
    batch = data.gather(indices)
    if not batch.latents.isfinite().all():
        problems.append("latents hold NaN or infinity: encode the set again in float32")
    labels, classes = data.labels(), len(data.class_names)
    if classes and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        problems.append(f"labels run from {labels.min()} to {labels.max()}, but there are {classes} classes")
    latents = batch.latents.double().transpose(0, 1).flatten(1)
    # A channel that never varies keeps its own scale: its deviation says nothing.
    std = latents.std(dim=1)
    return Findings(
        problems, float(latents.mean(dim=1).abs().max()), float((std[std > 0] - 1).abs().max()) if std.any() else 0.0
    )


def describe(data: LatentDataset) -> list[str]:
    """The set in a few lines: images, classes, groups, size, statistics."""
    manifest = data.manifest
    views = "original and mirrored" if data.flips else "original"
    lines = [f"{len(data):,} images in {len(manifest['shards'])} shards, {data.bytes / 1e9:.3g} GB, {views}"]
    counts = torch.bincount(data.labels())
    if len(data.class_names):
        lines.append(f"{len(data.class_names)} classes of {int(counts.min())} to {int(counts.max())} images")
    height, width = data.grid
    for group in manifest["groups"]:
        encoder = data.encoders.get(group["name"], {})
        made_by = ", ".join(str(encoder[key]) for key in ("encoder", "source") if key in encoder) or "unknown encoder"
        network = encoder.get("network", {})
        of = f" of {network.get('source', network.get('network'))}" if network else ""
        lines.append(
            f"{group['name']:<10}{group['channels']:>4} x {height} x {width} {group['dtype']}, weight "
            f"{group['weight']:g}: {made_by}{of}"
        )
    if (features := manifest["features"]) is not None:
        shape = " x ".join(map(str, features["shape"]))
        lines.append(f"{'features':<10}{shape} {features['dtype']}, for REPA")
    return lines


def contact_sheet(
    data: LatentDataset,
    path: Path,
    *,
    decoder: Decoder | None = None,
    source: ImageSource | None = None,
    count: int = 8,
    seed: int = 0,
) -> Path:
    """A picture of `count` images drawn at random: as they are, decoded from their texture, and every other group.

    A group that cannot be decoded shows its first three principal components as red, green and blue.

    Args:
        decoder: of the first group; without one it is shown as the others.
        source: the images that were encoded, if they are at hand.
    """
    import matplotlib.pyplot as plt

    indices = torch.randperm(len(data), generator=stream(seed, "contact sheet"))[:count].sort().values
    batch = data.gather(indices)
    parts = data.spec.split(data.normalization.denormalize(batch.latents))
    rows: dict[str, list[Tensor] | Tensor] = {}
    if source is not None and (originals := _originals(data, source, indices)):
        rows["image"] = originals
    for name, part in zip(data.spec.names, parts, strict=True):
        decoded = decoder is not None and name == data.spec.names[0]
        rows[f"{name}, decoded" if decoded else name] = decoder.decode(part) if decoder and decoded else as_colors(part)
    figure, axes = plt.subplots(
        len(rows), len(indices), figsize=(1.5 * len(indices) + 0.5, 1.55 * len(rows) + 0.3), squeeze=False
    )
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            grey = image.shape[0] == 1
            shown = image[0] if grey else image.movedim(0, -1)
            axis.imshow(shown.numpy(), cmap="gray" if grey else None, vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    for axis, label in zip(axes[0], batch.labels.tolist(), strict=True):
        axis.set_title(data.class_names[label] if data.class_names else str(label), fontsize=9)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)
    return path


def as_colors(latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] as uint8 [N, 3, h, w]: their first three principal components over these images, each
    stretched between its 1st and 99th percentile; 128 where it does not vary. Fewer channels than three are shown as
    grey."""
    channels = min(3, latents.shape[1])
    if channels == 3:
        latents = PCAFit(latents.shape[1]).update(latents).components(3).transform(latents)
    flat = latents[:, :channels].transpose(0, 1).flatten(1)
    low, high = flat.quantile(0.01, dim=1), flat.quantile(0.99, dim=1)
    span = high - low
    constant = span <= 1e-4 * span.max()  # or rounding errors would be stretched to a pattern
    scaled = (latents[:, :channels] - low[:, None, None]) / span[:, None, None]
    scaled = scaled.where(~constant[:, None, None], 0.5)
    scaled = scaled if channels == 3 else scaled[:, :1].expand(-1, 3, -1, -1)
    return (255 * scaled.clamp(0, 1)).round().to(torch.uint8)


def _originals(data: LatentDataset, source: ImageSource, indices: Tensor) -> list[Tensor]:
    """The encoded images again, as they were cropped; none when the source is not the one that was encoded."""
    config = data.manifest["provenance"].get("config")
    if config is None:
        return []
    names = [name for shard in data.names() for name in shard]
    number_of = {name: number for number, name in enumerate(source.names)}
    try:
        chosen = [source.read(number_of[names[index]]) for index in indices.tolist()]
    except (KeyError, ImageError):
        return []
    return [crop_to_array(image, config["size"], 1 if config["grey"] else 3) for image in chosen]
