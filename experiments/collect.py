"""From the files of finished tasks to the few files that are kept with the code, and back to tables in memory.

    python -m experiments.collect

``docs/results/evidence/`` gets, for each set of images, ``probes-NAME.json``, ``surfaces-NAME.json`` and
``evaluations-NAME.json``. The last is what `lwd report` reads; each of its entries says in ``arm`` which task it comes
from. What is kept already stays, unless the same task was done again, so experiments can be spread over machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.images import DEFAULT_OUT
from experiments.sets import SETS, Places
from lwd.files import read_json, write_atomically
from lwd.surface import ErrorSurface

KEPT = Path("docs/results/evidence")
PROBE = "lwd-experiments-probes/1"
SURFACES = "lwd-experiments-surfaces/1"
EVALUATIONS = "lwd-evaluations/1"
Row = dict[str, Any]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Numbers of several seeds, in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; 0 of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def text(self, digits: int) -> str:
        """Mean ± standard deviation; of a single seed, the number alone."""
        spread = f" ± {self.deviation:.{digits}f}" if len(self.values) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


def spread(rows: Sequence[Row], key: Callable[[Row], K], value: Callable[[Row], float]) -> dict[K, Spread]:
    """The values of rows by key, seed by seed."""
    found: dict[K, dict[int, float]] = {}
    for row in rows:
        found.setdefault(key(row), {})[row["seed"]] = value(row)
    return {k: Spread(tuple(by_seed[seed] for seed in sorted(by_seed))) for k, by_seed in found.items()}


def collect(places: Places, kept: Path = KEPT) -> list[Path]:
    """Add results to the files of every set of images that has some; returns these files."""
    written = []
    for name in SETS:
        probes = [_probe(read_json(file)) for file in sorted((places.out / "probes" / name).rglob("result.json"))]
        scores = [read_json(file) for file in sorted((places.out / "trainings" / name).rglob("scores/*.json"))]
        surfaces = [_surface(file) for file in sorted((places.out / "surfaces" / name).rglob("result.json"))]
        floor = places.out / "judges" / name / "floor.json"
        if probes:
            written.append(_add(probes, kept / f"probes-{name}.json", "probes", {"format": PROBE}, _probe_task))
        if surfaces:
            written.append(
                _add(surfaces, kept / f"surfaces-{name}.json", "surfaces", {"format": SURFACES}, _surface_task)
            )
        if scores:
            path, found = kept / f"evaluations-{name}.json", [_score(score) for score in scores]
            floors = read_json(path)["floors"] if path.exists() else {}
            floors |= {_judge(row): read_json(floor) for row in found}
            written.append(_add(found, path, "results", {"format": EVALUATIONS, "floors": floors}, _score_task))
    return written


def _probe(found: Row) -> Row:
    """A probe without what its variant already says."""
    schedule = {key: found["schedule"][key] for key in ("kind", "groups", "parameters")}
    history = [[line["step"], round(line["delay"], 4)] for line in found["history"]]
    kept = ("data", "encoder", "seed", "kinetic", "variant", "delay", "collapsed", "steps", "burn_in", "seconds")
    return {key: found[key] for key in kept} | {"schedule": schedule, "delay_by_step": history} | _origin(found)


def _surface(file: Path) -> Row:
    """A surface, its numbers to four digits, and what curves cost on it."""
    found, surface = read_json(file), ErrorSurface.load(file.with_name("surface.safetensors"))
    paths = []
    for path in found["paths"]:
        schedule = (
            {key: path["schedule"][key] for key in ("kind", "groups", "parameters")} if "schedule" in path else None
        )
        paths.append(path | {"cost": round(path["cost"], 6), "schedule": schedule})
    numbers = {
        name: json.loads(json.dumps(getattr(surface, name).tolist()), parse_float=lambda x: float(f"{float(x):.4g}"))
        for name in ("times", "errors", "speeds")
    }
    kept = ("data", "encoder", "seed", "seconds", "images", "points")
    about = {key: found[key] for key in kept} | {"groups": surface.spec.to_dict()}
    return about | numbers | {"paths": paths} | _origin(found)


def _score(found: Row) -> Row:
    """A score as `lwd report` reads it, without where its files lay."""
    arm = {
        key: found[key]
        for key in ("data", "encoder", "seed", "scale", "interval", "scale_times", "free", "part", "along")
    }
    arm |= {"schedule": found["training_schedule"], "variant": found["training_variant"]}
    arm |= {"evaluations": found["evaluations"], "steps": found["steps"]}
    origin = found["generated"]["origin"]
    probe = origin["schedule"].get("provenance", {}).get("probe", {})
    provenance = {"probe": {key: probe[key] for key in ("kinetic", "jacobian") if key in probe}} if probe else {}
    origin = origin | {"run": None, "schedule": origin["schedule"] | {"provenance": provenance}}
    if origin["guidance"] and origin["guidance"]["weak"]:
        origin["guidance"] = origin["guidance"] | {"weak": origin["guidance"]["weak"] | {"run": None}}
    settings = found["settings"] | {"judge": {"sha256": found["settings"]["judge"]["sha256"]}}
    generated = found["generated"] | {"origin": origin}
    metrics = {key: float(f"{value:.5g}") for key, value in found["metrics"].items()}
    return {"arm": arm, "metrics": metrics, "generated": generated, "settings": settings} | _origin(found)


def _judge(score: Row) -> str:
    """Judges trained alike in different runs are not the same to the last digit."""
    sha256: str = score["settings"]["judge"]["sha256"]
    return sha256


def _origin(found: Row) -> Row:
    return {"machine": found["machine"], "versions": found["versions"]}


def _probe_task(row: Row) -> Hashable:
    return tuple(row[key] for key in ("data", "encoder", "seed", "kinetic", "variant"))


def _surface_task(row: Row) -> Hashable:
    return tuple(row[key] for key in ("data", "encoder", "seed"))


def _score_task(row: Row) -> Hashable:
    return json.dumps({key: value for key, value in row["arm"].items() if key != "evaluations"}, sort_keys=True)


def _add(rows: list[Row], path: Path, listed: str, about: Row, task: Callable[[Row], Hashable]) -> Path:
    """Add rows to those of a file, in the place of those of the same task.

    JSON with one line for every entry of the list: small, and a new result is a new line.
    """
    before = read_json(path)[listed] if path.exists() else []
    content = {task(row): row for row in [*before, *rows]}
    lines = ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in content.values())
    text = f'{json.dumps(about)[:-1]}, "{listed}": [\n{lines}\n]}}\n'
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Evidence:
    """What is kept of all sets of images, as flat rows.

    Attributes:
        probes: rows of `_probe`.
        scores: rows of arm and metrics.
        surfaces: rows of `_surface`.
        floors: metrics of real training images, by set and judge.
    """

    probes: list[Row]
    scores: list[Row]
    floors: dict[str, dict[str, Row]]
    surfaces: list[Row]

    @classmethod
    def load(cls, kept: Path = KEPT) -> Evidence:
        """Raises FileNotFoundError when nothing is kept there yet."""
        probes, scores, floors = list[Row](), list[Row](), dict[str, dict[str, Row]]()
        for file in sorted(kept.glob("probes-*.json")):
            probes += read_json(file)["probes"]
        surfaces = [row for file in sorted(kept.glob("surfaces-*.json")) for row in read_json(file)["surfaces"]]
        for file in sorted(kept.glob("evaluations-*.json")):
            data = read_json(file)
            floors[file.stem.removeprefix("evaluations-")] = data["floors"]
            scores += [_flat(result) for result in data["results"]]
        if not probes and not scores:
            raise FileNotFoundError(f"nothing is in {kept}: run `python -m experiments.collect` after some experiments")
        return cls(probes, scores, floors, surfaces)

    def sets(self) -> list[str]:
        """The sets of images there are results of, in the usual order."""
        there = {row["data"] for row in (*self.probes, *self.scores)}
        return [name for name in SETS if name in there]

    def some_probes(self, **wanted: Any) -> list[Row]:
        return _matching(self.probes, wanted)

    def some_scores(self, **wanted: Any) -> list[Row]:
        """Scores at 20 evaluations without guidance at the end of training, where nothing else is asked for."""
        usual = {
            "encoder": "middle", "steps": 20, "part": 1.0, "scale": (), "interval": (), "scale_times": (), "free": False
        }  # fmt: skip
        return _matching(self.scores, usual | wanted)


def _flat(result: Row) -> Row:
    """One row; what was sampled along another schedule is an arm of its own."""
    arm: Row = {key: tuple(value) if isinstance(value, list) else value for key, value in result["arm"].items()}
    along = arm.pop("along")
    if along:
        arm["schedule"] = f"{arm['schedule']} along {along}"
    return arm | result["metrics"] | {"judge": _judge(result)}


def _matching(rows: Iterable[Row], wanted: Row) -> list[Row]:
    """Rows with these values; None stands for any."""
    return [row for row in rows if all(value is None or row[key] == value for key, value in wanted.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the experiments are")
    parser.add_argument("--kept", type=Path, default=KEPT)
    chosen = parser.parse_args()
    for path in collect(Places(chosen.out), chosen.kept):
        print(path)


if __name__ == "__main__":
    main()
