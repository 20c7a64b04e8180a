"""What a demo left in its directory, read for the page. Stages that have not run yet are simply absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwd.files import read_json

UNGUIDED = ("learned", "offset", "synchronous")
ARMS = (*UNGUIDED, "autoguidance")
TITLES = {
    "learned": "learned schedule",
    "offset": "SFD offset",
    "synchronous": "synchronous",
    "autoguidance": "learned + AutoGuidance",
    "weak": "weak model for guidance",
}

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Inputs:
    """The files of one demo.

    Attributes:
        samples: by arm, and ``"real"``: images uint8 [N, H, W], labels int64 [N].
        training: by arm, the log lines of its training.
    """

    config: dict[str, Any]
    sweep: dict[str, Any]
    results: dict[str, Any]
    samples: dict[str, Arrays]
    trajectory: Arrays
    training: dict[str, list[dict[str, Any]]]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The judged arms, in the order of the page."""
        arms = self.results.get("arms", {})
        return {arm: arms[arm] for arm in ARMS if arm in arms}

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The probes, weakest lambda first."""
        return sorted(self.sweep.get("runs", []), key=lambda run: run["kinetic"])

    @property
    def used(self) -> dict[str, Any] | None:
        """The probe whose schedule was trained on: the picked one, or the strongest where all collapsed."""
        picked = self.sweep.get("picked")
        named = [run for run in self.runs if run["kinetic"] == picked]
        return (named or self.runs or [None])[-1]

    @property
    def classes(self) -> list[str]:
        return list(self.setting("data", "class_names", default=[]))

    def title(self, arm: str) -> str:
        return str(self.arms.get(arm, {}).get("title", TITLES.get(arm, arm)))

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    def setting(self, *names: str, default: Any = None) -> Any:
        found: Any = self.config.get("settings", {})
        for name in names:
            if not isinstance(found, dict) or name not in found:
                return default
            found = found[name]
        return found


def read_inputs(directory: Path) -> Inputs:
    """Read what is there.

    Raises:
        FileNotFoundError: nothing of a demo is there.
        ValueError: a file is damaged; the message names it.
    """
    found = {name: directory / f"{name}.json" for name in ("config", "sweep", "results")}
    if not any(path.exists() for path in found.values()):
        raise FileNotFoundError(
            f"{directory} holds no demo (none of config.json, sweep.json, results.json); make one with `lwd demo`"
        )
    stored = {name: read_json(path) if path.exists() else {} for name, path in found.items()}
    samples = {arm: _read_arrays(directory / "samples" / f"{arm}.npz") for arm in ("real", *ARMS)}
    training = {arm: _read_lines(directory / "train" / arm / "metrics.jsonl") for arm in (*UNGUIDED, "weak")}
    return Inputs(
        **stored,
        samples={arm: arrays for arm, arrays in samples.items() if arrays},
        trajectory=_read_arrays(directory / "trajectory.npz"),
        training={arm: lines for arm, lines in training.items() if lines},
    )


def _read_arrays(path: Path) -> Arrays:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy lets zipfile's, zlib's and its own errors through
        raise ValueError(f"{path} is not a readable npz file ({error}); delete it and run the demo again") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Log lines; what an interrupted run left half-written is skipped."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
