"""Sets of images to be scored: what `lwd sample` wrote, a folder of PNGs, an npz, a tensor.

They are read in batches, never whole, never twice.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lwd.files import read_json

SAMPLES, SAMPLES_FORMAT = "samples.json", "lwd-samples/1"
"""What `lwd sample` writes last, into the directory of a set, and its format."""

_KEYS = ("arr_0", "images")  # ADM's, and ours for small data
_READERS = min(16, max(4, os.cpu_count() or 4))
_CHUNK = 1 << 24


class ImageSet(Protocol):
    """A set of equally large images in a fixed order.

    Attributes:
        name: where they come from, for messages and results.
        shape: (channels, height, width).
        origin: optional; how they were generated, as `lwd sample` notes it. Results repeat it.
    """

    name: str
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 [size, C, H, W] in order, a shorter one last."""

    def sha256(self) -> str | None:
        """Hash of the content and order; None where it is not known beforehand (then nothing is cached)."""


def open_images(source: str | Path | Tensor | np.ndarray | ImageSet) -> ImageSet:
    """Images of a set of `lwd sample`, a folder of PNGs, an npz, a tensor [N, C, H, W] or an array [N, H, W, C].

    An npz has its images in `arr_0` or `images`. Of a set that `lwd sample` wrote, `origin` says how it was made.

    Raises:
        FileNotFoundError: no such path.
        ValueError: a set of samples that is unfinished or of latents; an empty folder, a file that is neither, images
            that are not uint8 or that differ in size.
        ImportError: Pillow is missing (PNGs).
    """
    if isinstance(source, Tensor):
        return TensorImages(source)
    if isinstance(source, np.ndarray):
        return TensorImages(_to_channels_first(source, "the array"))
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    if path.is_dir():
        if (path / SAMPLES).is_file():
            return open_samples(path)
        _refuse_other_runs(path)
        return PNGFolder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no folder or npz file of images at {path}")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder of PNG files nor an npz file")
    return NpzImages(path)


def open_samples(directory: Path) -> NpzImages | PNGFolder:
    """The images of a finished set that `lwd sample` wrote; ValueError if they are latents, or not all there."""
    found = read_json(directory / SAMPLES)
    if not isinstance(found, dict) or found.get("format") != SAMPLES_FORMAT:
        raise ValueError(f"{directory / SAMPLES} is not of the format {SAMPLES_FORMAT}; draw the samples again")
    form = found.get("form")
    if form == "latents":
        raise ValueError(
            f"{directory} holds latents, which have to be decoded before they are scored: run its `lwd sample` again "
            "without `--form latents`"
        )
    if form == "png":
        images: NpzImages | PNGFolder = PNGFolder(directory / "images")
    elif form == "npz":
        images = NpzImages(directory / "samples.npz")
    else:
        raise ValueError(f"{directory / SAMPLES} says form {form!r}; there are png, npz and latents")
    if len(images) != found.get("images"):
        raise ValueError(
            f"{directory} has {len(images)} images, its {SAMPLES} says {found.get('images')}: files were added or "
            "lost; draw the samples again"
        )
    images.name, images.origin = str(directory), found.get("origin")
    return images


def _refuse_other_runs(directory: Path) -> None:
    """ValueError for directories of ours that are no finished images, though PNG files may lie in them."""
    if (directory / "manifest.json").is_file():
        raise ValueError(f"{directory} is a set of latents; give the images that it was encoded from, or decoded ones")
    config = directory / "config.json"
    settings = read_json(config) if config.is_file() else None
    if not isinstance(settings, dict) or "command" not in settings:
        return
    command = str(settings["command"])
    if command.split()[1:2] in (["train"], ["probe"], ["demo"]):
        raise ValueError(f"{directory} is what `{command}` wrote, not a set of images; draw some with `lwd sample`")
    raise ValueError(f"{directory} is an unfinished set of samples (no {SAMPLES}); run its command again: {command}")


