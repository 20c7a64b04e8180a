"""Where images come from: class folders, arrays in memory, and `open_images`, which picks the reader by what is there.

All readers (those of archives are in `lwd.data.image_archives`) list names and labels up front and decode one image at
a time, from any thread. They use neither JPEG's draft mode, which changes pixels, nor Pillow's
``LOAD_TRUNCATED_IMAGES``, which paints what is missing grey.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SAVED_MARKERS = ("state.json", "dataset_dict.json")
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
HUB = "a Hugging Face data set"
ACCEPTED = (
    "a folder of class folders of images, or of images; tar shards (a folder of .tar files, one .tar file, or a quoted "
    "glob such as 'shards/train-*.tar'); a Hugging Face data set on disk (made by save_to_disk, or a folder of "
    ".parquet files); or 'fashion-mnist' and 'fashion-mnist-heldout' for the embedded images"
)


class ImageError(ValueError):
    """An image that is corrupt, truncated, unreadable, or of a kind that has no 8-bit colours."""


class ImageSource(Protocol):
    """Labelled images in a fixed order.

    Attributes:
        names: one stable, unique id per image, such as ``"class/file.jpg"``.
        labels: int64 [N], each from 0 to K - 1.
        class_names: K readable names.
    """

    names: Sequence[str]
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The decoded image in the mode of its file; ImageError naming it when it cannot be read."""
        ...

    def describe(self) -> dict[str, Any]:
        """For JSON: kind, path, count, classes, and names_sha256, a digest of all names and labels."""
        ...


class ListedImages:
    """What the readers share: the list of images, as in `ImageSource`, and its description."""

    def __init__(self, kind: str, path: str, names: Sequence[str], labels: Tensor, classes: Sequence[str]) -> None:
        self.kind = kind
        self.path = path
        self.names = names
        self.labels = labels.to(torch.int64)
        self.class_names = tuple(classes)

    def __len__(self) -> int:
        return len(self.names)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            digest.update(f"{name}\0{label}\n".encode(errors="surrogateescape"))
        sizes = {"count": len(self), "classes": len(self.class_names)}
        return {"kind": self.kind, "path": self.path} | sizes | {"names_sha256": digest.hexdigest()}


class FolderImages(ListedImages):
    """Images in class folders, ``root/class/.../file.jpg``; or images directly in `root`, as one class named after it.

    Classes are the sorted folder names; files are sorted within a class. Hidden files and folders, and files without
    one of `IMAGE_SUFFIXES` (in any case), are ignored. Only directories are read: ImageNet is listed in seconds.

    Raises:
        OSError: a folder is missing or may not be listed (FileNotFoundError, PermissionError, ...).
        ValueError: no images; class folders without images; images beside class folders; a folder of splits.
    """

    def __init__(self, root: str | Path) -> None:
        path = os.path.abspath(Path(root).expanduser())
        found: dict[str, list[str]] = {}
        for folder, files in walk(path):
            inside = os.path.relpath(folder, path) + "/" if folder != path else ""
            images = [inside + file for file in files if is_image_name(file)]
            found.setdefault(inside.partition("/")[0], []).extend(images)
        loose = found.pop("")
        if loose and found:
            raise ValueError(
                f"{path} holds images ({_first(loose)}) beside folders ({_first(list(found))}): move the images into "
                "class folders, or the folders away"
            )
        refuse_splits(found, f"{path} holds the folders", f"such as {os.path.join(path, 'train')}")
        if loose:
            found = {os.path.basename(path): loose}
        if not any(found.values()):
            raise ValueError(f"no images in {path}: none ends in {', '.join(IMAGE_SUFFIXES)}")
        if empty := [folder for folder, files in found.items() if not files]:
            raise ValueError(
                f"{len(empty)} class folders in {path} hold no images: {_first(empty)}. Every folder is a class; "
                "delete the empty ones to go on without them"
            )
        names = [name for files in found.values() for name in sorted(files)]
        labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(files) for files in found.values()]))
        super().__init__("folder", path, names, labels, tuple(found))

    def read(self, index: int) -> Image.Image:
        path = os.path.join(self.path, self.names[index])
        return read_image(path, path)


