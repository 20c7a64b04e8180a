"""The loop that every training shares: metrics, checkpoints that resume exactly, stops that lose nothing.

A job does the updates; the loop owns its directory:

    metrics.jsonl    one line of metrics every `log_every` steps
    checkpoints/     everything needed to go on, see `lwd.checkpoints`
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from lwd import distributed
from lwd.checkpoints import Checkpoints
from lwd.cost import peak_of
from lwd.files import differences
from lwd.metrics import MetricsLog, Watcher
from lwd.progress import Progress

COUNT = "/count"
"""Suffix of a metric that another of the same name without it is to be divided by, after both have been averaged."""

PREEMPTION_CHECK = 10
"""Steps between two agreements of several processes on whether one of them was told to stop."""


class Job(Protocol):
    """One optimisation: `update` makes step number `step` (0 first) as a pure function of the state and `step`."""

    def update(self, step: int) -> dict[str, Tensor]:
        """Do one step; return metrics, scalars or vectors, ``"loss"`` among them, still on the device."""
        ...

    def describe(self) -> dict[str, Any]:
        """Further values for the log line, read only when one is written."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All state as a nest of tensors and numbers, of the same structure at any step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def explain(self, step: int) -> str:
        """What could be wrong with step `step`, whose loss is not finite."""
        ...


@dataclass(frozen=True)
class Hook:
    """Something to do every `images` images, at log steps: samples, validation. What it returns joins the log line."""

    images: int
    act: Callable[[int], dict[str, Any]]


class NonFiniteLossError(FloatingPointError):
    """The loss or a gradient became NaN or infinite; the message says at which step and what was found."""


class PreemptedError(SystemExit):
    """SIGTERM came; a checkpoint of this very step has been written."""


def run_job(
    job: Job,
    steps: int,
    *,
    directory: Path | None,
    identity: dict[str, Any],
    title: str,
    batch_size: int,
    log_every: int = 50,
    save_seconds: float = 60.0,
    keep_last: int = 2,
    keep_every: int = 0,
    skip_non_finite: bool = False,
    must_resume: bool = False,
    watchers: Sequence[Watcher] = (),
    hooks: Sequence[Hook] = (),
    operations: float | None = None,
) -> list[dict[str, Any]]:
    """Run `job` up to `steps` updates, going on from the newest checkpoint in `directory` if there is one.

    Args:
        directory: where the log and checkpoints go; None keeps everything in memory.
        identity: the configuration that a checkpoint must have been made with to be continued.
        title, batch_size: for the progress display and images per second; the batch is that of all processes.
        save_seconds: least seconds between checkpoints, which are made at log steps; there is always one at the end.
        keep_last, keep_every: see `Checkpoints`; a multiple of `keep_every` always has a log line and a checkpoint.
        skip_non_finite: go on after a step whose loss or gradient is not finite (it changes nothing then), and count
            such steps in the log, instead of stopping.
        must_resume: a run that finds no checkpoint is an error.
        watchers: get every log line too.
        hooks: are called at log steps.
        operations: of one image, to log what the machine achieves.

    Returns:
        The log lines of all steps so far.

    Raises:
        NonFiniteLossError: the last good checkpoint is kept.
        ValueError: the checkpoint in `directory` belongs to another configuration, is beyond `steps`, or is damaged.
        FileNotFoundError: there is no checkpoint, though there must be.
        PreemptedError: SIGTERM came, and a checkpoint was written.
    """
    main = distributed.rank() == 0
    log = MetricsLog(directory if main else None, list(watchers) if main else [])
    checkpoints = None
    done, history, pending = 0, list[dict[str, Any]](), list[dict[str, Tensor]]()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(directory, keep_last=keep_last, keep_every=keep_every)
        done, history, pending = _resume(job, checkpoints, log, identity, must_resume, steps)

    def save(*, wait: bool = False) -> None:
        if checkpoints is not None:
            meta = {
                "step": done,
                "images": done * batch_size,
                "processes": distributed.world(),
                "identity": identity,
                # Metrics since the last log line, so that the next one is that of an uninterrupted run.
                "pending": [{name: value.tolist() for name, value in row.items()} for row in pending],
            }
            checkpoints.save(done, job.state_dict(), meta, wait=wait)

    saved_at = window_start = time.monotonic()
    in_window = 0
    try:
        with _Termination() as termination, Progress(title, steps, done=done, shown=main) as progress:
            while done < steps:
                # Scalars stay on the device between log lines: reading one would make the host wait for it every step.
                pending.append(job.update(done))
                done, in_window = done + 1, in_window + 1
                info = ""
                milestone = keep_every > 0 and done % keep_every == 0
                if done % log_every == 0 or done == steps or milestone:
                    begin = done - len(pending)
                    skipped = _require_finite(pending, done, job, skip_non_finite)
                    elapsed = time.monotonic() - window_start
                    row = {"step": done, **_mean_metrics(pending), **job.describe()}
                    row |= _speed(in_window * batch_size / elapsed, operations)
                    if skipped:
                        row["skipped"] = skipped
                    for hook in hooks:
                        if done * batch_size // hook.images > begin * batch_size // hook.images:
                            row |= hook.act(done)
                    pending, in_window, window_start = [], 0, time.monotonic()
                    history.append(row)
                    if main:
                        log.add(row)
                    info = f"loss {row['loss']:.4f}"
                    due = done == steps or milestone or time.monotonic() - saved_at >= save_seconds
                    # The clock of one process decides for all.
                    if checkpoints is not None and distributed.from_main(due):
                        save()
                        saved_at = time.monotonic()
                progress.advance(info=info)
                agreed = distributed.world() == 1 or done % PREEMPTION_CHECK == 0
                if agreed and distributed.any_of(termination.wanted):
                    if pending:
                        _require_finite(pending, done, job, skip_non_finite)
                    save(wait=True)
                    raise PreemptedError(143)
    except BaseException:
        # What is being written is whole in a moment. Other processes that have died would have to take part in it.
        if checkpoints is not None and distributed.world() == 1:
            checkpoints.finish()
        raise
    if checkpoints is not None:
        checkpoints.finish()
        distributed.wait_for_all()
    return history


