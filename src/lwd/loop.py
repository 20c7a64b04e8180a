"""The loop that the probe and the training share: logging, checkpoints that resume exactly, a stop on NaN.

A job does the updates; the loop owns its directory:

    metrics.jsonl    one line of scalars every `log_every` steps
    checkpoint.pt    everything needed to go on, replaced atomically
"""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lwd.files import write_atomically, write_text
from lwd.progress import Progress


class Job(Protocol):
    """One optimisation: `update` makes step number `step` (0 first) as a pure function of the state and `step`."""

    def update(self, step: int) -> dict[str, Tensor]:
        """Do one step; return scalars, ``"loss"`` among them, still on the device."""
        ...

    def describe(self) -> dict[str, Any]:
        """Further values for the log line, read only when one is written."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def explain(self, step: int) -> str:
        """What could be wrong with step `step`, whose loss is not finite."""
        ...


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; the message says at which step and what was found."""


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
) -> list[dict[str, Any]]:
    """Run `job` up to `steps` updates, going on from a checkpoint in `directory` if there is one.

    Args:
        directory: where the log and checkpoints go; None keeps everything in memory.
        identity: the configuration that a checkpoint must have been made with to be continued.
        title, batch_size: for the progress display and images per second.
        save_seconds: least seconds between checkpoints, which are made at log steps; there is always one at the end.

    Returns:
        The log lines of all steps so far.

    Raises:
        NonFiniteLossError: the last good checkpoint is kept.
        ValueError: the checkpoint in `directory` belongs to another configuration, or is damaged.
    """
    done = 0
    history: list[dict[str, Any]] = []
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        done, history = _resume(job, directory, identity)
    unlogged: list[dict[str, Tensor]] = []
    saved_at = window_start = time.monotonic()

    with Progress(title, steps, done=done) as progress:
        while done < steps:
            # Scalars stay on the device between log lines: reading one would make the host wait for it every step.
            unlogged.append(job.update(done))
            done += 1
            info = ""
            if done % log_every == 0 or done == steps:
                _require_finite(unlogged, done, job)
                elapsed = time.monotonic() - window_start
                row = {"step": done, **_mean_metrics(unlogged), **job.describe()}
                row["images_per_second"] = len(unlogged) * batch_size / elapsed
                unlogged, window_start = [], time.monotonic()
                history.append(row)
                info = f"loss {row['loss']:.4f}"
                if directory is not None:
                    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as log:
                        log.write(json.dumps(row) + "\n")
                    # Only here: what is saved has been checked, and no metrics are pending.
                    if done == steps or time.monotonic() - saved_at >= save_seconds:
                        _save(job, done, directory, identity)
                        saved_at = time.monotonic()
            progress.advance(info=info)
    return history


def _save(job: Job, done: int, directory: Path, identity: dict[str, Any]) -> None:
    state = {"step": done, "identity": identity, "job": job.state_dict()}
    write_atomically(directory / "checkpoint.pt", lambda path: torch.save(state, path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content on the CPU; ValueError naming the file when it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({error}). Delete it to start this run again from its beginning."
        ) from error
    return state


def _resume(job: Job, directory: Path, identity: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    path, log = directory / "checkpoint.pt", directory / "metrics.jsonl"
    if not path.exists():
        log.unlink(missing_ok=True)
        return 0, []
    state = read_checkpoint(path)
    differences = _differences(state["identity"], identity)
    if differences:
        raise ValueError(
            f"{path} was made with other settings; continue with the same ones or choose another directory:\n  "
            + "\n  ".join(differences)
        )
    job.load_state_dict(state["job"])
    done = int(state["step"])
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    # An interrupted run may have logged past its last checkpoint, the last line perhaps only half.
    history = [row for row in map(_parse_line, lines) if row is not None and row["step"] <= done]
    write_text(log, "".join(json.dumps(row) + "\n" for row in history))
    return done, history


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row


def _differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(saved.keys() | current.keys()):
        a, b = saved.get(key, "absent"), current.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {_short(a)} in the checkpoint, {_short(b)} now")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _require_finite(rows: list[dict[str, Tensor]], done: int, job: Job) -> None:
    if not rows or torch.stack([row["loss"] for row in rows]).isfinite().all():
        return
    first = next(i for i, row in enumerate(rows) if not row["loss"].isfinite())
    step = done - len(rows) + first
    terms = ", ".join(f"{name} {float(value):g}" for name, value in rows[first].items())
    raise NonFiniteLossError(
        f"the loss is not finite at step {step + 1} ({terms}). {job.explain(step)} "
        "The last checkpoint was made before that and is kept."
    )


def _mean_metrics(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {name: float(torch.stack([row[name] for row in rows]).double().mean()) for name in rows[0]}
