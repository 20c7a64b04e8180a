"""The four kinds of work that plans are made of: a probe, a training, an error surface, a set of images scored.

A task is a value: equal tasks are one, whichever plan names them, and its file says whether it is done. `run` does it,
going on where an interrupted one stopped; what it needs is in `needs`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch

from experiments.sets import SETS, Cost, DataSet, Places, judges_of, labels_of, recipe_of
from lwd.data import LatentDataset, TensorLatents
from lwd.files import read_json, write_json
from lwd.generation import SampleConfig, draw_images
from lwd.machine import default_precision, describe_machine, describe_versions, pick_device
from lwd.paths import best_path, best_polynomial
from lwd.pipeline import Pipeline
from lwd.probe import learn_schedule
from lwd.recipes import Recipe, make_schedule
from lwd.runs import initial_denoiser, write_run_config
from lwd.schedules import PolynomialSchedule, Schedule, load_schedule, schedule_from_dict
from lwd.steps import OptimizerConfig
from lwd.surface import Weights, measure_surface
from lwd.training import train

PROBES: dict[str, dict[str, Any]] = {
    "paper": {},
    "exact": {"jacobian": "exact"},
    "information": {"jacobian": "information"},
    "uncorrected": {"jacobian": "none"},
    "kinetic-global": {"kinetic_reduction": "global"},
    "loss-groups": {"reduction": "groups"},
    "half": {"steps": 0.5},
    "double": {"steps": 2.0},
    "fourfold": {"steps": 4.0},
    "rho-lr-third": {"rho_lr": 1e-2},
    "rho-lr-threefold": {"rho_lr": 9e-2},
    "batch-16": {"batch_size": 16},
    "batch-256": {"batch_size": 256},
    "degree-2": {"degree": 2},
    "degree-8": {"degree": 8},
    "from-middle": {"rho": (0.0,) * 5},
    "from-extreme": {"rho": (-4.0, -4.0, -4.0, -4.0, math.log(math.e - 1))},
    "frozen": {"frozen": True},
}
"""What differs from the paper's probe, by name: fields of `ProbeConfig`, except that steps are a factor, and that
"frozen" takes the finished network of the synchronous arm and leaves it as it is."""

TRAININGS: dict[str, dict[str, Any]] = {
    "": {},
    "uncorrected": {"jacobian": "none"},
    "no-cosine": {"cosine": 0.0},
}
"""What differs from the recipe's training, by name."""


SURFACE_POINTS, SURFACE_IMAGES = 25, 256
PATH_KINETICS = (0.0, 0.005, 0.02, 0.04, 0.08, 0.16)
COMPARED = ("synchronous", "offset:0.3", "cascaded", "mix:0.25", "mix:0.5", "mix:0.75", "mix:1")
"""Curves whose costs on a surface are put down beside those of the best paths."""


@dataclass(frozen=True)
class Arm:
    """What all tasks say: which images, whose semantic latents, which seed."""

    data: str
    encoder: str
    seed: int

    @property
    def set(self) -> DataSet:
        return SETS[self.data]

    @property
    def cost(self) -> Cost:
        return self.set.cost


