"""What runs, sweeps, evaluations and sets of samples there are below some paths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lwd.files import read_json
from lwd.report.read import _read_log

OTHERS = {"config.json", "schedule.json", "latents.json", "origin.json", "manifest.json", "meta.json"}
"""JSON that belongs to a directory which is read as a whole."""


@dataclass(frozen=True)
class Result:
    """One set of images, scored.

    Attributes:
        source: the file it is from.
        data: as `lwd.evaluation.Evaluation.to_dict` describes it.
    """

    source: Path
    data: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.data["metrics"]  # type: ignore[no-any-return]

    @property
    def origin(self) -> Mapping[str, Any]:
        return self.data["generated"].get("origin") or {}

    @property
    def images(self) -> int:
        return int(self.data["generated"]["count"])

    @property
    def network(self) -> str:
        """Whose features were compared."""
        if "extractor" in self.data:
            return str(self.data["extractor"].get("name"))
        return f"judge {str(self.data.get('settings', {}).get('judge', {}).get('sha256'))[:8]} of small data"

    @property
    def reference(self) -> tuple[str, str]:
        """Name and hash."""
        about = self.data.get("reference") or self.data.get("settings", {}).get("reference", {})
        return Path(str(about.get("name") or about.get("path"))).name, str(about.get("sha256"))

    @property
    def deviations(self) -> Sequence[str]:
        protocol = self.data.get("protocol", [])
        return [] if protocol == "complete" else list(protocol)

    @property
    def label(self) -> str:
        """What the model is called: its recipe, or the directory of its run."""
        recipe, run = self.origin.get("recipe"), self.origin.get("run")
        return str(recipe or (Path(run).name if run else Path(self.data["generated"]["name"]).name))

    @property
    def step(self) -> int | None:
        return self.origin.get("step")

    @property
    def guidance(self) -> str:
        """``""`` without guidance, else for example ``"AutoGuidance 1.5"``."""
        about = self.origin.get("guidance")
        if not about:
            return ""
        kind = {"autoguidance": "AutoGuidance", "classifier-free": "CFG"}[about["kind"]]
        scale = about["scale"]
        if isinstance(scale, Mapping):
            values = " ".join(f"{tau:g}:{w}" for tau, w in zip(scale["tau"], scale["scale"], strict=True))
        else:
            values = " / ".join(f"{w:g}" for w in scale)
        spans = "".join(f" in [{a:g}, {b:g}]" for a, b in about["interval"] or ())
        return f"{kind} {values}{spans}"

    @property
    def sampler(self) -> str:
        origin = self.origin
        steps = f", {origin['steps']} steps" if origin.get("steps") else ""
        return f"{origin['solver']}{steps}" if origin.get("solver") else ""

    @property
    def schedule(self) -> str:
        """``"learned"`` (with its lambda, where that is on record), ``"offset:0.3"``, or the kind of another one."""
        about = self.origin.get("schedule") or {}
        kind, probe = about.get("kind", ""), (about.get("provenance") or {}).get("probe") or {}
        if kind == "polynomial":
            return f"learned, λ {probe['kinetic']:g}" if "kinetic" in probe else "learned"
        return f"offset:{about['parameters']['delta']:g}" if kind == "offset" else str(kind)

    @cached_property
    def experiment(self) -> tuple[str, ...]:
        """Equal for results that differ in nothing but seeds, and in the iterations of one training."""
        origin = self.origin
        weak = (origin.get("guidance") or {}).get("weak") or {}
        named = origin.get("recipe") or origin.get("run") or self.data["generated"].get("name")
        # A learned curve is another one with every seed: its lambda says what was asked for.
        curve = self.schedule if "λ" in self.schedule else (origin.get("schedule") or {}).get("parameters")
        parts = [named, self.guidance, weak.get("recipe") or weak.get("run"), weak.get("step"), curve]
        parts += [origin.get(key) for key in ("batch_size", "parameters", "placement", "atol", "rtol")]
        parts += [self.sampler, _without_places(origin.get("encoders")), self.deviations]
        parts.append(self.data.get("settings", {}).get("distances"))
        return tuple(json.dumps(part, sort_keys=True) for part in parts)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for one set of images scored twice with the same outcome."""
        generated = self.data["generated"]
        content = generated.get("sha256") or self.source
        return (
            content,
            self.origin.get("run"),
            self.step,
            self.origin.get("seed"),
            *self.comparable,
            *self.metrics.items(),
        )

    @cached_property
    def comparable(self) -> tuple[Any, ...]:
        """Equal for results whose numbers may stand in one column."""
        return self.network, *self.reference, self.images


