"""What feeding a training costs: waiting for latent shards, and the features of REPA, stored or computed on the fly.

    python benchmarks/feeding.py --json feeding.json

Waiting: the share of a training's time that it waits for its batches, of shards with features in float16 and in 8 bits
(synthetic, of true shapes, page cache warm), for a network of --size on this device. Beside it the same share for a
process that trains at --rate images per second, if reading did not overlap with training, as it does on a GPU.

REPA: what an image's features cost to read, in bytes and in seconds of one process, and to compute, in operations and
in seconds of this device, with a DINOv2-B (random weights of the true shapes) on decoded images.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from floor import timed
from latent_loader import make_shards
from lwd import LightningDiT, OffsetSchedule, TrainConfig, lightningdit_config
from lwd.cost import TRAINING_FACTOR, forward_flops
from lwd.data import BatchOrder, LatentDataset
from lwd.data.loader import BatchLoader
from lwd.encoders.foundation import FoundationFeatures
from lwd.files import write_json
from lwd.latents import IMAGENET_SPEC
from lwd.machine import default_precision, describe_machine, describe_versions, pick_device
from lwd.memory import keep_freed_memory
from lwd.training import _Training

KINDS = {"latents alone": None, "float16 features": torch.float16, "8-bit features": torch.int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=589.0, help="images per second of the XL that the paper reports")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    keep_freed_memory()
    device = pick_device(chosen.device)
    result: dict[str, Any] = {"size": chosen.size, "batch": chosen.batch, "rate": chosen.rate, "waiting": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, features in KINDS.items():
            directory = Path(scratch, name.split()[0])
            make_shards(directory, 2, features)
            row = waiting(LatentDataset.open(directory), chosen, device, with_repa=features is not None)
            result["waiting"][name] = row
            print(f"{name:<20}waits {row['waited_share']:.2%} of the time at {row['images_per_second']:.1f} images/s; "
                  f"would wait {row['share_at_rate']:.1%} at {chosen.rate:g} images/s without overlap")  # fmt: skip
    result["repa"] = repa(chosen, device, result["waiting"])
    for name, value in result["repa"].items():
        print(f"{name:<72}{value:.4g}")
    result |= {"machine": describe_machine(device), "versions": describe_versions()}
    if chosen.json is not None:
        write_json(chosen.json, result)


def waiting(
    data: LatentDataset, chosen: argparse.Namespace, device: torch.device, *, with_repa: bool
) -> dict[str, float]:
    """Of a training on `data`, and of a reader alone."""
    sizes = {"repa_depth": 2} if with_repa else {}
    config = lightningdit_config(chosen.size, IMAGENET_SPEC, input_size=16, num_classes=1000, **sizes)
    settings = TrainConfig(
        batch_size=chosen.batch,
        precision=default_precision(device),
        compile=chosen.compile,
        repa=float(with_repa),
        flips=True,
    )
    training = _Training(LightningDiT(config).to(device), OffsetSchedule(0.3).to(device), data, settings, None, device)
    for step in range(3):
        timed(lambda step=step: training.update(step), device)
    waited = training.batches.waited
    start = time.perf_counter()
    for step in range(3, 3 + chosen.steps):
        training.update(step)
    timed(lambda: None, device)
    seconds = time.perf_counter() - start
    waited = training.batches.waited - waited

    loader = BatchLoader(data, BatchOrder(len(data), 256, seed=0), torch.device("cpu"), flips=True)
    times = [timed(lambda step=step: loader.get(step), torch.device("cpu")) for step in range(24)][4:]
    read = statistics.median(times) / 256
    return {
        "waited_share": waited / seconds,
        "images_per_second": chosen.steps * chosen.batch / seconds,
        "read_seconds_per_image": read,
        "share_at_rate": read * chosen.rate,
        "bytes_per_image": data.bytes / len(data) / 2,  # it holds the mirrored images too
    }


def repa(chosen: argparse.Namespace, device: torch.device, rows: dict[str, Any]) -> dict[str, float]:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    # The published network: 37 x 37 positions, patches of 14; 16 x 16 of them on images of 224 pixels.
    shape = Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_register_tokens=4)
    model = Dinov2WithRegistersModel(shape).to(device)
    network = FoundationFeatures(model, source="random", sha256="", precision=default_precision(device))
    images = torch.randint(256, (max(8, chosen.batch), 3, 256, 256), dtype=torch.uint8, device=device)
    network.feature_maps(images)
    seconds = statistics.median(timed(lambda: network.feature_maps(images), device) for _ in range(5)) / len(images)
    model.set_attn_implementation("eager")  # the products of fused attention are not counted
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        network.feature_maps(images[:1])
    operations = float(counter.get_total_flops())
    xl = lightningdit_config("XL", IMAGENET_SPEC, input_size=16, num_classes=1000, repa_depth=2)
    stored = rows["float16 features"]["read_seconds_per_image"] - rows["latents alone"]["read_seconds_per_image"]
    small = rows["8-bit features"]["bytes_per_image"] - rows["latents alone"]["bytes_per_image"]
    large = rows["float16 features"]["bytes_per_image"] - rows["latents alone"]["bytes_per_image"]
    training = TRAINING_FACTOR * forward_flops(xl, projector=True)
    return {
        "DINOv2-B: operations per image": operations,
        "DINOv2-B: operations, over those of training the XL": operations / training,
        "DINOv2-B: seconds per image here": seconds,
        "stored in float16: seconds per image here": stored,
        "computed over stored, in seconds": seconds / stored,
        "stored in float16: bytes per image": large,
        "stored in 8 bits: bytes per image": small,
        "stored in 8 bits: GB for ImageNet, without mirrored ones": small * 1_281_167 / 1e9,
    }


if __name__ == "__main__":
    main()
