"""Stage II of Algorithm 1: training a denoiser on a frozen schedule (LWD Eq. 39, Table 5)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lwd import distributed
from lwd.batches import Batches, LatentSource, TrainingBatch
from lwd.compute import Precision
from lwd.files import write_atomically, write_json
from lwd.latents import LatentSpec
from lwd.loop import COUNT, Hook, run_job
from lwd.metrics import Watcher
from lwd.objective import (
    Denoiser,
    DenoiserTerms,
    Jacobian,
    Reduction,
    Repa,
    ScheduleTerms,
    TimeDistribution,
    denoiser_objective,
)
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
from lwd.schedules import Schedule
from lwd.validation import Validation

Decay = Literal["constant", "linear", "cosine"]
BANDS = 10
"""Bands of local time that losses are reported by."""

EXECUTION = frozenset(
    {"compile", "log_every", "save_seconds", "keep_last", "keep_every", "accumulate", "parallel", "recompute"}
    | {"skip_non_finite", "validate_every"}
)
"""Settings that say how a run is carried out, not what it computes: a resumed run may change them."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate; the defaults are the paper's (Table 5).

    Attributes:
        warmup_steps: in which the rate rises from 0 in a straight line.
        decay: of the rate afterwards, to 0 at the last step: ``"linear"``, ``"cosine"``, or none: ``"constant"``.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Decay = "constant"

    def factor(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied with at `step` of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[self.decay]


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
        ValueError: groups of data, schedule and denoiser differ; a checkpoint made with other settings; a batch that
            the processes cannot share evenly.
        NonFiniteLossError: NaN or infinity; the last good checkpoint is kept.
    """
    schedule = schedule.frozen().to(device)
    check_groups(data, schedule, denoiser)
    directory = None if directory is None else Path(directory)
    parameters = sum(p.numel() for p in denoiser.parameters())
    job = _Training(denoiser.to(device), schedule, data, config, directory, torch.device(device))
    identity = {
        "train": identity_of(config),
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
        distributed.wait_for_all()
    return TrainResult(denoiser, history)


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
        self.device = device
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
        if step + 1 in config.snapshots and self.directory is not None:
            self.save_average(self.directory / "snapshots" / f"{step + 1:08}.safetensors")
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
        from lwd.backbones import LightningDiTConfig
        from lwd.cost import forward_flops

        config = getattr(self.denoiser, "config", None)
        return 3.0 * forward_flops(config) if isinstance(config, LightningDiTConfig) else None


def identity_of(config: Any) -> dict[str, Any]:
    """What of a configuration a resumed run must not change, as JSON reads it back.

    A training at a constant rate may be made longer: its steps so far do not depend on how many there will be.
    """
    extendable = (
        {"steps", "snapshots"} if isinstance(config, TrainConfig) and config.optimizer.decay == "constant" else ()
    )
    return {key: value for key, value in to_json(config).items() if key not in EXECUTION.union(extendable)}


def by_time(per_group: Tensor, t: Tensor, spec: LatentSpec) -> dict[str, Tensor]:
    """The loss l_g of every group in `BANDS` bands of its local time, as sums and counts.

    Args:
        per_group: l_g of every sample, [B, G].
        t: local times, [B, G].
    """
    band = (t * BANDS).long().clamp(0, BANDS - 1)
    member = torch.nn.functional.one_hot(band, BANDS).to(per_group)
    sums, counts = (per_group.detach()[:, :, None] * member).sum(dim=0), member.sum(dim=0)
    result: dict[str, Tensor] = {}
    for g, name in enumerate(spec.names):
        result |= {f"loss_{name}_by_time": sums[g], f"loss_{name}_by_time{COUNT}": counts[g]}
    return result


def backward_in_parts(
    forward: Trained,
    batch: TrainingBatch,
    count: int,
    schedule: Schedule,
    spec: LatentSpec,
    objective: Callable[[TrainingBatch], ScheduleTerms | DenoiserTerms],
) -> dict[str, Tensor]:
    """Accumulate the gradients of `objective` over `count` equal parts of `batch`; returns the metrics of all of it."""
    rows = []
    for number, part in enumerate(batch.parts(count), start=1):
        with forward.accumulating(last=number == count):
            terms = objective(part)
            (terms.total / count).backward()
        named = {field.name: getattr(terms, field.name) for field in dataclasses.fields(terms)}
        per_group = named.pop("per_group")
        with torch.no_grad():
            t = schedule(part.tau).t
        rows.append(logged({"loss": named.pop("total"), **named}, per_group, spec) | by_time(per_group, t, spec))
    return {name: torch.stack([row[name] for row in rows]).mean(dim=0) for name in rows[0]}


def machine_use(batches: Batches, device: torch.device) -> dict[str, Any]:
    """Seconds spent waiting for data since the last call, and the most memory of the GPU so far, in bytes."""
    waited, batches.waited = batches.waited, 0.0
    used = {"waited_for_data": waited}
    return used | {"memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else used


def logged(terms: dict[str, Tensor], per_group: Tensor, spec: LatentSpec) -> dict[str, Tensor]:
    """The scalars of a log line: the terms, and the mean of every group's loss l_g from `per_group` [B, G]."""
    by_group = {f"loss_{name}": loss for name, loss in zip(spec.names, per_group.mean(dim=0), strict=True)}
    return {name: value.detach() for name, value in (terms | by_group).items()}


def check_groups(data: LatentSource, schedule: Schedule, denoiser: nn.Module) -> None:
    """ValueError unless data, schedule and denoiser mean the same groups."""
    if schedule.names != data.spec.names:
        raise ValueError(f"the schedule is for the groups {schedule.names}, the latents have {data.spec.names}")
    spec = getattr(denoiser, "spec", None)
    if spec is not None and spec.sizes != data.spec.sizes:
        raise ValueError(
            f"the denoiser is built for groups of {spec.sizes} channels, the latents have {data.spec.sizes}"
        )


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON reads it back (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
