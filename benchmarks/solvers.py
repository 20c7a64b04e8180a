"""Error and feature distance against evaluations, for every solver and placement of steps, on the demo's models.

    make demo                                                   # trains the models, minutes
    python benchmarks/solvers.py runs/demo --out solvers.json --figure solvers.png

The error is the root mean square difference of the final latents from the converged ones (dopri5 per image at
atol = rtol = 1e-6 in float32), relative to the latents' own root mean square, over images of several seeds of noise.
The feature distances are those of the demo, on one set of images. Placing steps by kinetic energy takes a pilot run
per model, which is not counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd.data.embedded import load_embedded_images
from lwd.encoders.efficientnet import EfficientNetFeatures
from lwd.evaluation.judge import Judge
from lwd.evaluation.small_data import evaluate_images, reference_features
from lwd.files import read_json, write_json
from lwd.interpolant import global_velocity
from lwd.machine import describe_machine, describe_versions
from lwd.pipeline import Pipeline, image_seed
from lwd.placement import KineticDensity, kinetic_density, place_steps
from lwd.sampling import sample, seeded_noise
from lwd.solvers import SOLVERS, RungeKutta

PLACEMENTS = {
    "euler": ("uniform", "kinetic"),
    "heun": ("uniform", "kinetic"),
    "midpoint": ("uniform", "kinetic"),
    "dpmpp2m": ("uniform", "kinetic", "cosine"),
    "dpmpp3m": ("uniform", "kinetic", "cosine"),
    "ab2": ("uniform", "kinetic", "cosine"),
    "ab3": ("uniform", "kinetic", "cosine", "kinetic cosine"),
}
RTOLS = (1e-1, 1e-2, 1e-3, 1e-4)
JUDGED = {
    ("ab3", "cosine"): (8, 10, 14, 20),
    ("dpmpp2m", "cosine"): (10, 20),
    ("heun", "uniform"): (10, 20),
}
CONVERGED = {"atol": 1e-6, "rtol": 1e-6}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="directory of a finished demo (`make demo`: runs/demo)")
    parser.add_argument("--arms", nargs="*", default=["learned", "offset", "synchronous"])
    parser.add_argument("--evaluations", nargs="*", type=int, default=[6, 8, 10, 14, 20, 30, 40, 60])
    parser.add_argument("--seeds", type=int, default=3, help="sets of noise, over which the spread is given")
    parser.add_argument("--images", type=int, default=12, help="of each seed, for errors")
    parser.add_argument("--judged", type=int, default=500, help="images of a set for feature distances")
    parser.add_argument("--parts", nargs="*", default=["errors", "distances"])
    parser.add_argument("--out", type=Path, help="write the result here; parts not measured now are kept")
    parser.add_argument("--figure", type=Path, help="draw the result here (PNG)")
    chosen = parser.parse_args()
    if not (chosen.demo / "results.json").is_file():
        raise SystemExit(f"{chosen.demo} holds no finished demo: run `make demo`, and pass its directory")
    device = torch.device("cpu")
    kept = chosen.out is not None and chosen.out.is_file()
    result: dict[str, Any] = read_json(chosen.out) if kept else {}
    result |= {"machine": describe_machine(device), "versions": describe_versions()}
    result.setdefault("settings", {})
    models = {arm: Pipeline.from_pretrained(chosen.demo / "train" / arm, device=device, precision="fp32")
              for arm in chosen.arms}  # fmt: skip
    for part in chosen.parts:
        if part not in ("errors", "distances"):
            parser.error(f"--parts are errors and distances, not {part}")
        rows = []
        for arm, model in models.items():
            density = kinetic_density(
                model.denoiser, model.schedule, *noise_of(model, "pilot", range(16)), points=32, spec=model.spec
            )
            found = errors(model, density, chosen) if part == "errors" else distances(model, density, chosen)
            rows += [{"arm": arm} | row for row in found]
        result[part] = rows
        used = ("seeds", "images", "evaluations") if part == "errors" else ("judged",)
        result["settings"][part] = {name: getattr(chosen, name) for name in used}
        if chosen.out is not None:
            write_json(chosen.out, result)
    print_tables(result)
    if chosen.figure is not None:
        draw(result, chosen.figure)


def noise_of(model: Pipeline, purpose: int | str, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Noise and labels of some images of one seed; "pilot" is a seed that no error is measured on."""
    seed = 1_000 if purpose == "pilot" else int(purpose)
    noise = seeded_noise([image_seed(seed, i) for i in indices], model.latent_shape, model.device)
    return noise, torch.tensor([i % model.config.num_classes for i in indices], device=model.device)


