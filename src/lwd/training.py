"""Stage II of Algorithm 1: training a denoiser on a frozen schedule (LWD Eq. 39, Table 5)."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from lwd.data.dataset import LatentDataset
from lwd.data.loader import BatchLoader
from lwd.data.memory import Batch
from lwd.data.order import BatchOrder
from lwd.files import write_atomically, write_json
from lwd.latents import LatentSpec, Normalization
from lwd.loop import run_job
from lwd.objective import Denoiser, Jacobian, Reduction, Repa, TimeDistribution, denoiser_objective, sample_tau
from lwd.randomness import derived_seed, stream
from lwd.schedules import Schedule

Precision = Literal["float32", "bf16"]
Decay = Literal["constant", "linear", "cosine"]


class LatentSource(Protocol):
    """Where batches come from; `lwd.data.LatentDataset` is one."""

    spec: LatentSpec
    normalization: Normalization

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor, flip: Tensor | None = None) -> Batch: ...


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate; the defaults are the paper's (Table 5)."""

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


@dataclass(frozen=True)
class TrainResult:
    """The averaged denoiser, in eval mode, and the log lines of the run."""

    denoiser: nn.Module
    history: list[dict[str, Any]]


def train(
    denoiser: nn.Module,
    schedule: Schedule,
    data: LatentSource,
    config: TrainConfig,
    *,
    directory: Path | str | None = None,
    device: torch.device | str = "cpu",
    title: str = "train",
) -> TrainResult:
    """Train `denoiser` on L_theta along a frozen `schedule`; go on where an interrupted run in `directory` stopped.

    A resumed run takes the very steps the uninterrupted one would have taken: batches, noise, times and label dropout
    are functions of (seed, step), and the checkpoint holds everything else.

    Args:
        denoiser: a freshly initialised network; trained in place.
        directory: gets ``checkpoint.pt``, ``metrics.jsonl``, ``schedule.json``, ``latents.json``, snapshots of
            the averaged weights, and, for a network that can `save_pretrained`, the result as ``model/``.

    Raises:
        ValueError: groups of data, schedule and denoiser differ; a checkpoint made with other settings.
        NonFiniteLossError: NaN or infinity; the last good checkpoint is kept.
    """
    schedule = schedule.frozen().to(device)
    check_groups(data, schedule, denoiser)
    directory = None if directory is None else Path(directory)
    job = _Training(denoiser.to(device), schedule, data, config, directory, torch.device(device))
    identity = {
        "train": to_json(config),
        "schedule": {key: schedule.to_dict()[key] for key in ("kind", "groups", "parameters")},
        "normalization": data.normalization.to_dict(),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
    }
    if directory is not None:
        schedule.save(directory / "schedule.json")
        latents = {"normalization": data.normalization.to_dict(), "encoders": getattr(data, "encoders", {})}
        write_json(directory / "latents.json", latents)
    history = run_job(
        job,
        config.steps,
        directory=directory,
        identity=identity,
        title=title,
        batch_size=config.batch_size,
        log_every=config.log_every,
        save_seconds=config.save_seconds,
    )
    job.copy_average_to(denoiser)
    denoiser.eval()
    save = getattr(denoiser, "save_pretrained", None)
    if directory is not None and callable(save):
        save(directory / "model")
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
        self.batches = Batches(data, config, denoiser, device)
        self.forward = prepare_forward(denoiser, config.precision, config.compile, device)
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    def update(self, step: int) -> dict[str, Tensor]:
        config = self.config
        batch = self.batches.draw(step, config.tau)
        terms = denoiser_objective(
            self.forward,
            self.schedule,
            self.data.spec,
            batch.x0,
            batch.x1,
            batch.labels,
            batch.tau,
            features=batch.features,
            cosine=config.cosine,
            repa=config.repa,
            repa_loss=config.repa_loss,
            jacobian=config.jacobian,
            reduction=config.reduction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * config.optimizer.factor(step, config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.average, list[Tensor](self.parameters), 1 - config.ema)
        if step + 1 in config.snapshots and self.directory is not None:
            self.save_average(self.directory / "snapshots" / f"{step + 1:08}.safetensors")
        metrics = {"loss": terms.total, "flow": terms.flow, "cosine": terms.cosine, "repa": terms.repa}
        return logged(metrics, terms.per_group, self.data.spec)

    def describe(self) -> dict[str, Any]:
        return {}

    def explain(self, step: int) -> str:
        return self.batches.explain(step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "denoiser": self.denoiser.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.denoiser.load_state_dict(state["denoiser"])
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def copy_average_to(self, denoiser: nn.Module) -> None:
        for parameter, average in zip((p for p in denoiser.parameters() if p.requires_grad), self.average, strict=True):
            parameter.copy_(average)

    def save_average(self, path: Path) -> None:
        from safetensors.torch import save_file

        names = [name for name, p in self.denoiser.named_parameters() if p.requires_grad]
        weights = dict(zip(names, (a.cpu() for a in self.average), strict=True))
        write_atomically(path, lambda temporary: save_file(weights, temporary))


def logged(terms: dict[str, Tensor], per_group: Tensor, spec: LatentSpec) -> dict[str, Tensor]:
    """The scalars of a log line: the terms, and the mean of every group's loss l_g from `per_group` [B, G]."""
    by_group = {f"loss_{name}": loss for name, loss in zip(spec.names, per_group.mean(dim=0), strict=True)}
    return {name: value.detach() for name, value in (terms | by_group).items()}


@dataclass(frozen=True)
class TrainingBatch:
    """Everything one step needs, on the device."""

    x0: Tensor
    x1: Tensor
    labels: Tensor
    tau: Tensor
    features: Tensor | None


class BatchConfig(Protocol):
    """The settings that decide what a batch is; `TrainConfig` and `ProbeConfig` have them."""

    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def label_dropout(self) -> float: ...
    @property
    def flips(self) -> bool: ...


class Batches:
    """Training batches as a pure function of the step: data order, flips, noise, times and label dropout."""

    def __init__(self, data: LatentSource, config: BatchConfig, denoiser: nn.Module, device: torch.device) -> None:
        self.data, self.seed, self.device, self.flips = data, config.seed, device, config.flips
        self.order = BatchOrder(len(data), config.batch_size, derived_seed(config.seed, "order"))
        self.label_dropout = config.label_dropout
        # A set on disk is read ahead.
        self.loader = None
        if isinstance(data, LatentDataset):
            self.loader = BatchLoader(data, self.order, device, flips=self.flips)
        self.null_label = getattr(denoiser, "null_label", None)
        if self.label_dropout > 0 and self.null_label is None:
            raise ValueError("label dropout needs a denoiser with a `null_label`; set label_dropout=0 to train without")

    def draw(self, step: int, distribution: TimeDistribution = "uniform") -> TrainingBatch:
        if self.loader is not None:
            batch = self.loader.get(step)
        else:
            flip = self.order.flips(step) if self.flips else None
            batch = self.data.gather(self.order.indices(step), flip)
        x1 = batch.latents.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        features = None if batch.features is None else batch.features.to(self.device, non_blocking=True)
        generator = stream(self.seed, "noise", step, self.device)
        x0 = torch.randn(x1.shape, generator=generator, device=self.device)
        tau = sample_tau(len(x1), distribution, generator=generator, device=self.device)
        if self.label_dropout > 0:
            drop = torch.rand(len(x1), generator=generator, device=self.device) < self.label_dropout
            labels = torch.where(drop, cast(int, self.null_label), labels)
        return TrainingBatch(x0, x1, labels, tau, features)

    def explain(self, step: int) -> str:
        """Whether the data of `step` is to blame for a loss that is not finite."""
        indices = self.order.indices(step)
        finite = self.data.gather(indices).latents.isfinite().flatten(1).all(dim=1)
        if bool(finite.all()):
            return (
                "The latents of that batch are finite, so the update diverged: lower the learning rate or use float32."
            )
        return f"The latents of images {indices[~finite.cpu()].tolist()[:8]} are NaN or infinite: encode them again."


def prepare_forward(denoiser: nn.Module, precision: Precision, compiled: bool, device: torch.device) -> Denoiser:
    """`denoiser` under autocast, compiled if asked for."""
    run = torch.compile(denoiser, dynamic=False) if compiled else denoiser

    def forward(z: Tensor, t: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        with autocast(precision, device):
            return cast(Tensor, run(z, t, labels, **kwargs))

    return forward


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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
