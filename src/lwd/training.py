"""Stage II of Algorithm 1: training a denoiser on a frozen schedule (LWD Eq. 39, Table 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lwd import distributed
from lwd.backbones import LightningDiTConfig
from lwd.batches import Batches, LatentSource
from lwd.compute import Precision
from lwd.cost import TRAINING_FACTOR, forward_flops
from lwd.files import write_atomically, write_json
from lwd.loop import Hook, run_job
from lwd.metrics import Watcher
from lwd.objective import Denoiser, Jacobian, Reduction, Repa, TimeDistribution, denoiser_objective
from lwd.parallel import (
    Average,
    Parallel,
    Trained,
    adamw,
    guarded_step,
    load_network_state,
    network_state,
    whole_state,
)
from lwd.runs import note_step
from lwd.schedules import Schedule
from lwd.steps import OptimizerConfig, backward_in_parts, check_groups, identity_of, machine_use
from lwd.validation import Validation


@dataclass(frozen=True)
class TrainConfig:
    """How a denoiser is trained; the defaults are the paper's (Table 5).

    Attributes:
        tau: distribution of the global time; the corrected loss assumes ``"uniform"``.
        jacobian: ``"none"`` is SFD's uncorrected loss.
        cosine, repa: weights of the auxiliary losses; REPA needs features in the data and a projector in the model.
        label_dropout: share of labels replaced by the null label, for classifier-free guidance.
        ema: decay of the exponential moving average that is kept as the result.
        snapshots: steps after which the averaged weights are kept too.
        accumulate: parts that a process computes its share of the batch in, one after the other.
        parallel: ``"ddp"``, or ``"fsdp"`` for networks that one device cannot hold with their optimizer.
        recompute: blocks whose activations are computed again in the backward pass instead of kept.
        keep_last, keep_every: checkpoints to keep: the newest ones, and those of every so many steps.
        skip_non_finite: leave out steps whose loss or gradient is not finite, instead of stopping.
        validate_every: images between two measurements on held-out latents, where there are any.
    """

    steps: int = 400_000
    batch_size: int = 256
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: float = 0.9999
    label_dropout: float = 0.1
    tau: TimeDistribution = "uniform"
    jacobian: Jacobian = "detached"
    reduction: Reduction = "global"
    cosine: float = 1.0
    repa: float = 1.0
    repa_loss: Repa = "cos"
    flips: bool = False
    seed: int = 0
    precision: Precision = "bf16"
    compile: bool = False
    log_every: int = 100
    save_seconds: float = 600.0
    snapshots: tuple[int, ...] = ()
    accumulate: int = 1
    parallel: Parallel = "ddp"
    recompute: int = 0
    keep_last: int = 2
    keep_every: int = 0
    skip_non_finite: bool = False
    validate_every: int = 1_280_000

    def shards(self, processes: int) -> int:
        """How many processes share one copy of weights, optimizer and average."""
        return processes if self.parallel == "fsdp" else 1


@dataclass(frozen=True)
class TrainResult:
    """The averaged denoiser, in eval mode, and the log lines of the run."""

    denoiser: nn.Module
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Measure:
    """Something done every `images` images with the averaged network: `act` gets it as a denoiser, and the step; what
    it returns joins the log line. All processes call it."""

    images: int
    act: Callable[[Denoiser, int], dict[str, Any]]


def train(
    denoiser: nn.Module,
    schedule: Schedule,
    data: LatentSource,
    config: TrainConfig,
    *,
    directory: Path | str | None = None,
    device: torch.device | str = "cpu",
    title: str = "train",
    heldout: LatentSource | None = None,
    measures: Sequence[Measure] = (),
    watchers: Sequence[Watcher] = (),
    must_resume: bool = False,
) -> TrainResult:
    """Train `denoiser` on L_theta along a frozen `schedule`; go on where an interrupted run in `directory` stopped.

    With `IndependentTimes` it is trained on all combinations of local times, to be sampled along any schedule.

    A resumed run takes the very steps the uninterrupted one would have taken: batches, noise, times and label dropout
    are functions of (seed, step), and the checkpoint holds everything else. Under torchrun, all processes call it, and
    do the same training as one process would.

    Args:
        denoiser: a freshly initialised network; trained in place.
        directory: gets ``checkpoints/``, ``metrics.jsonl``, ``schedule.json``, ``latents.json``, snapshots of the
            averaged weights, and, for a network that can `save_pretrained`, the result as ``model/``.
        heldout: latents that are not trained on, to measure `lwd.validation.Validation` with.
        measures: what else to do with the averaged network on the way.
        watchers: get every log line.
        must_resume: a run that finds no checkpoint is an error.

    Raises:
        ValueError: groups or classes of data, schedule and denoiser differ; no features for REPA; a checkpoint made
            with other settings, or beyond `config.steps`; a batch that the processes cannot share evenly.
        NonFiniteLossError: NaN or infinity; the last good checkpoint is kept.
    """
    schedule = schedule.frozen().to(device)
    check_groups(data, schedule, denoiser)
    if config.repa > 0 and getattr(denoiser, "repa_projector", None) is not None and not _has_features(data):
        raise ValueError("the denoiser has a REPA projector, but the data have no features: encode them, or set repa=0")
    directory = None if directory is None else Path(directory)
    # A training at a constant rate may be made longer: its steps so far do not depend on how many there will be.
    extendable = ("steps", "snapshots") if config.optimizer.decay == "constant" else ()
    parameters = sum(p.numel() for p in denoiser.parameters())
    job = _Training(denoiser.to(device), schedule, data, config, directory, torch.device(device))
    identity = {
        "train": identity_of(config, extendable=extendable),
        "latents": getattr(data, "fingerprint", None),
        "schedule": {key: schedule.to_dict()[key] for key in ("kind", "groups", "parameters")},
        "normalization": data.normalization.to_dict(),
        "parameters": parameters,
    }
    if directory is not None and distributed.rank() == 0:
        schedule.save(directory / "schedule.json")
        names = {"class_names": list(getattr(data, "class_names", ()))}
        latents = {"normalization": data.normalization.to_dict(), "encoders": getattr(data, "encoders", {})}
        write_json(directory / "latents.json", latents | names)
    if heldout is not None:
        validation = Validation(heldout, schedule.path())
        measures = [*measures, Measure(config.validate_every, lambda net, _: validation.measure(net, job.device))]
    history = run_job(
        job,
        config.steps,
        directory=directory,
        identity=identity,
        title=title,
        batch_size=config.batch_size,
        log_every=config.log_every,
        save_seconds=config.save_seconds,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        skip_non_finite=config.skip_non_finite,
        must_resume=must_resume,
        watchers=watchers,
        hooks=[Hook(measure.images, job.measuring(measure)) for measure in measures],
        operations=job.operations,
    )
    job.average.copy_to_network()
    denoiser.eval()
    save = getattr(denoiser, "save_pretrained", None)
    if directory is not None and callable(save):
        weights = whole_state(denoiser)
        if distributed.rank() == 0:
            save(directory / "model", weights)
            note_step(directory / "model", config.steps)
        distributed.wait_for_all()
    return TrainResult(denoiser, history)


def _has_features(data: LatentSource) -> bool:
    features = getattr(data, "features", None)
    return features is not None and features is not False


class _Training:
    """The job of `train`; see `lwd.loop.Job`."""

    def __init__(
        self,
        denoiser: nn.Module,
        schedule: Schedule,
        data: LatentSource,
        config: TrainConfig,
        directory: Path | None,
        device: torch.device,
    ) -> None:
        self.denoiser, self.schedule, self.data, self.config, self.directory = (
            denoiser.train(), schedule, data, config, directory
        )  # fmt: skip
        self.device, self.first = device, True
        self.batches = Batches(data, config, denoiser, device)
        self.forward = Trained(
            denoiser,
            device,
            precision=config.precision,
            compiled=config.compile,
            parallel=config.parallel,
            recompute=config.recompute,
            unused=() if config.repa > 0 else ("repa_projector",),
        )
        self.average = Average(denoiser, config.ema)
        self.optimizer = adamw(
            [p for p in denoiser.parameters() if p.requires_grad],
            device,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )

    def update(self, step: int) -> dict[str, Tensor]:
        config = self.config
        if self.first:  # of a run that was made longer: what was its end may be asked for as a snapshot now
            self.first = False
            self.keep_snapshot(step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * config.optimizer.factor(step, config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = backward_in_parts(
            self.forward,
            self.batches.draw(step, config.tau, self.schedule.clocks),
            config.accumulate,
            self.schedule,
            self.data.spec,
            lambda part: denoiser_objective(
                self.forward,
                self.schedule,
                self.data.spec,
                part.x0,
                part.x1,
                part.labels,
                part.tau,
                features=part.features,
                cosine=config.cosine,
                repa=config.repa,
                repa_loss=config.repa_loss,
                jacobian=config.jacobian,
                reduction=config.reduction,
            ),
        )
        norm = guarded_step(self.optimizer)
        self.average.update()
        self.keep_snapshot(step + 1)
        return metrics | {"gradient_norm": norm}

    def describe(self) -> dict[str, Any]:
        return machine_use(self.batches, self.device)

    def explain(self, step: int) -> str:
        return self.batches.explain(step)

    def state_dict(self) -> dict[str, Any]:
        return network_state(self.denoiser, self.optimizer) | {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_network_state(self.denoiser, self.optimizer, state)
        self.average.load_state_dict(state["average"])

    def keep_snapshot(self, step: int) -> None:
        """Write the averaged weights where `step` asks for it and they are not there yet."""
        if step not in self.config.snapshots or self.directory is None:
            return
        path = self.directory / "snapshots" / f"{step:08}.safetensors"
        if not distributed.from_main(path.exists()):
            self.save_average(path)

    def save_average(self, path: Path) -> None:
        weights = self.average.whole()
        if distributed.rank() == 0:
            write_atomically(path, lambda temporary: save_file(weights, temporary))

    def measuring(self, measure: Measure) -> Callable[[int], dict[str, Any]]:
        def act(step: int) -> dict[str, Any]:
            self.denoiser.eval()
            with self.average.in_place(), torch.no_grad():
                found = measure.act(self.forward, step)
            self.denoiser.train()
            return found

        return act

    @property
    def operations(self) -> float | None:
        """Of one image in training, where the network says how large it is: three forward passes."""
        config = getattr(self.denoiser, "config", None)
        return float(TRAINING_FACTOR * forward_flops(config)) if isinstance(config, LightningDiTConfig) else None
