"""`lwd demo`: the whole method on embedded images, from pixels to a page.

Every stage leaves a file in the run's directory and is skipped when that file is there, so an interrupted demo goes
on where it was; training and probes go on from their own checkpoints.

    latents/  judge/  probe/  sweep.json  train/<arm>/  samples/<arm>.npz  trajectory.npz  results.json  report.html
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwd.compute import Precision
from lwd.data import LatentDataset, TensorLatents
from lwd.data.embedded import CLASS_NAMES, encode_embedded, load_embedded_images
from lwd.evaluation import Judges
from lwd.files import read_json, write_json
from lwd.generation import DrawnImages, SampleConfig, channels_last, draw_images, image_seed, save_npz
from lwd.machine import default_precision, pick_device
from lwd.pipeline import DEFAULT_SCALE, Pipeline
from lwd.placement import Spacing
from lwd.progress import counting, duration
from lwd.randomness import derived_seed
from lwd.recipes import Recipe, get_recipe, make_schedule
from lwd.report import write_report
from lwd.runs import initial_denoiser, write_run_config
from lwd.sampling import sample, seeded_noise
from lwd.schedules import Schedule
from lwd.sweep import Sweep, sweep_kinetic
from lwd.training import train

TITLES = {
    "learned": "learned schedule",
    "offset": "SFD offset 0.3",
    "synchronous": "synchronous",
    "autoguidance": "learned + AutoGuidance",
}
RECIPE_OF = {
    "learned": "embedded",
    "offset": "embedded-offset",
    "synchronous": "embedded-synchronous",
    "weak": "embedded-weak",
}
TRAJECTORY_IMAGE = 8
"""Which image of the judged sets is shown on its way."""


@dataclass(frozen=True)
class DemoConfig:
    """What a demo does; everything here decides the result.

    Attributes:
        budget: factor on all training steps and image counts; 1 takes minutes on two cores.
        images: images per set that is judged, before the budget.
        solver, spacing, steps: for the judged sets; the sets for "quality against evaluations" use the same solver. Of
            the solvers with so few evaluations this one comes closest to the flow (docs/results/solvers.md).
        evaluation_steps: solver steps for "quality against evaluations".
    """

    budget: float = 1.0
    seed: int = 0
    images: int = 1000
    solver: str = "ab3"
    spacing: Spacing = "cosine"
    steps: int = 20
    evaluation_steps: tuple[int, ...] = (6, 8, 12)
    precision: Precision = "bf16"
    compile: bool = False

    @property
    def scaled_images(self) -> int:
        """A multiple of 10, the number of classes, and enough for the judges' statistics."""
        return max(40, 10 * round(self.images * min(self.budget, 5.0) / 10))