def step_times(model: Pipeline, density: KineticDensity, solver: str, placement: str, evaluations: int) -> list[float]:
    """Times of as many steps as the evaluations allow; empty where they do not divide, or are too few for the path."""
    method = SOLVERS[solver]
    stages = len(method.c) if isinstance(method, RungeKutta) else 1
    if evaluations % stages or evaluations // stages <= len(model.schedule.kinks):
        return []
    return place_steps(
        model.schedule,
        evaluations // stages,
        density if placement.startswith("kinetic") else None,
        spacing="cosine" if placement.endswith("cosine") else "uniform",
    )


# --- errors --------------------------------------------------------------------------------------------------------


def errors(model: Pipeline, density: KineticDensity, chosen: argparse.Namespace) -> list[Row]:
    """Error against evaluations on one model."""
    drawn = [noise_of(model, seed, range(chosen.images)) for seed in range(chosen.seeds)]
    noise, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))

    def solve(**options: Any) -> Any:
        return sample(model.denoiser, model.schedule, noise, labels, spec=model.spec, **options)

    exact = solve(**CONVERGED).latents

    def row(solver: str, placement: str, evaluations: float, latents: Tensor, **more: Any) -> Row:
        per_seed = [
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(latents.chunk(chosen.seeds), exact.chunk(chosen.seeds), strict=True)
        ]
        found = {"solver": solver, "placement": placement, "evaluations": evaluations,
                 "error": statistics.fmean(per_seed), "per_seed": per_seed, **more}  # fmt: skip
        print(f"{model.schedule.kind:<12} {solver:<12} {placement:<15} {evaluations:6.1f}  {found['error']:.2e}")
        return found

    rows = []
    for solver, placements in PLACEMENTS.items():
        for placement in placements:
            for evaluations in chosen.evaluations:
                times = step_times(model, density, solver, placement, evaluations)
                if times:
                    rows.append(row(solver, placement, evaluations, solve(solver=solver, steps=times).latents))
    for rtol in RTOLS:
        found = solve(atol=1e-3 * rtol, rtol=rtol)
        mean = found.evaluations_per_image.double().mean().item()
        rows.append(row("dopri5", "per image", mean, found.latents, rtol=rtol, most=found.evaluations))
        latents, calls = by_torchdiffeq(model, noise, labels, 1e-3 * rtol, rtol)
        rows.append(row("torchdiffeq", "whole batch", calls, latents, rtol=rtol))
    return rows