@dataclass(frozen=True)
class Run:
    """A training run: its log and its schedule."""

    path: Path
    config: Mapping[str, Any]
    schedule: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    @property
    def label(self) -> str:
        recipe = self.config.get("settings", {}).get("recipe")
        return f"{recipe} ({self.path.name})" if recipe else self.path.name


@dataclass(frozen=True)
class Collected:
    """Everything found; `unused` is JSON that is none of it."""

    results: list[Result] = field(default_factory=list)
    sweeps: dict[Path, Mapping[str, Any]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    samples: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.results or self.sweeps or self.runs or self.samples)


def collect(paths: Sequence[Path | str]) -> Collected:
    """Search files and directories, without repeating what several paths hold.

    Raises:
        FileNotFoundError: no such path.
        ValueError: a file that is named but is nothing of ours, or is damaged; nothing found at all.
    """
    found, seen = Collected(), set[Path]()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path} to report on")
        files = sorted(path.rglob("*.json*")) if path.is_dir() else [path]
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                _add(found, file, named=not path.is_dir())
    if found.empty:
        raise ValueError(
            f"nothing to report on in {', '.join(map(str, paths))}: no evaluation of `lwd evaluate --out`, no run of "
            "`lwd train`, no sweep of `lwd probe`, no set of `lwd sample`"
        )
    return found


def _add(found: Collected, file: Path, *, named: bool) -> None:
    here = file.parent
    if file.name == "metrics.jsonl":
        if (here / "schedule.json").is_file() and (here / "latents.json").is_file():
            config = read_json(here / "config.json") if (here / "config.json").is_file() else {}
            found.runs.append(Run(here, config, read_json(here / "schedule.json"), _read_log(file)))
        return
    if file.suffix != ".json" or file.name in OTHERS or "parts" in file.parts or "records" in file.parts:
        if named:
            raise ValueError(f"{file} is part of a directory; give the directory")
        return
    data = read_json(file)
    kind = data.get("format") if isinstance(data, dict) else None
    if kind == "lwd-evaluations/1":
        known = {result.identity for result in found.results}
        found.results.extend(r for r in _results(file, data) if r.identity not in known)
    elif kind == "lwd-samples/1":
        found.samples.append(here)
    elif isinstance(data, dict) and {"runs", "picked"} <= data.keys():
        found.sweeps[file] = data
    elif named:
        raise ValueError(f"{file} is no evaluation, sweep or set of samples (its format is {kind!r})")
    else:
        found.unused.append(file)


def _results(file: Path, data: Mapping[str, Any]) -> list[Result]:
    """The results of a file of evaluations, without repetitions; ValueError, with the file, when it is damaged."""
    try:
        results = [Result(file, result) for result in data["results"]]
        return list({result.identity: result for result in results if result.metrics and result.experiment}.values())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is a damaged file of evaluations ({type(error).__name__}: {error})") from error


def _without_places(about: Any) -> Any:
    """What describes encoders, without where their files lie: the same encoder may lie elsewhere."""
    if not isinstance(about, Mapping):
        return about
    return {key: _without_places(value) for key, value in about.items() if key not in ("source", "file", "explained")}