@dataclass(frozen=True)
class Probe(Arm):
    """Stage I: a schedule learned with one lambda."""

    kinetic: float
    variant: str = "paper"

    def folder(self, places: Places) -> Path:
        part = places.out / "probes" / self.data / self.encoder / self.variant
        return part / f"lambda-{self.kinetic:g}" / f"seed-{self.seed}"

    def file(self, places: Places) -> Path:
        return self.folder(places) / "result.json"

    @property
    def needs(self) -> tuple[Task, ...]:
        return (self._finished,) if self.variant == "frozen" else ()

    @property
    def _finished(self) -> Training:
        return Training(self.data, self.encoder, self.seed, "synchronous")

    def seconds(self, budget: float) -> float:
        change = PROBES[self.variant]
        images = change.get("batch_size", self.set.batch) / self.set.batch
        return self.set.probe_steps * budget * change.get("steps", 1.0) * images * self.cost.probe_step

    def run(self, places: Places, budget: float) -> None:
        recipe, latents = prepared(self, places, budget)
        assert recipe.probe is not None
        change = dict(PROBES[self.variant])
        frozen, factor = change.pop("frozen", False), change.pop("steps", 1.0)
        steps, burn_in = (max(2, round(n * factor)) for n in (recipe.probe.steps, recipe.probe.burn_in))
        config = replace(recipe.probe, steps=steps, burn_in=min(burn_in, steps - 1), kinetic=self.kinetic, **change)
        network = initial_denoiser(recipe.backbone, self.seed)
        if frozen:
            network = type(network).from_pretrained(self._finished.folder(places) / "model")
            config = replace(config, optimizer=OptimizerConfig(lr=0.0))
        start = time.perf_counter()
        learned = learn_schedule(
            network, latents, config, directory=self.folder(places), device=pick_device(), title=self.variant
        )
        history = [{key: line[key] for key in ("step", "delay", "midpoint", "rho")} for line in learned.history]
        write_record(
            self, self.file(places), start,
            delay=learned.delay, collapsed=learned.collapsed, history=history, schedule=learned.schedule.to_dict(),
            steps=steps, burn_in=config.burn_in,
        )  # fmt: skip

    def schedule(self, places: Places) -> Schedule:
        return load_schedule(self.folder(places) / "schedule.json")


@dataclass(frozen=True)
class Training(Arm):
    """Stage II: a denoiser trained along a schedule.

    Attributes:
        schedule: ``synchronous``, ``offset:0.3``, ...; ``learned:0.04`` for the paper's probe with this seed and
            lambda, ``learned/VARIANT:0.04`` for another one, ``learned@ENCODER:0.04`` for the curve of another
            encoder's latents; ``path/WEIGHTS:0.04`` for the best path through the errors of this seed's denoiser of
            independent times; ``mix:A`` for (1 - A) tau + A tau^5.
        weak: the small network of AutoGuidance in place of the main one.
    """

    schedule: str
    variant: str = ""
    weak: bool = False

    def folder(self, places: Places) -> Path:
        slug = self.schedule.replace("/", ".").replace(":", "-").replace(",", "-")
        name = "-".join(filter(None, [slug, self.variant, "weak" if self.weak else ""]))
        return places.out / "trainings" / self.data / self.encoder / name / f"seed-{self.seed}"

    def file(self, places: Places) -> Path:
        return self.folder(places) / "result.json"

    @property
    def probe(self) -> Probe | None:
        kind, _, kinetic = self.schedule.partition(":")
        if not kind.startswith("learned"):
            return None
        kind, _, encoder = kind.partition("@")
        variant = kind.partition("/")[2] or "paper"
        return Probe(self.data, encoder or self.encoder, self.seed, float(kinetic), variant)

    @property
    def surface(self) -> Surface | None:
        return Surface(*_arm(self)) if self.schedule.startswith("path/") else None

    @property
    def needs(self) -> tuple[Task, ...]:
        return tuple(source for source in (self.probe, self.surface) if source is not None)

    def seconds(self, budget: float) -> float:
        steps = self.set.steps * budget
        return steps / 3 * self.cost.weak_step if self.weak else steps * self.cost.step

    def run(self, places: Places, budget: float) -> None:
        recipe, latents = prepared(self, places, budget)
        config, start = replace(recipe.train, **TRAININGS[self.variant]), time.perf_counter()
        name = f"{self.data} {self.encoder} {self.schedule} {self.variant}".rstrip()
        folder, device = self.folder(places), pick_device()
        write_run_config(folder, device, recipe=name, backbone=recipe.backbone.to_dict(), train=config)
        result = train(
            initial_denoiser(recipe.backbone, self.seed), self.curve(places, latents.spec.names), latents, config,
            directory=folder, device=device, title=name,
        )  # fmt: skip
        write_record(self, self.file(places), start, steps=config.steps, loss=result.history[-1]["loss"])

    def curve(self, places: Places, names: Sequence[str]) -> Schedule:
        if self.probe is not None:
            return self.probe.schedule(places)
        if self.surface is not None:
            kind, _, kinetic = self.schedule.partition(":")
            return self.surface.schedule(places, kind.partition("/")[2], float(kinetic))
        return named_schedule(self.schedule, names)


