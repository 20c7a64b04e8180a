"""Generated images on disk: whole parts only, written behind the sampling.

    images/000000.png ...            form "png"
    samples.npz                      form "npz": arr_0 (images) and arr_1 (labels), as ADM's evaluator takes them
    latents/00000.safetensors ...    form "latents": latents (normalised, [N, C, h, w]) and labels

While they are made, ``parts/`` holds a record of every part that is done (and, for the npz, its images).
"""

from __future__ import annotations

import shutil
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lwd.files import read_json, wait_for, write_atomically, write_json
from lwd.generation.draw import channels_last

Form = Literal["png", "npz", "latents"]
PART = 250
"""Images per part: what a killed process loses at most, besides its batch."""
_ENCODERS = 8
_BATCHES_AHEAD = 2


class SampleStore:
    """The set of `count` generated images in `directory`.

    Args:
        labels: the class of every image.
    """

    def __init__(self, directory: Path, form: Form, labels: Sequence[int], *, part: int = PART) -> None:
        self.directory, self.form, self.labels, self.part = directory, form, labels, part
        self.parts = [range(i, min(i + part, len(labels))) for i in range(0, len(labels), part)]
        if form == "png":
            try:
                import PIL.Image  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    'writing PNG files needs Pillow: pip install "lwd[encoders]"; or --form npz'
                ) from error

    def record(self, number: int) -> Path:
        return self.directory / "parts" / f"{number:05}.json"

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """The parts that are still to be made, of those that are this process's."""
        return [n for n in range(rank, len(self.parts), world) if not self.record(n).is_file()]

    def write_part(self, number: int, arrays: Tensor, evaluations: Sequence[int], encoders: ThreadPoolExecutor) -> None:
        """Write images uint8 [n, c, H, W], or latents, of one part, and then its record."""
        rows = self.parts[number]
        if self.form == "png":
            list(encoders.map(self._write_png, rows, channels_last(arrays).numpy()))
        elif self.form == "npz":
            images = channels_last(arrays).numpy()
            write_atomically(self._part_file(number), lambda path: _save_npy(path, images))
        else:
            content = {"latents": arrays.contiguous(), "labels": torch.tensor([self.labels[i] for i in rows])}
            write_atomically(self._part_file(number), lambda path: save_file(content, path))
        write_json(self.record(number), {"evaluations": list(evaluations), "shape": list(arrays.shape[1:])})

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Wait for all parts, put them together and write ``samples.json``; returns its content.

        Args:
            about: further entries for it.
        """
        wait_for([self.record(n) for n in range(len(self.parts))])
        records = [read_json(self.record(n)) for n in range(len(self.parts))]
        evaluations = [count for record in records for count in record["evaluations"]]
        if self.form == "npz":
            self._join(records[0]["shape"])
        mean = sum(evaluations) / len(evaluations)
        summary = {
            "format": "lwd-samples/1",
            "images": len(self.labels),
            "form": self.form,
            "evaluations": {"mean": mean, "max": max(evaluations)},
            **about,
        }
        summary["origin"] = summary["origin"] | {"evaluations": mean}
        write_json(self.directory / "samples.json", summary)
        shutil.rmtree(self.directory / "parts")
        return summary

    def _part_file(self, number: int) -> Path:
        folder, suffix = ("latents", "safetensors") if self.form == "latents" else ("parts", "npy")
        return self.directory / folder / f"{number:05}.{suffix}"

    def _write_png(self, index: int, image: np.ndarray) -> None:
        from PIL import Image

        path = self.directory / "images" / f"{index:06}.png"
        write_atomically(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))

    def _join(self, shape: Sequence[int]) -> None:
        """The parts as one npz, written part by part: 50,000 images need not fit in memory."""
        channels, height, width = shape
        whole = (len(self.labels), height, width) if channels == 1 else (len(self.labels), height, width, channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": whole}

        def write(path: Path) -> None:
            # Stored, not compressed: the evaluation maps it.
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
                    for number in range(len(self.parts)):
                        file.write(np.load(self._part_file(number), mmap_mode="r").tobytes())
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(self.labels, np.int64))

        write_atomically(self.directory / "samples.npz", write)


class StoreWriter:
    """Takes batches from the device and writes parts as they fill, in the background. A context manager."""

    def __init__(self, store: SampleStore) -> None:
        self.store = store
        self._collector, self._encoders = ThreadPoolExecutor(1, "lwd-collect"), ThreadPoolExecutor(_ENCODERS, "lwd-png")
        self._waiting: deque[Future[None]] = deque()
        self._rows: dict[int, list[tuple[int, Tensor, int]]] = {}

    def put(self, indices: Sequence[int], arrays: Tensor, evaluations: Tensor) -> None:
        """Hand over images uint8 [n, c, H, W] (or latents) of the set's `indices`; the device does not wait.

        Raises:
            OSError: an earlier batch could not be written.
        """
        host, copied = _to_host(arrays)
        self._waiting.append(self._collector.submit(self._collect, list(indices), host, copied, evaluations.tolist()))
        while len(self._waiting) > _BATCHES_AHEAD:
            self._waiting.popleft().result()

    def _collect(self, indices: list[int], host: Tensor, copied: Any, evaluations: list[int]) -> None:
        if copied is not None:
            copied.synchronize()
        for row in zip(indices, host, evaluations, strict=True):
            self._rows.setdefault(row[0] // self.store.part, []).append(row)
        for number in [n for n, rows in self._rows.items() if len(rows) == len(self.store.parts[n])]:
            rows = sorted(self._rows.pop(number), key=lambda row: row[0])
            arrays = torch.stack([array for _, array, _ in rows])
            self.store.write_part(number, arrays, [count for *_, count in rows], self._encoders)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._waiting and error is None:
                self._waiting.popleft().result()
        finally:
            self._collector.shutdown(cancel_futures=error is not None)
            self._encoders.shutdown()


def batches_of(parts: Iterable[range], size: int) -> Iterator[list[int]]:
    """The images of `parts` in batches of `size`, across their borders; a shorter one last."""
    waiting: list[int] = []
    for index in (i for part in parts for i in part):
        waiting.append(index)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _to_host(arrays: Tensor) -> tuple[Tensor, Any]:
    """A copy on the CPU that is under way, and the event that says when it has arrived."""
    if arrays.device.type != "cuda":
        return arrays.cpu(), None
    host = torch.empty(arrays.shape, dtype=arrays.dtype, pin_memory=True)
    host.copy_(arrays, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(arrays.device))  # of that device, not of the current one
    return host, event


def _save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    """Write a compressed npz, whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    return write_atomically(path, write)