def by_torchdiffeq(model: Pipeline, noise: Tensor, labels: Tensor, atol: float, rtol: float) -> tuple[Tensor, int]:
    """torchdiffeq's dopri5: one step size for the whole batch, over the kinks. Latents and evaluations."""
    from torchdiffeq import odeint

    calls = 0

    def velocity(tau: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        t, dt = model.schedule.local_times(tau.clamp(0, 1).repeat(len(z)))
        return global_velocity(model.denoiser(z, t, labels).to(z.dtype), dt, model.spec)

    with torch.no_grad():
        states = odeint(velocity, noise, torch.tensor([0.0, 1.0]), atol=atol, rtol=rtol, method="dopri5")
    return states[-1], calls


# --- feature distances ---------------------------------------------------------------------------------------------


def distances(model: Pipeline, density: KineticDensity, chosen: argparse.Namespace) -> list[Row]:
    """The demo's two distances against evaluations on one model, the same noise throughout."""
    judge = Judge.load(chosen.demo / "judge" / "judge.safetensors", model.device)
    embedded = EfficientNetFeatures.load(model.device).pooled
    real = load_embedded_images("heldout").images
    reference = reference_features(real, judge=judge, embedded=embedded)
    noise, labels = noise_of(model, 0, range(chosen.judged))

    def row(solver: str, placement: str, **options: Any) -> Row:
        found = sample(
            model.denoiser, model.schedule, noise, labels, spec=model.spec, solver=solver, **options
        )  # fmt: skip
        images = model.decode(found.latents)[:, 0]
        scores = evaluate_images(images, labels, judge=judge, embedded=embedded, reference=reference)
        evaluations = found.evaluations_per_image.double().mean().item()
        kept = {name: scores[name] for name in ("fd_judge", "fd_embedded", "accuracy")}
        print(f"{model.schedule.kind:<12} {solver:<12} {placement:<15} {evaluations:6.1f}  "
              + "  ".join(f"{name} {value:.3f}" for name, value in kept.items()))  # fmt: skip
        return {"solver": solver, "placement": placement, "evaluations": evaluations, **kept}

    rows = [row("dopri5", "per image")]
    for (solver, placement), counts in JUDGED.items():
        for evaluations in counts:
            times = step_times(model, density, solver, placement, evaluations)
            rows.append(row(solver, placement, steps=times))
    return rows


# --- tables and figure ---------------------------------------------------------------------------------------------


def least_evaluations(rows: Sequence[Row], target: float) -> float | None:
    """Where the error, a straight line in logarithms between measured counts, stays below `target` from then on."""
    rows = sorted(rows, key=lambda row: row["evaluations"])
    if rows[-1]["error"] > target:
        return None
    for before, after in zip(rows[-2::-1], rows[:0:-1], strict=True):
        if before["error"] > target:
            part = math.log(before["error"] / target) / math.log(before["error"] / after["error"])
            return before["evaluations"] * (after["evaluations"] / before["evaluations"]) ** part
    return rows[0]["evaluations"]


def series(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each solver and placement."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["solver"], row["placement"]), []).append(row)
    return found


def print_tables(result: dict[str, Any]) -> None:
    """Least evaluations by schedule, and the feature distances, as Markdown."""
    if "errors" in result:
        by_arm: dict[str, list[Row]] = {}
        for row in result["errors"]:
            by_arm.setdefault(row["arm"], []).append(row)
        heads = [f"{arm}, {percent:g} %" for arm in by_arm for percent in (1, 0.1)]
        print("\n| solver | steps | " + " | ".join(heads) + " |\n| --- | --- |" + " --- |" * len(heads))
        for solver, placement in series(result["errors"]):
            cells = []
            for rows in by_arm.values():
                for target in (0.01, 0.001):
                    least = least_evaluations(series(rows)[solver, placement], target)
                    cells.append("-" if least is None else f"{math.ceil(least - 1e-9)}")
            print(f"| {solver} | {placement} | " + " | ".join(cells) + " |")
    if "distances" in result:
        print(
            "\n| schedule | solver | steps | evaluations | judge | embedded | class accuracy |\n" + "| --- " * 7 + "|"
        )
        for row in result["distances"]:
            print(f"| {row['arm']} | {row['solver']} | {row['placement']} | {row['evaluations']:.0f} "
                  f"| {row['fd_judge']:.2f} | {row['fd_embedded']:.0f} | {row['accuracy']:.3f} |")  # fmt: skip


LINES: dict[tuple[str, str], dict[str, Any]] = {
    ("euler", "uniform"): {"color": "#a8a29e"},
    ("heun", "uniform"): {"color": "#78716c", "linestyle": "--"},
    ("midpoint", "uniform"): {"color": "#78716c"},
    ("dpmpp2m", "uniform"): {"color": "#c2410c", "linestyle": "--"},
    ("dpmpp2m", "cosine"): {"color": "#c2410c"},
    ("dpmpp3m", "cosine"): {"color": "#f59e0b"},
    ("ab3", "uniform"): {"color": "#1d4ed8", "linestyle": ":"},
    ("ab3", "kinetic"): {"color": "#1d4ed8", "linestyle": "--"},
    ("ab3", "cosine"): {"color": "#1d4ed8", "linewidth": 3.0},
    ("dopri5", "per image"): {"color": "#15803d"},
    ("torchdiffeq", "whole batch"): {"color": "#15803d", "linestyle": "--"},
}


def draw(result: dict[str, Any], path: Path) -> None:
    """A column a schedule: error above, distance by the judge below."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from lwd.files import write_atomically
    from lwd.report.figures import PAPER, STYLE

    parts: dict[str, tuple[str, Callable[[float], str]]] = {
        "errors": ("error to the converged solution", lambda y: f"{100 * y:g} %"),
        "distances": ("distance, judge", lambda y: f"{y:g}"),
    }
    shown = [part for part in parts if part in result]
    arms = list(dict.fromkeys(row["arm"] for row in result[shown[0]]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(arms), 4.3 * len(shown) + 0.9), layout="constrained", facecolor=PAPER)
        grid = figure.subplots(len(shown), len(arms), squeeze=False, sharex=True, sharey="row")
        handles: dict[str, Any] = {}
        for part, row in zip(shown, grid, strict=True):
            title, written = parts[part]
            key = "error" if part == "errors" else "fd_judge"
            for arm, axes in zip(arms, row, strict=True):
                axes.set_facecolor(PAPER)
                axes.set_title(f"{arm}: {title}", loc="left", fontsize=12.5)
                axes.set_xlabel("evaluations per image")
                axes.set_xscale("log")
                ticks = [6, 10, 20, 40, 80, 160, 320]
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
                axes.tick_params(labelbottom=True)
                axes.xaxis.set_minor_formatter(NullFormatter())
                if part == "errors":
                    axes.set_yscale("log")
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, written=written: written(y)))
                for name, points in series([r for r in result[part] if r["arm"] == arm]).items():
                    if name in LINES:  # in the order measured: more steps, or lower tolerances
                        xs, ys = [r["evaluations"] for r in points], [r[key] for r in points]
                        (line,) = axes.plot(xs, ys, marker="o", markersize=4.5, **LINES[name])
                        handles.setdefault(", ".join(name), line)
                        if len(points) == 1:
                            axes.axhline(ys[0], color=line.get_color(), linewidth=1.3, linestyle=":")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


if __name__ == "__main__":
    main()
