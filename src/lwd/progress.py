"""Progress with an estimate: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Progress:
    """Counts up to `total`; use as a context manager and call `advance`.

    Args:
        title: what is going on, for example ``"train learned"``.
        total: how many units of work there are in all.
        done: how many an earlier, interrupted run had done already.
        unit: what is counted.
        every: seconds between plain lines when standard error is not a terminal.
        shown: False counts in silence.
    """

    def __init__(
        self, title: str, total: int, *, done: int = 0, unit: str = "step", every: float = 15.0, shown: bool = True
    ) -> None:
        self.title, self.total, self.done, self.unit, self.every = title, total, done, unit, every
        self.shown = shown
        self._started_at = done
        self._bar = None

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, initial=self.done, desc=self.title, unit=self.unit, leave=True)
        return self

    def advance(self, amount: int = 1, info: str = "") -> None:
        """Count `amount` more; `info` is a short text shown behind, kept until the next one."""
        self.done += amount
        if self._bar is not None:
            if info:
                self._bar.set_postfix_str(info, refresh=False)
            self._bar.update(amount)
            return
        if not self.shown:
            return
        now = time.monotonic()
        if now - self._last >= self.every or (self.done >= self.total and amount):
            self._last = now
            rate = (self.done - self._started_at) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / rate if rate else float("inf")
            print(
                f"{self.title:<24} {self.done:>7}/{self.total} {self.unit}s {100 * self.done / self.total:3.0f} %  "
                f"{rate:6.1f} {self.unit}s/s  {duration(left)} left  {info}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def reach(self, done: int, info: str = "") -> None:
        """Count up to `done`; for callers that know the position rather than the increment."""
        if done > self.done:
            self.advance(done - self.done, info)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def counting(title: str, unit: str) -> Callable[[int, int], None]:
    """A ``report(done, total)`` callback that shows a `Progress` from its first call to the one with done = total."""
    shown: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(title, total, unit=unit).__enter__())
        shown[0].reach(done)
        if done >= total:
            shown.pop().__exit__(None, None, None)

    return report


def duration(seconds: float) -> str:
    """``"0:42"``, ``"12:05"`` or ``"1:02:33"``."""
    if seconds == float("inf"):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
