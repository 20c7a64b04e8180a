"""Batches from latent shards: ours against SFD's own data set class, and against a plain copy of the same bytes.

    python benchmarks/latent_loader.py --sfd path/to/SFD --json latent_loader.json

Both read the same synthetic shards of true shapes, made in a temporary directory: 4 x 1,000 images of 32 + 16 channels
on 16 x 16, and 2 x 1,000 with the 768-channel features too (float16 for SFD, and 8-bit ones for ours besides). Batches
of 256, mirrored at random, page cache warm. SFD's class runs in its own `DataLoader`, as its training does it. Without
--sfd only our figures are measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lwd.data import BatchOrder, LatentDataset
from lwd.data.loader import BatchLoader
from lwd.data.quantize import quantize
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions

BATCH = 256
PER_SHARD = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sfd", type=Path, help="a checkout of SFD's public code")
    parser.add_argument("--seconds", type=float, default=6.0, help="of every measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    result: dict[str, Any] = {"batch": BATCH, "images_per_second": {}, "ratios": {}}
    with tempfile.TemporaryDirectory() as scratch:
        make_shards(Path(scratch, "cold"), 4, None)
        result["cold"] = cold_reads(Path(scratch, "cold"))
        for name, shards, features in (("latents", 4, None), ("features", 2, torch.float16), ("int8", 2, torch.int8)):
            make_shards(Path(scratch, name), shards, features)
        rates: dict[str, Callable[[], float]] = {}
        for name in ("latents", "features", "int8"):
            rates |= our_rates(name, LatentDataset.open(Path(scratch, name)), chosen.seconds)
        if chosen.sfd is not None:
            for name in ("latents", "features"):
                for workers in (0, 2):
                    make = reference_loader(chosen.sfd, Path(scratch, name), workers)
                    rates[f"{name}: SFD, {workers} workers"] = lambda make=make: timed(make(), chosen.seconds)
        # In turns, so that what else the machine does hits all alike.
        measured: dict[str, list[float]] = {name: [] for name in rates}
        for _ in range(chosen.repeats):
            for name, rate in rates.items():
                measured[name].append(rate())
        found = {name: statistics.median(values) for name, values in measured.items()}
        result["images_per_second"] = {
            name: {"median": round(found[name]), "min": round(min(v)), "max": round(max(v))}
            for name, v in measured.items()
        }
        for name in ("latents", "features", "int8"):
            runs = [
                against_a_copy(LatentDataset.open(Path(scratch, name)), chosen.seconds) for _ in range(chosen.repeats)
            ]
            for what in ("gathered", "copied"):
                rates_of = [run[what] for run in runs]
                result["images_per_second"][f"{name}: {what}"] = summary(rates_of)
            shares = [run["gathered"] / run["copied"] for run in runs]
            result["ratios"][f"{name}: share of a plain copy"] = statistics.median(shares)
            reference = "latents" if name == "latents" else "features"
            if chosen.sfd is not None:
                best = max(found[f"{reference}: SFD, {workers} workers"] for workers in (0, 2))
                result["ratios"][f"{name}: ours, ready to train, to SFD's better one"] = found[f"{name}: ready"] / best
    result |= {"machine": describe_machine(torch.device("cpu")), "versions": describe_versions()}
    show(result)
    if chosen.json is not None:
        write_json(chosen.json, result)


def summary(rates: list[float]) -> dict[str, int]:
    return {"median": round(statistics.median(rates)), "min": round(min(rates)), "max": round(max(rates))}


def make_shards(directory: Path, shards: int, features: torch.dtype | None) -> None:
    """Shards as SFD's extraction writes them, with its statistics files."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(shards):
        arrays = {"labels": torch.randint(1000, (PER_SHARD,), generator=generator)}
        for suffix in ("", "_flip"):
            arrays["latents" + suffix] = torch.randn(PER_SHARD, 32, 16, 16, generator=generator)
            arrays["latents_sv" + suffix] = torch.randn(PER_SHARD, 16, 16, 16, generator=generator)
            if features is not None:
                key, maps = "feats_dino" + suffix, torch.randn(PER_SHARD, 768, 16, 16, generator=generator)
                if features == torch.int8:
                    arrays[key], arrays[key + "_scale"] = quantize(maps)
                else:
                    arrays[key] = maps.to(features)
        save_file(arrays, directory / f"latents_rank00_shard{number:03}.safetensors")
    for key, channels in (("latents", 32), ("latents_sv", 16)):
        ones = torch.ones(1, channels, 1, 1)
        torch.save({"mean": 0 * ones, "std": ones}, directory / f"{key}_stats.pt")


