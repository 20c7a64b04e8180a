"""What a step of the probe and one of the training have in common: its optimizer, its parts, its metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lwd.batches import Batches, LatentSource, TrainingBatch
from lwd.latents import LatentSpec
from lwd.loop import COUNT
from lwd.objective import DenoiserTerms, ScheduleTerms
from lwd.parallel import Trained
from lwd.schedules import Schedule

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


def identity_of(config: Any, *, extendable: Iterable[str] = ()) -> dict[str, Any]:
    """What of a configuration a resumed run must not change, as JSON reads it back.

    Args:
        extendable: settings that this run may change besides those of `EXECUTION`.
    """
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
    """ValueError unless data, schedule and denoiser mean the same groups, and the denoiser has all classes."""
    if schedule.names != data.spec.names:
        raise ValueError(f"the schedule is for the groups {schedule.names}, the latents have {data.spec.names}")
    spec = getattr(denoiser, "spec", None)
    if spec is not None and spec.sizes != data.spec.sizes:
        raise ValueError(
            f"the denoiser is built for groups of {spec.sizes} channels, the latents have {data.spec.sizes}"
        )
    null, labels = getattr(denoiser, "null_label", None), getattr(data, "labels", None)
    labels = labels() if callable(labels) else labels
    # The null label itself is accepted by the network, and would train the class that has it as "no class".
    if null and labels is not None and (highest := int(labels.max())) >= null:
        raise ValueError(f"the latents have labels up to {highest}, but the denoiser has classes 0 to {null - 1} only")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON reads it back (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