def _speed(images_per_second: float, operations: float | None) -> dict[str, float]:
    """Images per second, and with the operations of one also those, and their share of what the GPUs' maker states."""
    if operations is None:
        return {"images_per_second": images_per_second}
    achieved = images_per_second * operations
    speed = {"images_per_second": images_per_second, "operations_per_second": achieved}
    peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return speed if peak is None else speed | {"utilisation": achieved / (peak * distributed.world())}


def _resume(
    job: Job, checkpoints: Checkpoints, log: MetricsLog, identity: dict[str, Any], must_resume: bool, steps: int
) -> tuple[int, list[dict[str, Any]], list[dict[str, Tensor]]]:
    made: list[int] = distributed.from_main(checkpoints.steps())
    if not made:
        if must_resume:
            raise FileNotFoundError(
                f"there is no checkpoint in {checkpoints.directory} to resume from; run without --resume to begin"
            )
        return 0, distributed.from_main(log.resume(0)), []
    step = made[-1]
    meta = distributed.from_main(checkpoints.meta(step))
    if changed := differences(meta["identity"], identity, "in the checkpoint"):
        raise ValueError(
            f"{checkpoints.path(step)} was made with other settings; continue with the same ones or choose another "
            "directory:\n  " + "\n  ".join(changed)
        )
    if step > steps:
        raise ValueError(
            f"{checkpoints.path(step)} is beyond the {steps:,} steps asked for; choose another directory, or take the "
            "weights of an earlier step from a snapshot or checkpoint"
        )
    job.load_state_dict(checkpoints.load(step, job.state_dict()))
    pending = [{name: torch.tensor(value) for name, value in row.items()} for row in meta["pending"]]
    return step, distributed.from_main(log.resume(step)), pending


def _require_finite(rows: list[dict[str, Tensor]], done: int, job: Job, skip: bool) -> int:
    """How many of the steps in `rows` were not finite, in any process; those are removed, or it is an error."""
    watched = [name for name in ("loss", "gradient_norm") if name in rows[0]]
    finite = torch.stack([_stacked(rows, name).isfinite() for name in watched]).all(dim=0)
    bad = distributed.mean_((~finite).float()) > 0
    if not bool(bad.any()):
        return 0
    if skip:
        skipped = int(bad.sum())
        if skipped == len(rows):
            raise NonFiniteLossError(f"none of the last {skipped} steps had a finite loss; there is nothing to skip to")
        rows[:] = [row for row, drop in zip(rows, bad.tolist(), strict=True) if not drop]
        return skipped
    first = int(bad.nonzero()[0])
    step = done - len(rows) + first
    terms = ", ".join(f"{name} {float(value):g}" for name, value in rows[first].items() if value.ndim == 0)
    raise NonFiniteLossError(
        f"the loss or its gradient is not finite at step {step + 1} ({terms}). {job.explain(step)} "
        "The last checkpoint was made before that and is kept."
    )


def _mean_metrics(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Means over the rows and over the processes; of vectors, element by element, None where there was nothing."""
    names = list(rows[0])
    # One message between the processes and one copy from the device for all of them.
    means = [_stacked(rows, name).double().mean(dim=0) for name in names]
    joined = distributed.mean_(torch.cat([mean.flatten() for mean in means])).cpu()
    parts = joined.split([mean.numel() for mean in means])
    by_name = {name: part.view_as(mean) for name, part, mean in zip(names, parts, means, strict=True)}
    result: dict[str, Any] = {}
    for name, value in by_name.items():
        if name.endswith(COUNT):
            continue
        count = by_name.get(name + COUNT)
        if count is not None:
            ratios = zip(value.tolist(), count.tolist(), strict=True)
            result[name] = [total / number if number else None for total, number in ratios]
        else:
            result[name] = value.tolist()
    return result


def _stacked(rows: list[dict[str, Tensor]], name: str) -> Tensor:
    """One metric of all rows, where it was made; rows read back from a checkpoint join it there."""
    device = rows[-1][name].device
    return torch.stack([row[name].to(device) for row in rows])


class _Termination:
    """Remembers that SIGTERM came, instead of dying of it, for the length of the block."""

    wanted = False

    def __enter__(self) -> _Termination:
        self._usable = threading.current_thread() is threading.main_thread()
        if self._usable:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True

    def __exit__(self, *_: object) -> None:
        if self._usable:
            signal.signal(signal.SIGTERM, self._before)