def our_rates(name: str, data: LatentDataset, seconds: float) -> dict[str, Callable[[], float]]:
    """Ready to train: normalised, features as floats."""
    order = BatchOrder(len(data), BATCH, seed=0)
    loader = BatchLoader(data, order, torch.device("cpu"), flips=True)

    def ready() -> Iterator[int]:
        for step in range(10**9):
            yield len(loader.get(step).labels)

    return {f"{name}: ready": lambda: timed(ready(), seconds)}


def against_a_copy(data: LatentDataset, seconds: float) -> dict[str, float]:
    """Batches as they are stored, what crosses the bus to a GPU, against a copy of as many consecutive bytes.

    One batch and one copy take turns: what the memory is doing otherwise hits both. Medians.
    """
    order = BatchOrder(len(data), BATCH, seed=0)
    buffer = data.gather_stored(order.indices(0), order.flips(0))
    tensors = [t for t in (buffer.latents, buffer.labels, buffer.features, buffer.scales) if t is not None]
    amount = sum(t.numel() * t.element_size() for t in tensors)
    target, source = torch.empty(amount, dtype=torch.uint8), data._mapped._bytes
    gathered, copied = [], []
    begin = time.perf_counter()
    for step in range(10**9):
        start = time.perf_counter()
        data.gather_stored(order.indices(step), order.flips(step), out=buffer)
        middle = time.perf_counter()
        target.copy_(source[step % (len(source) // amount) * amount :][:amount])
        end = time.perf_counter()
        gathered.append(middle - start)
        copied.append(end - middle)
        if end - begin > seconds:
            break
    return {"gathered": BATCH / statistics.median(gathered), "copied": BATCH / statistics.median(copied)}


def reference_loader(repository: Path, directory: Path, workers: int) -> Callable[[], Iterator[int]]:
    """SFD's data set in the loader of its training."""
    sys.path.insert(0, str(repository))
    from dataset.img_latent_dataset import ImgLatentDataset  # SFD's

    dataset: Dataset[Tensor] = ImgLatentDataset(str(directory), latent_norm=True, latent_sv_norm=True)

    def batches() -> Iterator[int]:
        while True:
            for batch in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True):
                yield len(batch[0])

    return batches


def timed(batches: Iterator[int], seconds: float) -> float:
    """Images per second, after two batches to warm up."""
    next(batches), next(batches)
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += next(batches)
    return images / passed


def cold_reads(directory: Path) -> dict[str, float]:
    """Megabytes per second from the disk: our batches, against reading the files from beginning to end."""
    files = sorted(directory.glob("*.safetensors"))
    forget(files)  # before they are mapped: what is mapped stays
    start = time.perf_counter()
    for file in files:
        file.read_bytes()
    sequential = sum(file.stat().st_size for file in files) / (time.perf_counter() - start)
    forget(files)
    data = LatentDataset.open(directory)
    steps = len(data) // BATCH
    loader = BatchLoader(data, BatchOrder(len(data), BATCH, seed=1), torch.device("cpu"), flips=True)
    start = time.perf_counter()
    for step in range(steps):
        loader.get(step)
    ours = steps * BATCH * 48 * 256 * 4 / (time.perf_counter() - start)
    return {"sequential_megabytes_per_second": sequential / 1e6, "batches_megabytes_per_second": ours / 1e6}


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(result: dict[str, Any]) -> None:
    for name, rate in result["images_per_second"].items():
        print(f"{name:<32}{rate['median']:>10,} images/s   ({rate['min']:,} to {rate['max']:,})")
    for name, ratio in result["ratios"].items():
        print(f"{name:<60}{ratio:>8.2f}")
    for name, rate in result["cold"].items():
        print(f"{name:<60}{rate:>8.0f}")


if __name__ == "__main__":
    main()
