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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwd.backbones import LightningDiT, LightningDiTConfig
from lwd.data.embedded import encode_embedded, load_embedded_images
from lwd.data.shards import LatentDataset
from lwd.encoders.efficientnet import EfficientNetFeatures
from lwd.encoders.pixels import PixelPatches
from lwd.evaluation import Judge, evaluate_images, train_judge
from lwd.files import read_json, write_atomically, write_json
from lwd.guidance import AutoGuidance
from lwd.objective import Denoiser
from lwd.probe import Sweep, sweep_kinetic
from lwd.progress import Progress, duration
from lwd.randomness import derived_seed
from lwd.recipes import Recipe, get_recipe, make_schedule
from lwd.runs import can_compile, describe_machine, describe_versions, pick_device
from lwd.sampling import sample, seeded_noise
from lwd.schedules import Schedule
from lwd.training import TrainConfig, autocast, to_json, train

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
GUIDANCE_SCALE = 1.5
"""As the paper's for its 80- and 200-epoch models."""


@dataclass(frozen=True)
class DemoConfig:
    """What a demo does; everything here decides the result.

    Attributes:
        budget: factor on all training steps and image counts; 1 takes minutes on two cores.
        images: images per set that is judged, before the budget.
        solver, steps: for the judged sets; the sets for "quality against evaluations" use the same solver.
        evaluation_steps: solver steps for "quality against evaluations".
    """

    budget: float = 1.0
    seed: int = 0
    images: int = 1000
    solver: str = "heun"
    steps: int = 12
    evaluation_steps: tuple[int, ...] = (2, 4, 8)
    precision: str = "bf16"
    compile: bool = True

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
        from lwd.report import write_report

        self.write_config()
        with self.stages.stage("encode"):
            encode_embedded(self.directory / "latents", progress=_counting("encode images", "image"))
        with self.stages.stage("judges"):
            self.judges.prepare()
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
            self.trajectory(schedules["learned"])
        results["seconds"] = self.stages.seconds
        write_json(self.directory / "results.json", results)
        return write_report(self.directory)

    # --- stages ----------------------------------------------------------------------------------------------------

    def write_config(self) -> None:
        path = self.directory / "config.json"
        settings = {
            "demo": to_json(self.config),
            "probe": to_json(self.recipes["learned"].probe),
            "sweep": {"kinetics": list(self.recipes["learned"].kinetics)},
            "backbone": self.recipes["learned"].backbone.to_dict(),
            "train": to_json(self.recipes["learned"].train),
            "weak backbone": self.recipes["weak"].backbone.to_dict(),
            "weak train": to_json(self.recipes["weak"].train),
            "guidance": {"scale": GUIDANCE_SCALE},
            "data": {"name": "Fashion-MNIST, embedded part", "class_names": list(load_embedded_images()[2])},
        }
        settings = json.loads(json.dumps(settings))
        if path.exists() and read_json(path)["settings"] != settings:
            raise ValueError(
                f"{self.directory} holds a demo with other settings; delete it or pass another --directory to start anew"
            )
        if not path.exists():
            from lwd import __version__

            write_json(
                path,
                {
                    "command": "lwd " + " ".join(sys.argv[1:]),
                    "version": __version__,
                    "budget": self.config.budget,
                    "seed": self.config.seed,
                    "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "machine": describe_machine(self.device),
                    "versions": describe_versions(),
                    "settings": settings,
                },
            )

    @cached_property
    def judges(self) -> Judges:
        return Judges(self.directory, self.config, self.device)

    @cached_property
    def latents(self) -> LatentDataset:
        return LatentDataset.open(self.directory / "latents" / "train").to_memory(self.device)

    def initial(self, backbone: LightningDiTConfig) -> LightningDiT:
        """A fresh network; the same weights for every arm and every lambda."""
        torch.manual_seed(derived_seed(self.config.seed, "weights"))
        return LightningDiT(backbone)

    def sweep(self) -> Sweep:
        path = self.directory / "sweep.json"
        if path.exists():
            return Sweep.load(path)
        recipe = self.recipes["learned"]
        assert recipe.probe is not None
        sweep = sweep_kinetic(
            lambda: self.initial(recipe.backbone),
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
            self.initial(recipe.backbone),
            schedule,
            self.latents,
            recipe.train,
            directory=directory,
            device=self.device,
            title=f"train {arm}",
        )

    def denoiser(self, arm: str, snapshot: int | None = None) -> Denoiser:
        """The averaged network of an arm, at the end or at a snapshot."""
        directory = self.directory / "train" / arm
        model = LightningDiT.from_pretrained(directory / "model")
        if snapshot is not None:
            from safetensors.torch import load_file

            model.load_state_dict(load_file(directory / "snapshots" / f"{snapshot:08}.safetensors"), strict=False)
        model = model.to(self.device).eval()

        def denoise(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with autocast(self.recipes[arm].train.precision, self.device):
                return model(z, t, labels)

        denoise.spec = model.spec  # type: ignore[attr-defined]
        return denoise

    def judge_arm(self, arm: str, schedule: Schedule) -> dict[str, Any]:
        """Samples of one arm, judged: at the end, at its snapshots and at other numbers of evaluations."""
        path = self.directory / "train" / arm / "judged.json"
        if path.exists():
            judged: dict[str, Any] = read_json(path)
            return judged
        guided = arm == "autoguidance"
        source = "learned" if guided else arm
        recipe: TrainConfig = self.recipes[source].train
        final = self.denoiser(source)
        if guided:
            final = AutoGuidance(final, self.denoiser("weak"), GUIDANCE_SCALE)
        images, labels, evaluations = self.generate(final, schedule, self.config.steps, f"sample {arm}")
        path_samples = self.directory / "samples" / f"{arm}.npz"
        write_atomically(path_samples, lambda p: _save_npz(p, images=images, labels=labels))
        summary: dict[str, Any] = {
            "title": TITLES[arm],
            "schedule": schedule.to_dict(),
            "guidance": GUIDANCE_SCALE if guided else None,
            "final": self.judges.judge(images, labels)
            | {"evaluations": evaluations, "solver": self.config.solver, "images": len(images)},
            "by_step": [],
            "by_evaluations": [],
            "steps": recipe.steps,
            "parameters": sum(p.numel() for p in LightningDiT(self.recipes[source].backbone).parameters()),
            "train_seconds": self.stages.seconds.get(f"train {source}", 0.0),
        }
        if not guided:
            for step in recipe.snapshots:
                denoiser = self.denoiser(arm, step)
                drawn, labels, _ = self.generate(denoiser, schedule, self.config.steps, f"{arm} at step {step}")
                summary["by_step"].append({"step": step, **self.judges.distances(drawn)})
            for steps in self.config.evaluation_steps:
                drawn, labels, used = self.generate(
                    final, schedule, max(steps, len(schedule.kinks) + 1), f"{arm}, few steps"
                )
                entry = {"evaluations": used, "solver": self.config.solver, **self.judges.distances(drawn)}
                summary["by_evaluations"].append(entry)
            last = {name: summary["final"][name] for name in ("fd_embedded", "fd_judge")}
            summary["by_step"].append({"step": recipe.steps, **last})
            summary["by_evaluations"].append({"evaluations": evaluations, "solver": self.config.solver, **last})
        write_json(path, summary)
        return summary

    def generate(
        self, denoiser: Denoiser, schedule: Schedule, steps: int, title: str
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
        """Images [N, 32, 32] uint8 with classes in turn, and evaluations per image. Image i has seed i in every set."""
        count, batch = self.config.scaled_images, 250
        spec, grid = self.latents.spec, self.latents.grid
        labels = torch.arange(count) % 10
        images, evaluations = [], 0
        with Progress(title, count, unit="image") as progress:
            for start in range(0, count, batch):
                rows = range(start, min(start + batch, count))
                seeds = [derived_seed(self.config.seed, "sample", i) for i in rows]
                result = sample(
                    denoiser,
                    schedule,
                    seeded_noise(seeds, (spec.channels, *grid), self.device),
                    labels[rows.start : rows.stop].to(self.device),
                    solver=self.config.solver,
                    steps=steps,
                )
                evaluations = result.evaluations
                images.append(self.decode(result.latents))
                progress.advance(len(rows))
        return torch.cat(images).numpy(), labels.numpy(), evaluations

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised composite latents -> images [N, 32, 32] uint8 from the texture group."""
        latents = self.latents.normalization.denormalize(latents.float().cpu())
        return PixelPatches(8).decode(self.latents.spec.split(latents)[0]).squeeze(1)

    def trajectory(self, schedule: Schedule) -> None:
        """States of one image along the learned schedule (the paper's Figure 1)."""
        path = self.directory / "trajectory.npz"
        if path.exists():
            return
        taus = [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0]
        label = 8
        denoiser, spec = self.denoiser("learned"), self.latents.spec
        # Image `label` of the judged set: its seed and class, so the page can show it in its grid too.
        noise = seeded_noise([derived_seed(self.config.seed, "sample", label)], (spec.channels, *self.latents.grid))
        labels = torch.tensor([label], device=self.device)
        result = sample(denoiser, schedule, noise.to(self.device), labels, solver="heun", steps=40, record=taus)
        t = schedule(torch.tensor(taus)).t
        rows: dict[str, list[Tensor]] = {"texture": [], "semantic": [], "predicted": []}
        for state, t_tau in zip(result.states, t, strict=True):
            t_row = t_tau[None].to(self.device)
            with torch.no_grad():
                # x1 = z + (1 - t) u (Eq. 4), with the predicted velocity for u.
                predicted = state + spec.expand(1 - t_row) * denoiser(state, t_row, labels).float()
            rows["texture"].append(self.decode(state)[0])
            rows["predicted"].append(self.decode(predicted)[0])
            # The semantic channels are normalised principal components: the first three as red, green and blue.
            semantic = spec.split(state)[1][0, :3].permute(1, 2, 0).float().cpu()
            rows["semantic"].append((127.5 + 51 * semantic).clamp(0, 255).to(torch.uint8))
        arrays = {name: torch.stack(images).numpy() for name, images in rows.items()}
        write_atomically(path, lambda p: _save_npz(p, tau=np.array(taus), t=t.numpy(), label=np.array(label), **arrays))


class Judges:
    """The two feature networks, and what they say of the held-out images."""

    def __init__(self, directory: Path, config: DemoConfig, device: torch.device) -> None:
        self.directory, self.config, self.device = directory, config, device
        self.path = directory / "judge" / "judge.safetensors"

    def prepare(self) -> None:
        if not self.path.exists():
            images, labels, _ = load_embedded_images("train")
            judge = train_judge(
                images,
                labels,
                seed=derived_seed(self.config.seed, "judge"),
                steps=max(20, round(600 * min(self.config.budget, 1.0))),
                device=self.device,
                progress=_counting("train judge", "step"),
            )
            judge.save(self.path)
        floor = self.path.with_name("floor.json")
        if not floor.exists():
            images, labels, _ = load_embedded_images("train")
            count = self.config.scaled_images
            write_json(floor, self.judge(images[:count].numpy(), labels[:count].numpy()) | {"images": count})
        real = self.directory / "samples" / "real.npz"
        if not real.exists():
            images, labels, _ = load_embedded_images("heldout")
            write_atomically(real, lambda p: _save_npz(p, images=images.numpy(), labels=labels.numpy()))

    @cached_property
    def network(self) -> Judge:
        return Judge.load(self.path).to(self.device)

    @cached_property
    def embedded(self) -> EfficientNetFeatures:
        return EfficientNetFeatures.load(self.device)

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """Features of the held-out images by both networks; the embedded one's come from disk when there."""
        images = load_embedded_images("heldout")[0]
        path = self.path.with_name("reference.npz")
        if not path.exists():
            features = {"embedded": self.embedded_features(images), "judge": self.network.features(images)}
            write_atomically(path, lambda p: _save_npz(p, **{k: v.cpu().numpy() for k, v in features.items()}))
        with np.load(path) as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}

    def embedded_features(self, images: Tensor) -> Tensor:
        return self.embedded.pooled(images)

    def judge(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> dict[str, Any]:
        return evaluate_images(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            judge=self.network,
            embedded=self.embedded_features,
            reference=self.reference,
        )

    def distances(self, images: np.ndarray[Any, Any]) -> dict[str, float]:
        found = self.judge(images, np.zeros(len(images), dtype=np.int64))
        return {name: found[name] for name in ("fd_embedded", "fd_judge")}

    def floor(self) -> dict[str, Any]:
        floor: dict[str, Any] = read_json(self.path.with_name("floor.json"))
        return floor


class Stages:
    """Announces stages with the time spent and an estimate of what is left; keeps each stage's seconds on disk."""

    # Shares of the whole at budget 1 on two cores; only the estimate depends on them.
    SHARES = {  # noqa: RUF012
        "encode": 4, "judges": 5, "sweep": 16, "train learned": 18, "train offset": 18, "train synchronous": 18,
        "train weak": 2, "sample and judge": 19,
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


def _counting(title: str, unit: str) -> Any:
    """A ``progress(done, total)`` callback that shows a `Progress`."""
    state: dict[str, Progress] = {}

    def report(done: int, total: int) -> None:
        if title not in state:
            state[title] = Progress(title, total, unit=unit).__enter__()
        state[title].reach(done)

    return report


def _save_npz(path: Path, **arrays: np.ndarray[Any, Any]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def run_demo(
    directory: Path | str, *, budget: float = 1.0, seed: int = 0, device: str = "auto", compiled: bool | None = None
) -> Path:
    """Run or continue a demo; returns the page."""
    chosen = pick_device(device)
    config = DemoConfig(budget=budget, seed=seed, compile=can_compile() if compiled is None else compiled)
    return Demo(Path(directory), config, chosen).run()