@dataclass(frozen=True)
class Surface(Arm):
    """The errors of a denoiser of independent times on held-out latents, and the best paths through them."""

    def folder(self, places: Places) -> Path:
        return places.out / "surfaces" / self.data / self.encoder / f"seed-{self.seed}"

    def file(self, places: Places) -> Path:
        return self.folder(places) / "result.json"

    @property
    def needs(self) -> tuple[Task, ...]:
        return (self._trained,)

    @property
    def _trained(self) -> Training:
        return Training(*_arm(self), "independent")

    def seconds(self, budget: float) -> float:
        return SURFACE_POINTS**2 * SURFACE_IMAGES * min(budget, 1.0) * self.cost.evaluation

    def run(self, places: Places, budget: float) -> None:
        start, device = time.perf_counter(), pick_device()
        pipeline = Pipeline.from_pretrained(self._trained.folder(places), device=device)
        heldout = _latents(places.latents(self.set, self.encoder, "heldout"))
        points, images = (SURFACE_POINTS, SURFACE_IMAGES) if budget >= 0.5 else (3, 20)
        surface = measure_surface(pipeline.denoiser, heldout, points=points, images=images, device=device)
        surface.save(self.folder(places) / "surface.safetensors")
        paths = []
        for weights in get_args(Weights):
            for kinetic in PATH_KINETICS:
                curves = {
                    "path": best_path(surface, kinetic=kinetic, weights=weights),
                    "polynomial": best_polynomial(surface, kinetic=kinetic, weights=weights, steps=400),
                    **{name: named_schedule(name, surface.spec.names) for name in COMPARED},
                }
                for name, curve in curves.items():
                    cost = float(surface.cost(curve.double().frozen(), kinetic=kinetic, weights=weights, points=2048))
                    said = {"curve": name, "weights": weights, "kinetic": kinetic, "cost": cost}
                    paths.append(said | ({"schedule": curve.to_dict()} if name in ("path", "polynomial") else {}))
        write_record(self, self.file(places), start, images=images, points=points, paths=paths)

    def schedule(self, places: Places, weights: str, kinetic: float) -> Schedule:
        """The best path that was found for these weights and this lambda; ValueError when it was not asked for."""
        for path in read_json(self.file(places))["paths"]:
            if (path["curve"], path["weights"], path["kinetic"]) == ("path", weights, kinetic):
                return schedule_from_dict(path["schedule"])
        raise ValueError(f"no best path was sought for the weights {weights!r} and lambda = {kinetic:g}")


