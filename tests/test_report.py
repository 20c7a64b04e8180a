"""The page of a demo: complete, honest in words, self-contained, and laid out without overflow in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lwd.data.embedded import load_embedded_images
from lwd.schedules import OffsetSchedule, PolynomialSchedule, SynchronousSchedule

KINETICS = (0.0, 0.02, 0.04, 0.08, 0.16)
DISTANCES = {"learned": (31.2, 14.1), "offset": (33.9, 13.2), "synchronous": (36.3, 17.5), "autoguidance": (24.0, 12.9)}
TITLES = {
    "learned": "learned schedule",
    "offset": "SFD offset 0.3",
    "synchronous": "synchronous",
    "autoguidance": "learned + AutoGuidance",
}


def build_demo(directory: Path, *, per_class: int = 10, collapse: bool = False, points: int = 8) -> Path:
    """The files of a demo, made up: noisy real images as samples, curves that look like a run's."""
    rng = np.random.default_rng(0)
    real, labels, names = load_embedded_images("heldout")
    write_config(directory, names)
    runs = [make_probe(k, i, collapse, points, rng) for i, k in enumerate(KINETICS)]
    picked = None if collapse else 0.04
    write(directory / "sweep.json", {"criterion": "A made-up criterion.", "picked": picked, "runs": runs})
    used = runs[-1 if collapse else 2]["schedule"]
    schedules = {
        "learned": used,
        "offset": OffsetSchedule(0.3).to_dict(),
        "synchronous": SynchronousSchedule().to_dict(),
        "autoguidance": used,
    }
    arms = {arm: make_arm(arm, *DISTANCES[arm], schedules[arm]) for arm in DISTANCES}
    floor = {"fd_embedded": 9.1, "fd_judge": 3.4, "precision": 0.82, "recall": 0.81, "accuracy": 0.99, "images": 1000.0}
    seconds = {"encode": 41.0, "judges": 60.0, "sweep": 190.2, "train learned": 185.0, "sample and judge": 201.0}
    write(directory / "results.json", {"arms": arms, "floor": floor, "seconds": seconds})

    (directory / "samples").mkdir()
    rows = [torch.nonzero(labels == i % 10)[i // 10, 0].item() for i in range(10 * per_class)]
    chosen, asked = real.numpy()[rows], labels.numpy()[rows]
    for noise, arm in enumerate(("real", *DISTANCES)):
        noisy = chosen + rng.normal(0, 9 * noise, chosen.shape) * (chosen > 0)
        np.savez(directory / "samples" / f"{arm}.npz", images=noisy.clip(0, 255).astype(np.uint8), labels=asked)
    make_trajectory(directory / "trajectory.npz", chosen[8], rng)
    for arm, level in {"learned": 0.82, "offset": 0.9, "synchronous": 0.86, "weak": 1.0}.items():
        lines = []
        for step in range(20, 301 if arm == "weak" else 901, 900 // (points * 5)):
            loss = level + 1.4 * np.exp(-step / 90) + rng.normal(0, 0.01)
            groups = {"loss_texture": loss * 0.8, "loss_semantic": loss * 1.2}
            lines.append({"step": step, "loss": loss + 0.4, "flow": loss, **groups, "images_per_second": 640.0})
        (directory / "train" / arm).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "train" / arm / "metrics.jsonl").write_text(text + '{"step": 12, "lo')
    return directory


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def write_config(directory: Path, names: tuple[str, ...]) -> None:
    write(
        directory / "config.json",
        {
            "command": "lwd demo --directory runs/demo <b>",
            "version": "0.1.0",
            "budget": 1.0,
            "seed": 0,
            "started": "2026-07-01T09:30:00+0000",
            "machine": {"platform": "Linux", "processor": "Some CPU @ 2.10GHz", "cores": 2, "device": "cpu"},
            "versions": {"python": "3.11.7", "lwd": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0"},
            "settings": {
                "demo": {"images": 1000, "solver": "heun", "steps": 12},
                "probe": {"steps": 400, "burn_in": 250, "batch_size": 64, "optimizer": {"lr": 0.001}},
                "sweep": {"kinetics": list(KINETICS)},
                "train": {"steps": 900, "batch_size": 128, "snapshots": [225, 450]},
                "guidance": {"scale": 1.5},
                "data": {"name": "Fashion-MNIST, embedded part", "class_names": list(names)},
            },
        },
    )


def make_probe(kinetic: float, i: int, collapse: bool, points: int, rng: np.random.Generator) -> dict[str, Any]:
    start, end = torch.tensor([0.54, -4, -4, -4, -4]), torch.tensor([0.54, -2, -1.5, 0.2, 0.9 - 0.4 * i])
    bad = collapse or i < 2
    if bad:
        end = torch.tensor([-5.0 + i, -5, -5, -5, 3 - i])
    history = []
    for step in np.linspace(400 / points, 400, points).astype(int).tolist():
        rho = start + (end - start) * (1 - np.exp(-step / 90)) + torch.from_numpy(rng.normal(0, 0.05, 5)).float()
        t = PolynomialSchedule(rho=rho)(torch.tensor([0.5])).t[0].tolist()
        terms = {"flow": 1.2, "kinetic": 0.9, "loss": 1.3, "delay": 0.5, "rho": [rho.tolist()]}
        history.append({"step": step, "midpoint": t, **terms})
    schedule = PolynomialSchedule(rho=end).to_dict()
    return {"kinetic": kinetic, "collapsed": bad, "delay": 0.95 - 0.15 * i, "schedule": schedule, "history": history}


def make_arm(arm: str, embedded: float, judge: float, schedule: dict[str, Any]) -> dict[str, Any]:
    last = {"fd_embedded": embedded, "fd_judge": judge}
    scores = {"precision": 0.71, "recall": 0.52, "accuracy": 0.931, "evaluations": 24, "solver": "heun", "images": 1000}
    guided = arm == "autoguidance"

    def rows(name: str, factors: dict[int, float]) -> list[dict[str, Any]]:
        return [{name: at, **{k: v * factor for k, v in last.items()}} for at, factor in factors.items()]

    return {
        "title": TITLES[arm],
        "schedule": schedule,
        "guidance": 1.5 if guided else None,
        "final": last | scores,
        "by_step": [] if guided else rows("step", {225: 3.0, 450: 1.6, 900: 1.0}),
        "by_evaluations": [] if guided else rows("evaluations", {4: 4.1, 8: 1.9, 16: 1.15, 24: 1.0}),
        "steps": 900,
        "parameters": 4_410_000,
        "train_seconds": 185.3,
    }


def make_trajectory(path: Path, image: np.ndarray[Any, Any], rng: np.random.Generator) -> None:
    tau = np.array([0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
    t = np.stack([tau**2.2, tau], axis=1)
    s = t[:, 0, None, None]
    blurred = image * (0.3 + 0.7 * s)
    noisy = s * image + (1 - s) * rng.normal(110, 70, (len(tau), 32, 32))
    colours = rng.integers(0, 255, (len(tau), 4, 4, 3)) * (1 - t[:, 1, None, None, None]) + 90 * t[:, 1, None, None, None]
    arrays = {"texture": noisy, "predicted": blurred, "semantic": colours}
    stored = {name: values.clip(0, 255).astype(np.uint8) for name, values in arrays.items()}
    np.savez(path, tau=tau, t=t, label=np.array(8), **stored)