class Demo:
    """One demo run in one directory."""

    def __init__(self, directory: Path, config: DemoConfig, device: torch.device) -> None:
        self.directory, self.config, self.device = directory, config, device
        self.recipes = {arm: self._recipe(name) for arm, name in RECIPE_OF.items()}
        self.stages = Stages(directory)

    def _recipe(self, name: str) -> Recipe:
        recipe = get_recipe(name).scaled(self.config.budget)
        run: dict[str, Any] = {
            "seed": self.config.seed,
            "precision": self.config.precision,
            "compile": self.config.compile,
        }
        probe = None if recipe.probe is None else replace(recipe.probe, **run)
        return replace(recipe, probe=probe, train=replace(recipe.train, **run))

    def run(self) -> Path:
        """All stages; returns the path of the page."""
        if find_spec("matplotlib") is None:  # better now than after the last stage
            raise ImportError('the report needs matplotlib: pip install "lwd[demo]"')
        self.write_config()
        with self.stages.stage("encode"):
            encode_embedded(self.directory / "latents", progress=counting("encode images", "image"))
        with self.stages.stage("judges"):
            self.judges.prepare(self._one_of_every_class)
            heldout = load_embedded_images("heldout")
            real = self.directory / "samples" / "real.npz"
            save_npz(real, images=heldout.images.numpy(), labels=heldout.labels.numpy())
        with self.stages.stage("sweep"):
            sweep = self.sweep()
        schedules = self.schedules(sweep)
        for arm in RECIPE_OF:
            with self.stages.stage(f"train {arm}"):
                self.train(arm, schedules[arm])
        results: dict[str, Any] = {"floor": self.judges.floor(), "arms": {}}
        with self.stages.stage("sample and judge"):
            for arm in TITLES:
                results["arms"][arm] = self.judge_arm(arm, schedules[arm])
            self.trajectory()
        results["seconds"] = self.stages.seconds
        write_json(self.directory / "results.json", results)
        return write_report(self.directory)

    # --- stages ----------------------------------------------------------------------------------------------------

    def write_config(self) -> None:
        path = self.directory / "config.json"
        learned, weak = self.recipes["learned"], self.recipes["weak"]
        assert learned.probe is not None
        settings = {
            "demo": asdict(self.config),
            "probe": asdict(learned.probe) | {"kinetic": list(learned.kinetics)},
            "backbone": learned.backbone.to_dict(),
            "train": asdict(learned.train),
            "weak backbone": weak.backbone.to_dict(),
            "weak train": asdict(weak.train),
            "guidance": {"scale": DEFAULT_SCALE},
            "data": {"name": "Fashion-MNIST, embedded part", "class_names": list(CLASS_NAMES)},
        }
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            write_run_config(self.directory, self.device, **settings)
        elif read_json(path)["settings"] != settings:
            raise ValueError(
                f"{self.directory} holds a demo with other settings; delete it or pass another --directory"
            )

    @cached_property
    def judges(self) -> Judges:
        return Judges(
            self.directory / "judge",
            lambda part: load_embedded_images(part)[:2],
            name="Fashion-MNIST, embedded part",
            seed=derived_seed(self.config.seed, "judge"),
            steps=max(20, round(600 * min(self.config.budget, 1.0))),
            device=self.device,
        )

    def _one_of_every_class(self, labels: Tensor) -> Tensor:
        """The training images that make the floor: one of every class in turn, like the generated sets."""
        order = labels.argsort(stable=True).view(len(CLASS_NAMES), -1).T.flatten()
        return order[: self.config.scaled_images]

    def distances(self, drawn: DrawnImages) -> dict[str, float]:
        judged = self.judges.judge(drawn.images, drawn.labels)
        return {name: judged[name] for name in ("fd_embedded", "fd_judge")}

    @cached_property
    def latents(self) -> TensorLatents:
        return LatentDataset.open(self.directory / "latents" / "train").to_memory(self.device)

    def sweep(self) -> Sweep:
        path = self.directory / "sweep.json"
        if path.exists():
            return Sweep.load(path)
        recipe = self.recipes["learned"]
        assert recipe.probe is not None
        sweep = sweep_kinetic(
            lambda: initial_denoiser(recipe.backbone, self.config.seed),
            self.latents,
            recipe.probe,
            recipe.kinetics,
            directory=self.directory / "probe",
            device=self.device,
        )
        sweep.save(path)
        return sweep

    def schedules(self, sweep: Sweep) -> dict[str, Schedule]:
        names = sweep.probes[0].schedule.names
        # At a tiny budget no probe may settle or collapse; the strongest lambda then stands in, and the page says so.
        learned = sweep.schedule if sweep.picked is not None else sweep.probes[-1].schedule
        fixed = {arm: make_schedule(self.recipes[arm].schedule, names) for arm in ("offset", "synchronous")}
        return {"learned": learned, "weak": learned, "autoguidance": learned, **fixed}

    def train(self, arm: str, schedule: Schedule) -> None:
        directory = self.directory / "train" / arm
        if (directory / "model" / "config.json").exists():
            return
        recipe = self.recipes[arm]
        train(
            initial_denoiser(recipe.backbone, self.config.seed),
            schedule,
            self.latents,
            recipe.train,
            directory=directory,
            device=self.device,
            title=f"train {arm}",
        )

    def load(self, arm: str, snapshot: int | None = None) -> Pipeline:
        source, precision = self.directory / "train" / arm, self.config.precision
        return Pipeline.from_pretrained(source, step=snapshot, device=self.device, precision=precision)

    def draw(self, pipeline: Pipeline, title: str, *, steps: int | None = None) -> DrawnImages:
        """One judged set; image i has the same noise and class in every set."""
        config = self.config
        how = SampleConfig(solver=config.solver, steps=steps or config.steps, spacing=config.spacing, seed=config.seed)
        return draw_images(pipeline, how, count=self.config.scaled_images, title=title)

    def judge_arm(self, arm: str, schedule: Schedule) -> dict[str, Any]:
        """Samples of one arm, judged: at the end, at its snapshots and at other numbers of evaluations."""
        path = self.directory / "judged" / f"{arm}.json"
        if path.exists():
            judged: dict[str, Any] = read_json(path)
            return judged
        guided = arm == "autoguidance"
        source = "learned" if guided else arm
        run, recipe = self.load(source), self.recipes[source].train
        if guided:
            run.add_weak(self.load("weak"))
        drawn = self.draw(run, f"sample {arm}")
        save_npz(self.directory / "samples" / f"{arm}.npz", images=drawn.images.numpy(), labels=drawn.labels.numpy())
        final = self.judges.judge(drawn.images, drawn.labels)
        evaluations = {"evaluations": int(drawn.evaluations.max()), "solver": self.config.solver}
        summary: dict[str, Any] = {
            "title": TITLES[arm],
            "schedule": schedule.to_dict(),
            "guidance": DEFAULT_SCALE if guided else None,
            "final": final | evaluations,
            "by_step": [],
            "by_evaluations": [],
            "steps": recipe.steps,
            "parameters": run.parameters,
            "train_seconds": self.stages.seconds.get(f"train {source}", 0.0),
        }
        if not guided:
            for step in recipe.snapshots:
                drawn = self.draw(self.load(arm, step), f"{arm}, step {step}")
                summary["by_step"].append({"step": step, **self.distances(drawn)})
            for steps in self.config.evaluation_steps:
                drawn = self.draw(run, f"{arm}, {steps} steps", steps=steps)
                used = {"evaluations": int(drawn.evaluations.max()), "solver": self.config.solver}
                summary["by_evaluations"].append(used | self.distances(drawn))
            last = {name: final[name] for name in ("fd_embedded", "fd_judge")}
            summary["by_step"].append({"step": recipe.steps, **last})
            summary["by_evaluations"].append(evaluations | last)
        write_json(path, summary)
        return summary

    def trajectory(self) -> None:
        """States of one image along the learned schedule (the paper's Figure 1)."""
        path = self.directory / "trajectory.npz"
        if path.exists():
            return
        taus = [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0]
        run, index = self.load("learned"), TRAJECTORY_IMAGE
        spec, label = run.spec, index % run.config.num_classes
        noise = seeded_noise([image_seed(self.config.seed, index)], run.latent_shape, self.device)
        labels = torch.tensor([label], device=self.device)
        result = sample(run.denoiser, run.schedule, noise, labels, solver="ab3", steps=40, record=taus, spec=spec)
        t = run.schedule(torch.tensor(taus, device=self.device)).t
        rows: dict[str, list[Tensor]] = {"texture": [], "semantic": [], "predicted": []}
        for state, t_tau in zip(result.states, t[:, None], strict=True):
            # x1 = z + (1 - t) u (Eq. 4), with the predicted velocity for u.
            predicted = state + spec.expand(1 - t_tau) * run.denoiser(state, t_tau, labels).float()
            rows["texture"].append(channels_last(run.decode(state).cpu())[0])
            rows["predicted"].append(channels_last(run.decode(predicted).cpu())[0])
            # The semantic channels are normalised principal components: the first three as red, green and blue.
            semantic = spec.split(state)[1][0, :3].permute(1, 2, 0).float().cpu()
            rows["semantic"].append((127.5 + 51 * semantic).clamp(0, 255).to(torch.uint8))
        arrays = {name: torch.stack(images).numpy() for name, images in rows.items()}
        save_npz(path, tau=np.array(taus), t=t.cpu().numpy(), label=np.array(label), **arrays)


