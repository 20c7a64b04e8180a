"""Options that `lwd sample` and `lwd evaluate` share, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lwd.generation import SampleConfig
    from lwd.pipeline import Pipeline


@dataclass(frozen=True)
class ModelOptions:
    """The model to draw with.

    Args:
        weak: a weak model (run, pipeline or SFD checkpoint), for AutoGuidance.
        weak_step: of the weak model's run.
        force: guide with a weak model that was trained on another schedule, or sample along one that neither was.
        schedule: to sample along, for a model of independent times: offset:0.3, synchronous, a schedule file, ...; for
            an SFD checkpoint, what it was trained on.
        latents: for an SFD checkpoint: directory with the statistics of its latents, SFD's or a latent set of ours.
        texture: decoder of the texture latents, if not the one on record: an LDM or VA-VAE checkpoint or a diffusers
            AutoencoderKL; needed for an SFD checkpoint.
        precision: of the networks' evaluations; by default bf16 where the hardware is fast at it.
        compile: compile the networks; by default on a GPU.
        device: auto, cpu, cuda, cuda:1 ...
    """

    weak: Path | None = None
    weak_step: int | None = None
    force: bool = False
    schedule: str | None = None
    latents: Path | None = None
    texture: str | None = None
    precision: Literal["auto", "float32", "bf16"] = "auto"
    compile: bool | None = None
    device: str = "auto"

    def open(self, model: Path, step: int | None = None) -> Pipeline:
        """The pipeline of `model`: a run or a pipeline directory, a name on the hub, or a checkpoint of SFD."""
        from lwd.machine import default_compile

        pipeline = self._open(model, step)
        if self.weak is not None:
            pipeline.add_weak(self._open(self.weak, self.weak_step), force=self.force)
        if default_compile(pipeline.device) if self.compile is None else self.compile:
            pipeline.compile()
        return pipeline

    def _open(self, model: Path, step: int | None) -> Pipeline:
        from lwd.machine import own_device
        from lwd.pipeline import Pipeline
        from lwd.recipes import make_schedule

        where, precision = own_device(self.device), None if self.precision == "auto" else self.precision
        if not model.is_file():
            pipeline = Pipeline.from_pretrained(model, step=step, device=where, precision=precision)
            if self.schedule is not None:
                pipeline.along(make_schedule(self.schedule, pipeline.spec.names), force=self.force)
        else:
            if step is not None:
                raise ValueError(f"{model} is one checkpoint; it has no steps to choose from")
            if self.schedule is None or self.latents is None:
                raise ValueError(
                    f"{model} holds weights alone. Give --schedule (offset:0.3 for SFD's published models) and "
                    "--latents (the directory of latents_stats.pt and latents_sv_stats.pt, or of a latent set)"
                )
            from lwd.backbones import LightningDiT
            from lwd.data.foreign import statistics_of
            from lwd.files import sha256_of

            network = LightningDiT.from_sfd(model)
            pipeline = Pipeline(
                network.to(where), make_schedule(self.schedule, network.spec.names), statistics_of(self.latents),
                origin={"run": str(model), "model_sha256": sha256_of(model)}, precision=precision,
            )  # fmt: skip
        if self.texture is not None:
            from lwd.encoders.choose import texture_encoder

            pipeline.encoders[pipeline.spec.names[0]] = texture_encoder(self.texture).describe()
        return pipeline


@dataclass(frozen=True)
class DrawOptions:
    """How images are drawn.

    Args:
        solver: dopri5 (adaptive), or a fixed-step one: dpmpp2m, dpmpp3m, heun, midpoint, ab2, ab3, euler.
        steps: of a fixed-step solver, 50 by default.
        placement: equal steps in global time, or in the arc length of the path (kinetic).
        spacing: of the steps in each smooth piece of the schedule: equal, or short at both ends (cosine).
        atol: absolute tolerance of dopri5, for every image on its own.
        rtol: relative tolerance of dopri5.
        scale: of guidance, one or one per group: AutoGuidance with --weak (1.5 by default), else classifier-free.
        scale_times: global times at which a varying scale has the values of --scale, with straight lines between.
        interval: local times from and to that are guided: two numbers, or two per group.
        seed: of the noise.
        batch: images at a time; does not change them.
    """

    solver: str = "dopri5"
    steps: int | None = None
    placement: Literal["uniform", "kinetic"] = "uniform"
    spacing: Literal["uniform", "cosine"] = "uniform"
    atol: float = 1e-6
    rtol: float = 1e-3
    scale: tuple[float, ...] = ()
    scale_times: tuple[float, ...] = ()
    interval: tuple[float, ...] = ()
    seed: int = 0
    batch: int = 64

    @property
    def config(self) -> SampleConfig:
        from lwd.generation import SampleConfig

        return SampleConfig(
            solver=self.solver, steps=self.steps, placement=self.placement, spacing=self.spacing,
            atol=self.atol, rtol=self.rtol, scale=self.scale, scale_times=self.scale_times,
            interval=self.interval, seed=self.seed,
        )  # fmt: skip


def classes_of(labels: Sequence[str], pipeline: Pipeline) -> list[int]:
    """Numbers of the classes in `labels`: numbers, ranges (0-9), names, or text files with one of these per line.

    Raises:
        ValueError: an unknown class, or one out of range.
    """
    found: list[int] = []
    for label in labels:
        first, dash, last = label.partition("-")
        if dash and first.isdigit() and last.isdigit():
            found += [pipeline.class_number(number) for number in range(int(first), int(last) + 1)]
        elif Path(label).is_file():
            lines = [line.strip() for line in Path(label).read_text(encoding="utf-8").splitlines()]
            found += classes_of([line for line in lines if line], pipeline)
        else:
            found.append(pipeline.class_number(label))
    return found