class ArrayImages(ListedImages):
    """Images in memory.

    Args:
        images: uint8 [N, H, W], or [N, c, H, W] with c = 1 or 3.
        labels: integers [N], each from 0 to len(class_names) - 1.
        name: what the images are called, in `describe` and at the beginning of every image's name.

    Raises:
        ValueError: shapes, dtype or labels other than these.
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: Sequence[str], name: str = "array") -> None:
        if images.dtype != torch.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[1] in (1, 3))):
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 [N, H, W] or [N, c, H, W] with c = 1 or 3, not {found}")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            found = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"{len(images)} images need as many integer labels, not {found}")
        outside = labels[(labels < 0) | (labels >= len(class_names))]
        if len(outside):
            raise ValueError(f"label {int(outside[0])} is none of 0 to {len(class_names) - 1}, the classes' numbers")
        super().__init__("array", name, [f"{name}/{i:06}" for i in range(len(images))], labels, class_names)
        self.images = images[:, None] if images.ndim == 3 else images

    def read(self, index: int) -> Image.Image:
        pixels = self.images[index].permute(1, 2, 0).contiguous().numpy()
        return _pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def open_images(source: str | Path, *, classes: Path | None = None, split: str | None = None) -> ImageSource:
    """The images at `source`, read by what is found there.

    Args:
        source: a folder of images or class folders (`FolderImages`); a .tar file, a folder of them or a glob
            (`TarImages`); a folder that Hugging Face datasets saved, or of .parquet files (`HubImages`); the strings
            "fashion-mnist" and "fashion-mnist-heldout" for the embedded training and held-out images.
        classes: a file of readable class names (`read_class_names`). The order of the labels stays.
        split: of a Hugging Face data set: which part of it; see `HubImages`.

    Raises:
        OSError: nothing is there, or it may not be read.
        ValueError: what is there is none of these, holds several of them, or has no class names for some class; a split
            of anything else.
        ImportError: the reader needs a package that is missing.
    """
    images = _open(source, split)
    if classes is not None:
        images.class_names = read_class_names(classes, images.class_names)
    return images


def read_class_names(path: str | Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The readable names of the classes `folders`, in their order.

    Args:
        path: text with a line ``folder<TAB or space>readable name`` per class, or a JSON object. May name more classes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a table, or leaves out a class.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            table = json.loads(text)
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            rows = [line.partition("\t" if "\t" in line else " ") for line in lines]
            table = {folder.strip(): name.strip() for folder, _, name in rows}
            if len(table) < len(rows):
                raise ValueError("it names a class twice")
    except ValueError as error:
        raise ValueError(f"{path} is no table of class names: {error}") from error
    if unnamed := [folder for folder in folders if not isinstance(table.get(folder), str) or not table[folder]]:
        raise ValueError(f"{path} has no name for {len(unnamed)} of {len(folders)} classes: {_first(unnamed)}")
    return tuple(table[folder] for folder in folders)


def crop_to_array(image: Image.Image, size: int, channels: int = 3) -> Tensor:
    """ADM's centre crop (Dhariwal & Nichol 2021), uint8 [channels, size, size].

    The image is halved by averaging 2 x 2 pixels while its short side is at least twice `size`, then resized
    bicubically to a short side of `size`, then cropped. As in the reference, EXIF orientation is not applied and
    transparency is dropped, leaving the colours beneath it.

    Args:
        image: of any mode with a fixed range. Of 16-bit grey the high byte is taken, as Pillow does for 16-bit colour.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: `size` or `channels` make no sense.
        ImageError: pixels without a fixed range (floats), or an image so thin that resizing it would fill the memory.
    """
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"a crop has at least 1 pixel per side and 1 or 3 channels, not {size} and {channels}")
    pillow = _pillow()
    image = _eight_bit(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the colours that "RGB" would give, without Pillow's warning
    image = image.convert("RGB" if channels == 3 else "L")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), pillow.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if pillow.MAX_IMAGE_PIXELS is not None and width * height > 2 * pillow.MAX_IMAGE_PIXELS:
        raise ImageError(f"{image.width} x {image.height} pixels are too thin for a crop of {size} x {size}")
    image = image.resize((width, height), pillow.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).view(size, size, channels).permute(2, 0, 1).contiguous()


def decode_image(data: bytes, what: str) -> Image.Image:
    """The image in the file contents `data`, fully decoded; ImageError that begins with `what` when it is damaged."""
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(data)) as image:
            image.load()
    except MemoryError:
        raise
    except pillow.UnidentifiedImageError as error:
        why = "it is of no format that Pillow knows" if data else "it is empty"
        raise ImageError(f"{what} cannot be decoded: {why}") from error
    except Exception as error:  # damaged files make decoders raise about anything, SyntaxError and struct.error too
        raise ImageError(f"{what} cannot be decoded: {error or type(error).__name__}") from error
    _eight_bit(image, what)
    return image


def read_image(path: str, what: str) -> Image.Image:
    """`decode_image` of a file; ImageError as well when the file is missing or may not be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{what} cannot be read: {error.strerror} ({path})") from error
    return decode_image(data, what)


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from the top with its files, sorted, nothing hidden; OSError naming a folder that is unreadable."""

    def fail(error: OSError) -> None:
        raise type(error)(f"the folder {error.filename} cannot be listed: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def refuse_splits(names: Iterable[str], what: str, advice: str) -> None:
    """ValueError when `names` are those of the parts of a data set, which must not become classes or one set."""
    found = sorted(set(names))
    if len(found) > 1 and SPLIT_NAMES.issuperset(found):
        raise ValueError(f"{what} {', '.join(found)}, the parts of a data set: pass one of them, {advice}")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "lwd[encoders]"') from error
    return Image


def _eight_bit(image: Image.Image, what: str = "the image") -> Image.Image:
    """16-bit grey to its high byte (Pillow would clip at 255), others unchanged; ImageError without a known range."""
    if image.mode in ("F", "LAB", "La"):
        raise ImageError(f"{what} has pixels of mode {image.mode}; convert it to 8 or 16 bits per channel")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{what} has 32-bit pixels, {values.min()} to {values.max()}; convert it to 8 or 16 bits")
    return _pillow().fromarray((values >> 8).astype(np.uint8))


def _open(source: str | Path, split: str | None) -> Any:
    from lwd.data.image_archives import HubImages, TarImages

    hub = Path(source).expanduser().is_dir() and _kinds_in(Path(source).expanduser()) == {HUB}
    if split is not None and not hub:
        raise ValueError(f"{source} is not {HUB} and has no split {split!r}; give the folder of the part itself")
    if hub:
        return HubImages(source, split)
    if isinstance(source, str) and source in ("fashion-mnist", "fashion-mnist-heldout"):
        from lwd.data.embedded import load_embedded_images

        part = load_embedded_images("heldout" if source.endswith("heldout") else "train")
        return ArrayImages(part.images, part.labels, part.class_names, source)
    path = Path(source).expanduser()
    if (path.is_file() and path.suffix == ".tar") or (not path.exists() and re.search(r"[*?[]", str(source))):
        return TarImages(path)
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {source}; images can be {ACCEPTED}")
    if path.is_file():
        raise ValueError(f"{source} is a file, not a set of images; images can be {ACCEPTED}")
    kinds = _kinds_in(path)
    if len(kinds) != 1:
        found = f"both {' and '.join(sorted(kinds))}, of which one must go" if kinds else "no images"
        raise ValueError(f"{source} holds {found}; images can be {ACCEPTED}")
    return {"tar files": TarImages, "images": FolderImages}[kinds.pop()](path)


def _kinds_in(folder: Path) -> set[str]:
    """What the first folder, from the top, with anything readable in it holds."""
    # Downloads from the hub carry pictures of the data set beside their data, so parquet files are looked for first.
    if any((folder / marker).exists() for marker in SAVED_MARKERS) or any(
        next(place.glob("*.parquet"), None) for place in (folder, folder / "data")
    ):
        return {HUB}
    for _, names in walk(str(folder)):
        kinds = {"images" for name in names if is_image_name(name)}
        kinds |= {"tar files" for name in names if name.endswith(".tar")}
        kinds |= {"a Hugging Face data set" for name in names if name.endswith(".parquet")}
        if kinds:
            return kinds
    return set()


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