class Stages:
    """Announces stages with the time spent and an estimate of what is left; keeps each stage's seconds on disk."""

    # Shares of the whole at budget 1 on two cores; only the estimate depends on them.
    SHARES = {  # noqa: RUF012
        "encode": 3, "judges": 3, "sweep": 14, "train learned": 17, "train offset": 17, "train synchronous": 17,
        "train weak": 2, "sample and judge": 27,
    }  # fmt: skip

    def __init__(self, directory: Path) -> None:
        self.path = directory / "seconds.json"
        self.seconds: dict[str, float] = read_json(self.path) if self.path.exists() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        names = list(self.SHARES)
        position = names.index(name)
        share = sum(list(self.SHARES.values())[:position])
        spent = sum(self.seconds.get(n, 0.0) for n in names[:position])
        estimate = f", about {duration(spent / share * (100 - share))} left" if spent else ""
        print(f"[{position + 1}/{len(names)}] {name} ({duration(spent)} so far{estimate})", file=sys.stderr, flush=True)
        before, start = self.seconds.get(name, 0.0), time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = before + time.monotonic() - start
            write_json(self.path, self.seconds)


def run_demo(
    directory: Path | str, *, budget: float = 1.0, seed: int = 0, device: str = "auto", compiled: bool = False
) -> Path:
    """Run or continue a demo; returns the page."""
    chosen = pick_device(device)
    config = DemoConfig(budget=budget, seed=seed, precision=default_precision(chosen), compile=compiled)
    return Demo(Path(directory), config, chosen).run()
