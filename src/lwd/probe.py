"""Stage I of Algorithm 1: a short joint probe learns the schedule (LWD section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwd import distributed
from lwd.batches import Batches, LatentSource
from lwd.compute import Precision
from lwd.loop import run_job
from lwd.metrics import Watcher
from lwd.objective import Jacobian, Reduction, schedule_objective
from lwd.parallel import Trained, adamw, guarded_step, load_network_state, network_state
from lwd.schedules import PolynomialSchedule
from lwd.steps import OptimizerConfig, backward_in_parts, check_groups, identity_of, machine_use, to_json

COLLAPSE_DELAY = 0.8
"""A probe whose mean curve has at least this delay (see `delay`) counts as collapsed."""


@dataclass(frozen=True)
class ProbeConfig:
    """How a schedule is learned; the defaults are the paper's (Table 4).

    Attributes:
        burn_in: steps before rho enters the average.
        kinetic: lambda of Eq. 38.
        jacobian: ``"detached"`` (the paper), ``"exact"``, ``"information"`` or ``"none"``, which leaves the factor t'
            out; see `lwd.schedule_objective`.
        reduction, kinetic_reduction: how groups are summed in the flow loss and in the kinetic term; see there.
        degree: M of Eq. 40.
        rho: what rho [M + 1] of every curve starts from; close to the identity by default.
        optimizer: of the temporary denoiser.
        rho_lr: learning rate of rho, constant.
        label_dropout: share of the images whose label is withheld.
        flips: whether half of the images, at random, come mirrored.
        precision: of matrix products; the curve and rho are float32.

    Raises:
        ValueError: a burn-in that is not shorter than the probe; another number of rho than `degree` + 1.
    """

    steps: int = 10_000
    burn_in: int = 5_000
    batch_size: int = 256
    kinetic: float = 0.04
    jacobian: Jacobian = "detached"
    reduction: Reduction = "global"
    kinetic_reduction: Reduction = "groups"
    degree: int = 4
    rho: tuple[float, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rho_lr: float = 1e-2
    label_dropout: float = 0.1
    flips: bool = False
    seed: int = 0
    precision: Precision = "bf16"
    compile: bool = False
    log_every: int = 50
    save_seconds: float = 300.0
    accumulate: int = 1
    recompute: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.burn_in < self.steps:
            raise ValueError(
                f"burn_in ({self.burn_in}) must be less than steps ({self.steps}): rho is averaged after it"
            )
        if len(self.rho) not in (0, self.degree + 1):
            raise ValueError(f"rho has {len(self.rho)} values; a curve of degree {self.degree} needs {self.degree + 1}")


@dataclass(frozen=True)
class LearnedSchedule:
    """What a probe found.

    Attributes:
        schedule: the frozen schedule of the averaged rho, provenance included.
        history: log lines: step, flow, kinetic, loss by group, rho, and ``midpoint``, the curve at tau = 1/2.
        delay: how far the curve is from synchronous (0) towards the extreme of the family (1).
    """

    schedule: PolynomialSchedule
    history: list[dict[str, Any]]
    delay: float

    @property
    def collapsed(self) -> bool:
        return self.delay >= COLLAPSE_DELAY


def learn_schedule(
    denoiser: nn.Module,
    data: LatentSource,
    config: ProbeConfig,
    *,
    directory: Path | str | None = None,
    device: torch.device | str = "cpu",
    title: str = "probe",
    watchers: Sequence[Watcher] = (),
) -> LearnedSchedule:
    """Algorithm 1, stage I: update a temporary denoiser and rho jointly on L_rho, average rho after the burn-in.

    Args:
        denoiser: a freshly initialised network. It is trained and of no use afterwards. A frozen one does not work:
            rho would only see the mismatch between model and schedule (section 3.5).
        directory: gets ``schedule.json``, ``metrics.jsonl`` and ``checkpoints/``; an interrupted probe there goes on,
            step for step as if uninterrupted.

    Raises:
        ValueError: data and denoiser differ in their groups; a checkpoint made with other settings.
        NonFiniteLossError: NaN or infinity; the last good checkpoint is kept.
    """
    directory = None if directory is None else Path(directory)
    spec = data.spec
    start = [config.rho] * (len(spec) - 1) if config.rho else None
    schedule = PolynomialSchedule(config.degree, start, groups=len(spec), names=spec.names).to(device)
    check_groups(data, schedule, denoiser)
    parameters = sum(p.numel() for p in denoiser.parameters())
    job = _Probe(denoiser.to(device), schedule, data, config, torch.device(device))
    history = run_job(
        job,
        config.steps,
        directory=directory,
        identity={
            "probe": identity_of(config),
            "latents": getattr(data, "fingerprint", None),
            "normalization": data.normalization.to_dict(),
            "parameters": parameters,
        },
        title=title,
        batch_size=config.batch_size,
        log_every=config.log_every,
        save_seconds=config.save_seconds,
        watchers=watchers,
    )
    learned = PolynomialSchedule(config.degree, job.mean_rho(), groups=len(spec), names=spec.names).frozen()
    learned.provenance = {"probe": to_json(config), "images": len(data), "delay": delay(learned)}
    if directory is not None and distributed.rank() == 0:
        learned.save(directory / "schedule.json")
    return LearnedSchedule(learned, history, delay(learned))


class _Probe:
    """The job of `learn_schedule`; see `lwd.loop.Job`."""

    def __init__(
        self,
        denoiser: nn.Module,
        schedule: PolynomialSchedule,
        data: LatentSource,
        config: ProbeConfig,
        device: torch.device,
    ) -> None:
        self.denoiser, self.schedule, self.data, self.config = denoiser.train(), schedule, data, config
        self.device, self.batches = device, Batches(data, config, denoiser, device)
        self.forward = Trained(
            denoiser,
            device,
            precision=config.precision,
            compiled=config.compile,
            recompute=config.recompute,
            unused=("repa_projector",),
        )
        self.learned = nn.ModuleDict({"denoiser": denoiser, "schedule": schedule})
        self.optimizer = adamw(
            [
                {"params": [p for p in denoiser.parameters() if p.requires_grad], "lr": config.optimizer.lr},
                {"params": [schedule.rho], "lr": config.rho_lr, "weight_decay": 0.0},
            ],
            device,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.rho_sum = torch.zeros_like(schedule.rho, dtype=torch.float64, device="cpu").to(device)
        self.averaged = 0

    def update(self, step: int) -> dict[str, Tensor]:
        config = self.config
        self.optimizer.param_groups[0]["lr"] = config.optimizer.lr * config.optimizer.factor(step, config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = backward_in_parts(
            self.forward,
            self.batches.draw(step),
            config.accumulate,
            self.schedule,
            self.data.spec,
            lambda part: schedule_objective(
                self.forward,
                self.schedule,
                self.data.spec,
                part.x0,
                part.x1,
                part.labels,
                part.tau,
                kinetic=config.kinetic,
                jacobian=config.jacobian,
                reduction=config.reduction,
                kinetic_reduction=config.kinetic_reduction,
            ),
        )
        # The denoiser's gradients have been averaged over the processes in the backward pass, these few have not.
        if self.schedule.rho.grad is not None:
            distributed.mean_(self.schedule.rho.grad)
        norm = guarded_step(self.optimizer)
        if step >= config.burn_in:
            self.rho_sum += self.schedule.rho.detach()
            self.averaged += 1
        return metrics | {"gradient_norm": norm}

    def mean_rho(self) -> Tensor:
        return (self.rho_sum / self.averaged).float().cpu()

    def describe(self) -> dict[str, Any]:
        current = self.schedule.frozen().cpu()
        return {
            "rho": current.rho.tolist(),
            "midpoint": current(torch.tensor([0.5])).t[0].tolist(),
            "delay": delay(current),
            **machine_use(self.batches, self.device),
        }

    def explain(self, step: int) -> str:
        return self.batches.explain(step)

    def state_dict(self) -> dict[str, Any]:
        return network_state(self.learned, self.optimizer) | {"rho_sum": self.rho_sum, "averaged": self.averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_network_state(self.learned, self.optimizer, state)
        self.rho_sum.copy_(state["rho_sum"])
        self.averaged = state["averaged"]


@torch.no_grad()
def delay(schedule: PolynomialSchedule) -> float:
    """Area between identity and curve, as a share of that area for tau^(M+1); the largest over the chain's links.

    For f of Eq. 41 the area under the curve is 1/Z sum_m a_m / ((m+1)(m+2)), and 1/(M+2) for the extreme.
    """
    a = torch.nn.functional.softplus(schedule.rho.double().cpu()).reshape(schedule.groups - 1, -1)
    m = torch.arange(a.shape[1], dtype=torch.float64)
    area = (a / ((m + 1) * (m + 2))).sum(dim=1) / (a / (m + 1)).sum(dim=1)
    return float(((0.5 - area) / (0.5 - 1 / (schedule.degree + 2))).max())
