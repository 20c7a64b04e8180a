"""The README's picture and the results table, from one or more finished demos.

    python docs/make_figures.py runs/demo-0 runs/demo-1 runs/demo-2

Writes docs/results/demo.png from the first and docs/results/demo.md from all of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from lwd.files import read_json, write_text
from lwd.schedules import schedule_from_dict

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "fd_embedded": ("distance, embedded network", 2),
    "fd_judge": ("distance, judge", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "accuracy": ("class accuracy", 3),
}
COLLAPSED, PICKED, STABLE = "#c2410c", "#1d4ed8", "#94a3b8"


def draw(demo: Path) -> None:
    """Left: the sweep over lambda. Right: samples of the learned schedule with AutoGuidance, one class a column."""
    sweep = read_json(demo / "sweep.json")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.9), width_ratios=[1, 1.35], layout="constrained")
    tau = torch.linspace(0, 1, 201)
    left.plot(tau, tau, color="black", linewidth=0.8, linestyle=":", label="synchronous")
    left.plot(tau, tau**5, color="black", linewidth=0.8, linestyle="--", label="extreme, τ⁵")
    for run in sweep["runs"]:
        picked = run["kinetic"] == sweep["picked"]
        colour = COLLAPSED if run["collapsed"] else PICKED if picked else STABLE
        state = ", collapsed" if run["collapsed"] else ", picked" if picked else ""
        with torch.no_grad():
            t = schedule_from_dict(run["schedule"])(tau).t[:, 0]
        left.plot(tau, t, color=colour, linewidth=2.6 if picked else 1.6, label=f"λ = {run['kinetic']:g}{state}")
    left.set(xlabel="global time τ = semantic time", ylabel="texture time", xlim=(0, 1), ylim=(0, 1))
    left.set_title("Schedules learned by the probe", loc="left")
    left.legend(frameon=False, fontsize=9)
    left.spines[["top", "right"]].set_visible(False)
    with np.load(demo / "samples" / "autoguidance.npz") as samples:
        images = samples["images"][:70].reshape(7, 10, 32, 32)
    right.imshow(images.transpose(0, 2, 1, 3).reshape(7 * 32, 10 * 32), cmap="gray_r", interpolation="lanczos")
    right.set_axis_off()
    right.set_title("Samples: learned schedule, AutoGuidance, not selected", loc="left")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "demo.png", dpi=110)


def tabulate(demos: list[Path]) -> None:
    """Mean and range over the demos of every arm's scores."""
    results = [read_json(demo / "results.json") for demo in demos]
    configs = [read_json(demo / "config.json") for demo in demos]
    seeds = [config["settings"]["demo"]["seed"] for config in configs]
    machine, versions = configs[0]["machine"], configs[0]["versions"]
    lines = [
        "# The demo, measured",
        "",
        f"`lwd demo --seed N`, seeds {', '.join(map(str, seeds))}; {machine['cores']} cores of {machine['processor']}, "
        f"{machine['platform'].partition('-')[0]}, torch {versions['torch']}; {configs[0]['started'][:10]}. Mean over "
        "the seeds, range in brackets. Lower distances are better; real training images set the floor. "
        "These are not FIDs: see the page.",
        "",
        "| | " + " | ".join(title for title, _ in COLUMNS.values()) + " | evaluations |",
        "| --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    arms = results[0]["arms"]
    rows = {arms[arm]["title"]: [r["arms"][arm]["final"] for r in results] for arm in arms}
    rows["real training images"] = [r["floor"] for r in results]
    for title, scores in rows.items():
        cells = [spread([score[name] for score in scores], digits) for name, (_, digits) in COLUMNS.items()]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {scores[0].get('evaluations', '')} |")
    picked = [read_json(demo / "sweep.json")["picked"] for demo in demos]
    minutes = [sum(r["seconds"].values()) / 60 for r in results]
    lines += [
        "",
        f"Picked lambda: {', '.join(map(str, picked))}. Minutes: {spread(minutes, 1)}.",
        "",
        "| lambda | " + " | ".join(f"texture time at tau = 1/2, seed {seed}" for seed in seeds) + " | collapsed |",
        "| --- |" + " --- |" * (len(seeds) + 1),
    ]
    sweeps = [read_json(demo / "sweep.json")["runs"] for demo in demos]
    for runs in zip(*sweeps, strict=True):
        halves = [f"{midpoint(run):.3f}" for run in runs]
        collapsed = ", ".join("yes" if run["collapsed"] else "no" for run in runs)
        lines.append(f"| {runs[0]['kinetic']:g} | " + " | ".join(halves) + f" | {collapsed} |")
    unguided = {name: arm for name, arm in arms.items() if arm["by_evaluations"]}
    lines += ["", "Distance by the judge against model evaluations, mean over the seeds:", ""]
    lines += ["| | " + " | ".join(["fewest", "", "", "most"]) + " |", "| --- |" + " --- |" * 4]
    for name, arm in unguided.items():
        points = zip(*(r["arms"][name]["by_evaluations"] for r in results), strict=True)
        cells = [f"{p[0]['evaluations']}: {statistics.fmean(e['fd_judge'] for e in p):.2f}" for p in points]
        lines.append(f"| {arm['title']} | " + " | ".join(cells) + " |")
    write_text(RESULTS / "demo.md", "\n".join(lines) + "\n")


def midpoint(run: dict[str, Any]) -> float:
    with torch.no_grad():
        return float(schedule_from_dict(run["schedule"])(torch.tensor([0.5])).t[0, 0])


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="+", type=Path, help="directories of finished demos")
    chosen = parser.parse_args().demos
    draw(chosen[0])
    tabulate(chosen)