class TensorImages:
    """Images uint8 [N, C, H, W] or [N, H, W] (grey) in memory."""

    origin: dict[str, Any] | None = None

    def __init__(self, images: Tensor, name: str = "tensor") -> None:
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or not len(images):
            raise ValueError(f"images must be uint8 [N, C, H, W], N >= 1, got {images.dtype} {list(images.shape)}")
        self.images = images[:, None] if images.ndim == 3 else images
        self.name = name
        channels, height, width = self.images.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from self.images.split(size)

    def sha256(self) -> str:
        digest = _started(self.shape, len(self))
        for part in self.images.split(max(1, _CHUNK // self.images[0].numel())):
            digest.update(np.ascontiguousarray(part.permute(0, 2, 3, 1).cpu().numpy()).data)
        return digest.hexdigest()


class NpzImages:
    """Array `arr_0` uint8 [N, H, W, 3] of an npz file (ADM's form), or `images` [N, H, W]: mapped, or unpacked as read.

    Raises:
        ValueError: not an npz, no such array, another dtype or shape.
    """

    origin: dict[str, Any] | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                key = next((key for key in _KEYS if f"{key}.npy" in names), None)
                if key is None:
                    held = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
                    raise ValueError(f"it holds no array {' or '.join(_KEYS)}, only {held}")
                self._member = f"{key}.npy"
                with archive.open(self._member) as file:
                    shape, fortran, dtype = _npy_header(file)
                    header = file.tell()
                entry = archive.getinfo(self._member)
        except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is not an npz of images or is damaged: {error}") from error
        if dtype != np.uint8 or len(shape) not in (3, 4) or not all(shape) or fortran:
            raise ValueError(
                f"{path}: {key} must be uint8 [N, H, W, 3] with N >= 1, got {dtype} {list(shape)}"
                + (" in Fortran order" if fortran else "")
                + ("; latents have to be decoded, and images rounded to 8 bits, first" if dtype.kind == "f" else "")
            )
        self._count = shape[0]
        self._stored: tuple[int, ...] = tuple(shape[1:])
        self.shape = (shape[3] if len(shape) == 4 else 1, shape[1], shape[2])
        self._offset = _data_offset(path, entry) + header if entry.compress_type == zipfile.ZIP_STORED else None
        if self.shape[0] not in (1, 3):
            raise ValueError(f"{path}: {key} has {self.shape[0]} channels in its last axis; images have 1 or 3")

    def __len__(self) -> int:
        return self._count

    def _arrays(self, size: int) -> Iterator[np.ndarray]:
        try:
            if self._offset is not None:
                shape = (self._count, *self._stored)
                mapped = np.memmap(self.path, np.uint8, "r", self._offset, shape)
                for start in range(0, self._count, size):
                    yield np.array(mapped[start : start + size])  # a copy: torch wants memory it may write to
                return
            item = int(np.prod(self._stored))
            with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as file:
                _npy_header(file)
                for start in range(0, self._count, size):
                    count = min(size, self._count - start)
                    content = file.read(count * item)
                    if len(content) != count * item:
                        raise ValueError(f"it ends after {start + len(content) // item} of {self._count} images")
                    yield np.frombuffer(bytearray(content), np.uint8).reshape(count, *self._stored)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged: {error}; copy or make it again") from error

    def batches(self, size: int) -> Iterator[Tensor]:
        for array in self._arrays(size):
            yield _to_channels_first(array, self.name)

    def sha256(self) -> str:
        digest = _started(self.shape, len(self))
        for array in self._arrays(max(1, _CHUNK // int(np.prod(self._stored)))):
            digest.update(array.data)
        return digest.hexdigest()


class PNGFolder:
    """PNG files under a folder in the order of their names, 8 bits, grey or RGB. Decoded by a few threads, ahead.

    Grey files among files in colour are read as colour; where all are grey, so is the set. The hash is of the files,
    not of the pixels: hashing takes seconds, decoding 50,000 files minutes.
    """

    origin: dict[str, Any] | None = None

    def __init__(self, folder: Path) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError('reading PNG files needs Pillow: pip install "lwd[encoders]"') from error
        self.folder, self.name = folder, str(folder)
        self.files = sorted((p for p in folder.rglob("*") if p.suffix.lower() == ".png"), key=lambda p: p.as_posix())
        if not self.files:
            others = sorted({p.suffix or p.name for p in folder.iterdir()})
            hint = "; latents have to be decoded to images first" if ".safetensors" in others else ""
            held = f" (but {', '.join(others[:5])})" if others else ""
            raise ValueError(f"{folder} holds no PNG files{held}{hint}")
        self.shape: tuple[int, int, int] = _read_png(self.files[0]).shape
        if self.shape[0] == 1 and not all(map(_is_grey, self.files)):
            self.shape = (3, *self.shape[1:])

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, file: Path) -> np.ndarray:
        image = _read_png(file)
        if image.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{file} has {image.shape[2]}x{image.shape[1]} pixels, {self.files[0].name} "
                f"{self.shape[2]}x{self.shape[1]}; all images must have one size"
            )
        return np.broadcast_to(image, self.shape)

    def batches(self, size: int) -> Iterator[Tensor]:
        parts = [self.files[start : start + size] for start in range(0, len(self.files), size)]
        with ThreadPoolExecutor(_READERS) as pool:
            ahead = [pool.submit(self._read, file) for file in parts[0]]
            for following in [*parts[1:], []]:
                current, ahead = ahead, [pool.submit(self._read, file) for file in following]
                try:
                    yield torch.from_numpy(np.stack([future.result() for future in current]))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def sha256(self) -> str:
        digest = _started(self.shape, len(self))
        for file in self.files:
            content = file.read_bytes()
            digest.update(struct.pack("<q", len(content)))
            digest.update(content)
        return digest.hexdigest()


def _read_png(file: Path) -> np.ndarray:
    """uint8 [C, H, W], C = 1 or 3; errors name the file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "P", "RGB"):
                raise ValueError(f"its mode is {image.mode}; images are scored as 8-bit RGB or grey")
            array = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _is_grey(file: Path) -> bool:
    """By the header: colour type 0 follows the signature, the IHDR chunk's frame, two sizes and the depth."""
    with open(file, "rb") as opened:
        return opened.read(26)[25:] == b"\0"


def _to_channels_first(array: np.ndarray, name: str) -> Tensor:
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise ValueError(f"{name}: images must be uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}")
    images = torch.from_numpy(array)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype); `file` is left at the data."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where an uncompressed member's bytes begin: its local header says how long its own name and notes are."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    return entry.header_offset + 30 + name + extra


def _started(shape: tuple[int, ...], count: int) -> hashlib._Hash:
    return hashlib.sha256(f"{count} images of {shape}\n".encode())
