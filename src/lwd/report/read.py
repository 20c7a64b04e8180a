"""The files of a demo, read once; whatever a partial run lacks is None or empty."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lwd.files import read_json

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DemoFiles:
    """What a demo left in its directory.

    Attributes:
        config: command, machine, versions, settings.
        sweep: the probes over lambda, as `lwd.sweep.Sweep.to_dict` describes them.
        results: arms and their scores, the floor, seconds of every stage.
        logs: log lines of every trained arm.
        samples: arm (or "real") -> images uint8 [N, H, W] or [N, H, W, 3] and labels [N].
        trajectory: tau [K], t [K, G], texture, semantic and predicted images [K, ...], label.
    """

    config: Mapping[str, Any]
    sweep: Mapping[str, Any] | None
    results: Mapping[str, Any]
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    samples: Mapping[str, Mapping[str, Array]]
    trajectory: Mapping[str, Array] | None

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.config.get("settings", {})

    @property
    def arms(self) -> Mapping[str, Any]:
        return self.results.get("arms", {})

    @property
    def class_names(self) -> Sequence[str]:
        return self.settings.get("data", {}).get("class_names", [])


def read_demo(directory: Path) -> DemoFiles:
    """Read what is there.

    Raises:
        FileNotFoundError: no such directory, or no demo in it.
        ValueError: a file is damaged; the message names it.
    """
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no demo (it has no config.json); make one with `lwd demo --directory {directory}`"
        )

    def optional(name: str) -> Any:
        return read_json(directory / name) if (directory / name).exists() else None

    trajectory = directory / "trajectory.npz"
    return DemoFiles(
        config=optional("config.json"),
        sweep=optional("sweep.json"),
        results=optional("results.json") or {},
        logs={path.parent.name: _read_log(path) for path in sorted(directory.glob("train/*/metrics.jsonl"))},
        samples={path.stem: _read_arrays(path, "images", "labels") for path in sorted(directory.glob("samples/*.npz"))},
        trajectory=_read_arrays(trajectory, "tau", "t", "texture", "semantic", "predicted", "label")
        if trajectory.exists()
        else None,
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the line that an interrupted run was writing
            raise ValueError(f"{path}, line {number} is not JSON ({error}); delete the line") from error
    return rows


def _read_arrays(path: Path, *names: str) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged or lacks one of the arrays {', '.join(names)} ({error}); "
            "delete it and run `lwd demo` again with the same directory"
        ) from error
