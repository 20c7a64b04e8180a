"""Images in tar shards and in Hugging Face data sets on disk. `lwd.data.images.open_images` picks between them."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lwd.data.images import (
    SAVED_MARKERS,
    ImageError,
    ListedImages,
    decode_image,
    is_image_name,
    read_image,
    refuse_splits,
    walk,
)

if TYPE_CHECKING:
    from PIL import Image

LABEL_COLUMNS = ("label", "labels", "fine_label")
OPEN_FILES = 128  # tar files open at a time, well below the usual limit of 1,024


class TarImages(ListedImages):
    """Images in uncompressed tar files, which are indexed once and then read at random.

    The classes come from the first of these that the files have:

    - integers beside the images (webdataset): ``key.cls``, or "label" or "cls" in ``key.json``; classes are named "0"
      to "K-1", K the largest label + 1. Other images of a key (``key.mask.png``) are left out.
    - folders, ``n01440764/x.JPEG``; leading folders that all images share are dropped.
    - one tar file per class, named by the class, as ImageNet's ``n01440764.tar``.

    Images keep the order of the tar files, sorted by name, and of their members. An image is named by its path in the
    archive (with the class in front for one tar per class; with the tar's name in front where names repeat).

    Args:
        paths: a .tar file, a folder (with subfolders) of them, a glob, or a sequence of .tar files.

    Raises:
        OSError: a file is missing or may not be read.
        ValueError: no tar files or no images; a tar file that is truncated, compressed or damaged, or holds links
            instead of images; images without a label when others have one; tar files of several splits.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        files, where = _tar_files(paths)
        first_words = (re.split(r"[-_.\d]", file.stem)[0] for file in files)
        refuse_splits(first_words, f"{where} holds tar files called", "with a glob such as 'train-*.tar'")
        indices = [_index(str(file)) for file in files]
        members = [_Member(i, name, *place) for i, index in enumerate(indices) for name, place in index.images.items()]
        if not members:
            raise ValueError(f"no images in the {len(files)} tar files of {where}; tar files in tar files stay closed")
        if any(index.labels for index in indices):
            members, labels, class_names = _labelled(members, indices, files)
            names = [member.name for member in members]
        else:
            names, labels, class_names = _classes_from_names(members, indices, files)
        if len(set(names)) < len(names):
            root = Path(os.path.commonpath([file.parent for file in files]))
            names = [f"{files[m.tar].relative_to(root)}/{name}" for m, name in zip(members, names, strict=True)]
        self._files = [str(file) for file in files]
        # Arrays, which a million images need 24 MB of, and which forked processes share.
        self._tar, self._offset, self._size = np.array([(m.tar, m.offset, m.size) for m in members]).T.copy()
        self._open = lru_cache(maxsize=OPEN_FILES)(_OpenFile)
        super().__init__("tar", where, names, labels, class_names)

    def read(self, index: int) -> Image.Image:
        path, size = self._files[self._tar[index]], int(self._size[index])
        what = f"{self.names[index]} in {path}"
        try:
            data = self._open(path).read(size, int(self._offset[index]))
        except OSError as error:
            raise ImageError(f"{what} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise ImageError(f"{what} cannot be read: the tar file was truncated after it was indexed")
        return decode_image(data, what)


class HubImages(ListedImages):
    """A Hugging Face data set on disk: a folder that `save_to_disk` made, or one of parquet files, as downloaded.

    The images are the first Image column; the labels the first ClassLabel column, else an integer column called label,
    labels or fine_label. Parquet files are unpacked once into Hugging Face's cache (``HF_DATASETS_CACHE``), which takes
    as much room again. Images are decoded here: `datasets` would apply the EXIF orientation, the other readers do not.
    An image is called ``class/file`` where the data set has unique file names, else ``split/row``.

    Args:
        split: which part; None for "train", or for the only part.

    Raises:
        ImportError: Hugging Face's `datasets` is missing.
        ValueError: the folder is unreadable, damaged or no such data set; no such split; no images or labels in it.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        root = os.path.abspath(Path(path).expanduser())
        data, split = _load_hub(root, split)
        import datasets  # type: ignore[import-untyped]

        where, features = f"the split {split!r} of {root}", data.features
        # Without Hugging Face's own metadata, the image column of a parquet file is a plain structure.
        plain = [name for name, feature in features.items() if isinstance(feature, dict) and "bytes" in feature]
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)] or plain
        classed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        integers = [name for name in LABEL_COLUMNS if "int" in getattr(features.get(name), "dtype", "")]
        if not len(data) or not columns or not classed + integers:
            raise ValueError(
                f"{where} has {len(data)} rows with the columns {', '.join(features)}; it needs images, and labels: a "
                f"ClassLabel column, or integers in a column called {' or '.join(LABEL_COLUMNS)}"
            )
        labels = data.select_columns([(classed + integers)[0]]).with_format("numpy")[:][(classed + integers)[0]]
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"{where} has rows without a label (none, or -1 as test sets have)")
        class_names = features[classed[0]].names if classed else [str(label) for label in range(int(labels.max()) + 1)]
        self._column = columns[0]
        self._images = data.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        names = _file_names(self._images, self._column, [class_names[label] for label in labels.tolist()])
        names = names or [f"{split}/{row:08}" for row in range(len(data))]
        self._split = split
        super().__init__("hub", root, names, torch.from_numpy(labels), class_names)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"split": self._split}

    def read(self, index: int) -> Image.Image:
        what = f"{self.names[index]} in {self.path}"
        stored = self._images[index][self._column]
        if stored and stored["bytes"] is not None:
            return decode_image(stored["bytes"], what)
        if stored and stored["path"]:
            return read_image(stored["path"], what)
        raise ImageError(f"{what}: the data set holds nothing for this image")


# --- tar files ---------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """An image in the tar file of number `tar`."""

    tar: int
    name: str
    offset: int
    size: int


class _TarIndex(NamedTuple):
    """What is in a tar file: images' (offset, size) by name, labels as found by key, names of files beside images."""

    images: dict[str, tuple[int, int]]
    labels: dict[str, Any]
    others: list[str]


class _OpenFile:
    """A file that is closed when nobody refers to it any more; `read` does, so never while a thread is reading."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.descriptor, size, offset)  # has no position that threads and forks could share

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _tar_files(paths: str | Path | Sequence[str | Path]) -> tuple[list[Path], str]:
    """The tar files that `paths` means, sorted, and what to call them together."""
    if not isinstance(paths, str | Path):
        files = [Path(os.path.abspath(path)) for path in paths]
        where = os.path.commonpath(files) if files else "an empty list"
    else:
        where = os.path.abspath(Path(paths).expanduser())
        if os.path.isdir(where):
            files = [Path(folder, name) for folder, names in walk(where) for name in names if name.endswith(".tar")]
        else:
            files = [Path(where)] if os.path.exists(where) else [Path(name) for name in glob.glob(where)]
    if not files:
        raise FileNotFoundError(f"no tar files at {where}")
    return sorted(files), where


def _index(path: str) -> _TarIndex:
    """Read the headers of a tar file, and the labels beside its images."""
    images, labels, others = index = _TarIndex({}, {}, [])
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header, gigabytes of them
                name = member.name.removeprefix("./")
                key, _, suffix = name.rpartition(".")
                if member.isdir() or "/." in "/" + name:
                    continue
                if is_image_name(name):
                    if not member.isreg() or member.issparse():
                        raise ValueError(
                            f"{name} in {path} is a link or sparse; pack again with tar --hard-dereference -h"
                        )
                    images[name] = member.offset_data, member.size
                    continue
                label = _label(file, member)
                if label is None:
                    others.append(name)
                elif suffix == "cls" or key not in labels:
                    labels[key] = label
            # tarfile stops without a word where a header is damaged or the file ends between two members.
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is truncated, damaged, or no uncompressed tar file: {error}") from error
    if end != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{path} is truncated or damaged after {archive.offset} bytes; get it again")
    return index


def _label(file: IO[bytes], member: tarfile.TarInfo) -> Any:
    """What a .cls member, or "label" or "cls" in a .json member, says; None where nothing does."""
    if not member.name.endswith((".cls", ".json")):
        return None
    content = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        value = json.loads(content)
    except ValueError:
        value = content[:40].decode(errors="replace")
    if member.name.endswith(".cls"):
        return value
    return value.get("label", value.get("cls")) if isinstance(value, dict) else None


def _labelled(
    members: Sequence[_Member], indices: Sequence[_TarIndex], files: Sequence[Path]
) -> tuple[list[_Member], Tensor, list[str]]:
    """The images that have a label beside them, those labels, and the classes' names."""
    kept, labels = [], []
    for member in members:
        what, known = f"{member.name} in {files[member.tar]}", indices[member.tar].labels
        key = member.name.rpartition(".")[0]
        folder, slash, base = key.rpartition("/")
        if key in known:
            if type(known[key]) is not int or known[key] < 0:
                raise ValueError(f"the label of {what} is {known[key]!r}; labels are integers from 0")
            kept.append(member)
            labels.append(known[key])
        elif folder + slash + base.partition(".")[0] not in known:  # else it is an extra, such as key.mask.png
            raise ValueError(f"{what} has no label beside it, but other images have one")
    if not kept:
        raise ValueError(f"no image is named like a label (key.png and key.cls); the last one is {what}")
    return kept, torch.tensor(labels), [str(number) for number in range(max(labels) + 1)]


def _classes_from_names(
    members: Sequence[_Member], indices: Sequence[_TarIndex], files: Sequence[Path]
) -> tuple[list[str], Tensor, list[str]]:
    """Names, labels and classes of images that are in class folders or in one tar file per class."""
    folders = {member.name.rpartition("/")[0] for member in members}
    if folders == {""}:
        for file, index in zip(files, indices, strict=True):
            if index.others or not index.images:  # captions, say: then a tar file is a shard, not a class
                found = f"{index.others[0]} beside its images" if index.images else "no images"
                raise ValueError(f"{file} holds {found}, so it is no class; and no image has a label or a class folder")
        names = [f"{files[member.tar].stem}/{member.name}" for member in members]
    elif "" in folders:
        loose = next(member for member in members if "/" not in member.name)
        raise ValueError(f"{loose.name} in {files[loose.tar]} is in no folder, but other images are in class folders")
    else:
        parts = [folder.split("/") for folder in folders]
        shared = os.path.commonprefix([part[:-1] for part in parts])  # noqa: RUF071 (of lists, it compares items)
        names = [member.name.split("/", len(shared))[-1] for member in members]
    classes = [name.partition("/")[0] for name in names]
    class_names = sorted(set(classes))
    refuse_splits(class_names, "the tar files hold the folders", "in tar files of its own")
    number = {name: label for label, name in enumerate(class_names)}
    return names, torch.tensor([number[name] for name in classes]), class_names


# --- Hugging Face data sets --------------------------------------------------------------------------------------


def _load_hub(root: str, split: str | None) -> tuple[Any, str]:
    """The `datasets.Dataset` of a split, and the split's name."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Hugging Face data sets need an extra: pip install "lwd[encoders]"') from error
    parts: dict[str, Any]
    with _explaining(root):
        if any(os.path.exists(os.path.join(root, marker)) for marker in SAVED_MARKERS):
            saved = datasets.load_from_disk(root)
            parts = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        else:
            parts = _parquet_splits(root)
    split = split or ("train" if len(parts) > 1 else next(iter(parts), "train"))
    if split not in parts:
        raise ValueError(f"{root} has no split {split!r}; it has {', '.join(parts) or 'no .parquet files'}")
    if isinstance(parts[split], list):
        with _explaining(root):  # always as "train", since not every name is allowed there
            return datasets.load_dataset("parquet", data_files={"train": parts[split]}, split="train"), split
    return parts[split], split


@contextmanager
def _explaining(root: str) -> Iterator[None]:
    """Turns what `datasets` raises about damaged files into a ValueError that names the folder."""
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    try:
        yield
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{root} is no readable Hugging Face data set ({reason}); get or save it again") from error


def _parquet_splits(root: str) -> dict[str, list[str]]:
    """Parquet files by split: ``train-00000-of-00010.parquet`` and ``train/0000.parquet`` are parts of "train", and so
    is the first with 16 hexadecimal digits behind it, as the hub once named them."""
    splits: dict[str, list[str]] = {}
    for folder, names in walk(root):
        for name in names:
            if name.endswith(".parquet"):
                stem = re.sub(r"(-\d+-of-\d+(-[0-9a-f]{16})?|[-_.]?\d+)$", "", name.removesuffix(".parquet"))
                inside = os.path.basename(folder) if folder != root else "train"
                splits.setdefault(stem or inside, []).append(os.path.join(folder, name))
    for split, files in splits.items():
        if len(folders := sorted({os.path.dirname(file) for file in files})) > 1:
            raise ValueError(f"several folders hold files of the split {split!r}, pass one: {', '.join(folders)}")
    return splits


def _file_names(images: Any, column: str, classes: Sequence[str]) -> list[str] | None:
    """``class/file`` for every image; None where the data set does not have a unique one for each."""
    from pyarrow import compute  # type: ignore[import-untyped]

    paths = compute.struct_field(images.with_format("arrow")[:].column(column), "path").to_pylist()
    if not all(paths):
        return None
    names = [f"{label}/{path.rpartition('/')[2]}" for label, path in zip(classes, paths, strict=True)]
    return names if len(set(names)) == len(names) else None