@dataclass(frozen=True)
class Score(Arm):
    """Images drawn from a trained denoiser, judged.

    Attributes:
        training: whose denoiser.
        steps: evaluations of the solver that the demo uses.
        scale, interval, scale_times: of guidance, as `SampleConfig` takes them; none for one evaluation a step.
        free: classifier-free guidance in place of AutoGuidance.
        at_step: which part of the training; 1 is its end.
        along: the schedule to sample along, where it is not that of the training.
    """

    training: Training
    steps: int = 20
    scale: tuple[float, ...] = ()
    interval: tuple[float, ...] = ()
    scale_times: tuple[float, ...] = ()
    free: bool = False
    part: float = 1.0
    along: str = ""

    def file(self, places: Places) -> Path:
        guided = "cfg" if self.free else "auto"
        shown = {"": self.scale, "in": self.interval, "at": self.scale_times}
        how = "-".join(f"{key}{','.join(f'{x:g}' for x in values)}" for key, values in shown.items() if values)
        part = f"part-{self.part:g}" if self.part < 1 else ""
        along = f"along-{self.along.replace(':', '-').replace('/', '.')}" if self.along else ""
        name = "_".join(filter(None, [f"steps-{self.steps}", f"{guided}-{how}" if how else "", part, along]))
        return self.training.folder(places) / "scores" / f"{name}.json"

    @property
    def weak(self) -> Training | None:
        return replace(self.training, weak=True) if self.scale and not self.free else None

    @property
    def needs(self) -> tuple[Task, ...]:
        ahead = Training(*_arm(self), self.along).needs if self.along else ()
        return (self.training, *([self.weak] if self.weak else []), *ahead)

    def seconds(self, budget: float) -> float:
        factor = 1 + (1.0 if self.free else 0.2) * bool(self.scale)
        return self.images(budget) * (self.steps * factor * self.cost.evaluation + self.cost.judged)

    def images(self, budget: float) -> int:
        return max(40, round(self.set.images * min(budget, 1.0)))

    def run(self, places: Places, budget: float) -> None:
        start, device = time.perf_counter(), pick_device()
        precision = default_precision(device)
        steps = read_json(self.training.file(places))["steps"]
        step = None if self.part == 1 else round(steps * self.part)
        pipeline = Pipeline.from_pretrained(
            self.training.folder(places), step=step, device=device, precision=precision
        )  # fmt: skip
        if self.weak is not None:
            weak = Pipeline.from_pretrained(self.weak.folder(places), device=device, precision=precision)
            pipeline.add_weak(weak)
        if self.along:
            curve = Training(*_arm(self), self.along).curve(places, pipeline.schedule.names)
            pipeline.along(curve)
        how = SampleConfig(
            solver="ab3", steps=self.steps, spacing="cosine", scale=self.scale or (1.0,), interval=self.interval,
            scale_times=self.scale_times, seed=self.seed,
        )  # fmt: skip
        count = self.images(budget)
        labels = labels_of(self.set, places)[:count].tolist()
        drawn = draw_images(pipeline, how, count=count, labels=labels, title="draw")
        images = drawn.images.movedim(-1, 1) if drawn.images.ndim == 4 else drawn.images
        origin = how.describe(pipeline)
        origin.pop("encoders")  # the name of the arm says which they are
        judges, name = judges_of(self.set, places, device, budget), self.file(places).stem
        record = judges.record(images, drawn.labels, origin, name)
        write_record(
            self, self.file(places), start, evaluations=int(drawn.evaluations.max()),
            **{key: record[key] for key in ("metrics", "generated", "settings")},
        )  # fmt: skip


Task = Probe | Training | Surface | Score


def _arm(task: Arm) -> tuple[str, str, int]:
    return task.data, task.encoder, task.seed


def named_schedule(text: str, names: Sequence[str]) -> Schedule:
    """`make_schedule`, and ``mix:A``, the curves (1 - A) tau + A tau^5 between synchronous and extreme, whose delay
    is A."""
    kind, _, argument = text.partition(":")
    if kind != "mix":
        return make_schedule(text, names)
    share = float(argument)
    # a_0 = 1 - A and a_4 = 5 A in Eq. 40; softplus(-80) is nothing.
    a = torch.tensor([1 - share, 0, 0, 0, 5 * share], dtype=torch.float64)
    rho = torch.where(a > 0, torch.log(torch.expm1(a.clamp(min=1e-30))), -80.0)
    return PolynomialSchedule(4, rho.float()[None], names=names)


def prepared(task: Probe | Training, places: Places, budget: float) -> tuple[Recipe, TensorLatents]:
    """The recipe of an arm at a budget, and its latents in memory."""
    latents = _latents(places.latents(task.set, task.encoder))
    weak = isinstance(task, Training) and task.weak
    recipe = recipe_of(task.set, latents, weak=weak).scaled(budget)
    device = pick_device()
    run: dict[str, Any] = {"seed": task.seed, "precision": default_precision(device), "compile": budget >= 0.5}
    assert recipe.probe is not None
    probe, training = replace(recipe.probe, **run), replace(recipe.train, **run)
    return replace(recipe, probe=probe, train=training), latents


@lru_cache(maxsize=2)
def _latents(folder: Path) -> TensorLatents:
    return LatentDataset.open(folder).to_memory(pick_device())


def write_record(task: Task, path: Path, start: float, **found: Any) -> None:
    """What a task found, who found it and how long it took."""
    said = {key: value for key, value in vars(task).items() if key != "training"}
    if isinstance(task, Score):
        said |= {f"training_{key}": value for key, value in vars(task.training).items() if key not in said}
    about = {"task": type(task).__name__.lower(), **said, "seconds": time.perf_counter() - start}
    machine = {"machine": describe_machine(pick_device()), "versions": describe_versions()}
    write_json(path, about | found | machine)
