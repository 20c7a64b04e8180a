"""Checkpoints of a run: sharded over the processes, written in the background, whole or not there at all.

    checkpoints/step-00001000/    what torch.distributed.checkpoint writes, and meta.json

A checkpoint is written under a hidden name and renamed when all processes have written theirs, so whatever is killed
when, the newest complete one is there. It can be read by another number of processes.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lwd import distributed
from lwd.files import read_json, write_json

# torch.distributed.checkpoint takes as long to import as half of torch: only what writes or reads one waits for it.

# Said by a background thread, where a context manager would not reach it; one process is not a mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints in `directory`/checkpoints.

    Args:
        keep_last: how many of the newest to keep.
        keep_every: keep those of every so many steps for good; 0 keeps none.
    """

    def __init__(self, directory: Path, *, keep_last: int = 2, keep_every: int = 0) -> None:
        if keep_last < 1:
            raise ValueError(f"at least one checkpoint must be kept, not {keep_last}")
        self.directory, self.keep_last, self.keep_every = directory / "checkpoints", keep_last, keep_every
        self._writing: Future[Any] | None = None

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08}"

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-*"))

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any], *, wait: bool = False) -> None:
        """Write `state`, a nest of tensors and numbers, in the background; `wait` for it to be there.

        The tensors are copied before this returns, so training may go on. All processes must call it.

        Args:
            meta: JSON for ``meta.json``.

        Raises:
            OSError: an earlier checkpoint could not be written.
        """
        import torch.distributed.checkpoint as dcp

        self.finish()
        partial = self.directory / f".{self.path(step).name}.partial"
        if distributed.rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".step-*.partial"):
                shutil.rmtree(leftover)
        distributed.wait_for_all()
        writing = dcp.async_save(
            state,
            checkpoint_id=partial,
            process_group=distributed.background_group(),
            no_dist=distributed.world() == 1,
        )
        assert isinstance(writing, Future)
        if distributed.rank() == 0:
            self._writing = _then(writing, lambda: self._complete(step, partial, meta))
        else:
            self._writing = writing
        if wait:
            self.finish()
            distributed.wait_for_all()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; OSError if it could not be."""
        if self._writing is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        writing, self._writing = self._writing, None
        try:
            writing.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise OSError(
                f"could not write a checkpoint to {self.directory}: {error}. The ones before it are unchanged; free "
                "some space and run the same command again."
            ) from error

    def meta(self, step: int) -> dict[str, Any]:
        """What was kept beside the checkpoint of `step`."""
        meta: dict[str, Any] = read_json(self.path(step) / "meta.json")
        return meta

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Fill `state`, which must have the structure of the one saved, and return it.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        path = self.path(step)
        try:
            dcp.load(state, checkpoint_id=path, no_dist=distributed.world() == 1)
        except (
            CheckpointException,
            RuntimeError,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            pickle.PickleError,
        ) as error:
            older = [f"{other}" for other in self.steps() if other < step]
            advice = f"to go on from step {older[-1]}" if older else "to start this run again from its beginning"
            raise ValueError(f"{path} is damaged ({str(error).splitlines()[0][:200]}); delete it {advice}.") from error
        return state

    def _complete(self, step: int, partial: Path, meta: dict[str, Any]) -> None:
        write_json(partial / "meta.json", meta)
        shutil.rmtree(self.path(step), ignore_errors=True)  # a run that went back and came here again
        partial.rename(self.path(step))
        for old in self.steps()[: -self.keep_last]:
            if not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(self.path(old))


def _then(future: Future[Any], act: Callable[[], object]) -> Future[Any]:
    """A future that has done `act` once `future` is done."""
    result: Future[Any] = Future()

    def follow(done: Future[Any]) -> None:
        try:
            done.result()
            act()
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    future.add_done_callback(follow)
    return result
