"""Latents of every set by three semantic encoders, and the judges of the set.

    python -m experiments.latents fashion-mnist openmoji elpv       # or --all; --encoders middle for one of them

Texture is pixels in patches of 8 x 8, exact and without a decoder to train; both groups lie on one grid, 4 x 4 for
images of 32 px and 8 x 8 for those of 64. Semantic, always 16 channels, from the features of EfficientNet-Lite0 after
block 10:

    weak      principal components of the network with random weights
    middle    principal components of the pretrained network
    strong    a small SemVAE of the pretrained network's features

Encoding is `lwd encode`, as printed. Leaves ``latents/NAME/ENCODER/train`` and ``heldout``, ``semvae/NAME``, and
``judges/NAME``: a judge, features of the held-out images, and the scores of training images, the floor.

The judge is the one in ``experiments/judges``, where there is one for the set: by a judge trained again, scores differ
from those that are kept by a few percent. Elsewhere it is trained on the training images.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.images import DEFAULT_OUT, PARTS
from experiments.sets import ENCODERS, SEMANTIC_CHANNELS, SETS, DataSet, Places, checked, judges_of
from lwd import cli
from lwd.data.feature_source import StoredFeatures, hold_out
from lwd.encoders.semvae import SemVAE, SemVAEConfig
from lwd.encoders.semvae_training import SemVAETrainConfig, train_semvae
from lwd.files import write_atomically, write_json
from lwd.machine import default_precision, pick_device
from lwd.randomness import derived_seed, stream

PUBLISHED_JUDGES = Path(__file__).parent / "judges"


def encode(data: DataSet, encoder: str, places: Places, budget: float = 1.0) -> None:
    """Both parts of a set by one encoder; what is complete is kept.

    Raises:
        FileNotFoundError: there are no images yet; says how to make them.
    """
    archive = places.images(data) / "train.tar"
    if not archive.is_file():
        raise FileNotFoundError(f"there is no {archive}: make it with `python -m experiments.images {data.name}`")
    train, heldout = (places.latents(data, encoder, part) for part in PARTS)
    if not (train / "manifest.json").exists():
        strong = encoder == "strong"
        semantic = f"semvae:{train_strong(data, places, budget)}" if strong else f"pca:{SEMANTIC_CHANNELS}"
        options = ["--texture", data.texture, "--features", data.network(encoder), "--semantic", semantic]
        options += ["--size", str(data.size), *(["--grey"] if data.grey else [])]
        options += ["--flips"] if data.flips else ["--no-flips"]
        # The SemVAE is trained on the features that the middle one stores.
        options += ["--repa", "float16"] if encoder == "middle" else []
        _lwd("encode", "--data", str(archive), "--out", str(train), *options)
    if not (heldout / "manifest.json").exists():
        archive = places.images(data) / "heldout.tar"
        _lwd("encode", "--data", str(archive), "--out", str(heldout), "--like", str(train))


def train_strong(data: DataSet, places: Places, budget: float = 1.0) -> Path:
    """The SemVAE of a set, on the features stored with the middle encoder's latents; returns its directory.

    Small and quick next to the published one: 2 + 2 blocks of width 192 at ten times its learning rate.
    """
    encode(data, "middle", places, budget)
    directory = places.out / "semvae" / data.name
    if not (directory / "model" / "config.json").exists():
        device = pick_device()
        source = StoredFeatures(places.latents(data, "middle"))
        training, validation = hold_out(source, min(500, len(source) // 10), 0)
        torch.manual_seed(derived_seed(0, "semvae weights"))
        config = SemVAEConfig(features=source.width, channels=SEMANTIC_CHANNELS, width=192, depth=2, heads=6)
        steps = max(2, round(data.semvae_steps * min(budget, 1.0)))
        how = SemVAETrainConfig(
            steps=steps, batch_size=min(64, len(training)), lr=5e-4, precision=default_precision(device), log_every=50
        )
        history = train_semvae(
            SemVAE(config), training, how, directory=directory, device=device, validation=validation
        )  # fmt: skip
        # How much of the features' variance each of the two projections keeps says which of them is the richer.
        write_json(directory / "heldout.json", {k: v for k, v in history[-1].items() if k.startswith("heldout_")})
    return directory / "model"


def prepare_judges(data: DataSet, places: Places, budget: float = 1.0) -> None:
    """The judge, the reference features and the floor of a set."""
    judges = judges_of(data, places, pick_device(), budget)
    published = PUBLISHED_JUDGES / f"{data.name}.safetensors"
    if budget >= 1 and published.exists() and not judges.path.exists():
        write_atomically(judges.path, partial(shutil.copyfile, published))

    def as_generated(labels: Tensor) -> Tensor:
        order = torch.randperm(len(labels), generator=stream(0, "floor"))
        return order[: data.images]

    judges.prepare(as_generated)


def _lwd(*arguments: str) -> None:
    print("lwd", *arguments, flush=True)
    cli.main(list(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SETS)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), help=f"of {', '.join(ENCODERS)}")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the training of SemVAE and judge")
    chosen = parser.parse_args()
    names = list(SETS) if chosen.all else chosen.names
    if not names:
        parser.error(f"name one or more of {', '.join(SETS)}, or give --all")
    try:
        for name in names:
            data = SETS[checked(name, SETS, "set of images")]
            for encoder in chosen.encoders:
                encode(data, checked(encoder, ENCODERS, "semantic encoder"), Places(chosen.out), chosen.budget)
            prepare_judges(data, Places(chosen.out), chosen.budget)
            print(f"{name} is ready for `python -m experiments.run`.", flush=True)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
