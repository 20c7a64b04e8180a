"""Run plans, several tasks at a time; go on where an interrupted run stopped.

    python -m experiments.run quality --data fashion-mnist --seeds 0 1 2 --jobs 2
    python -m experiments.run --all --dry-run

Each task runs in a process of its own on one core (all of them with ``--jobs 1``) and writes its log below ``logs/``.
One that fails is reported and what needs it is left out; the same command tries again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.images import DEFAULT_OUT
from experiments.plans import PLANS, planned
from experiments.sets import MEASURED_ON, SETS, Places, checked
from experiments.tasks import Task
from lwd.progress import duration


class Runner:
    """Runs tasks in order, `jobs` at a time, each when what it needs is there."""

    def __init__(self, tasks: Sequence[Task], places: Places, budget: float, jobs: int) -> None:
        self.places, self.budget, self.jobs = places, budget, jobs
        self.waiting = [task for task in tasks if not self.done(task)]
        self.total, self.failed = len(self.waiting), list[Task]()
        self.running: dict[Task, tuple[subprocess.Popen[bytes], float]] = {}
        self.expected = self.finished_expected = 0.0
        self.expected = sum(task.seconds(budget) for task in self.waiting)

    def done(self, task: Task) -> bool:
        return task.file(self.places).exists()

    def log(self, task: Task) -> Path:
        return self.places.out / "logs" / task.file(self.places).relative_to(self.places.out).with_suffix(".log")

    def run(self) -> bool:
        """Whether all succeeded."""
        self.started = time.monotonic()
        try:
            while self.waiting or self.running:
                self._start()
                if not self.running:  # all that waits needs something that failed
                    break
                self._collect()
        except BaseException:
            for process, _ in self.running.values():
                process.terminate()
            raise
        for task in self.waiting:
            print(f"left out, what it needs failed: {describe(task)}", flush=True)
        return not self.failed and not self.waiting

    def _start(self) -> None:
        for task in list(self.waiting):
            if len(self.running) >= self.jobs:
                return
            if all(self.done(needed) for needed in task.needs):
                self.waiting.remove(task)
                self.running[task] = self._process(task), time.monotonic()

    def _process(self, task: Task) -> subprocess.Popen[bytes]:
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if self.jobs > 1 else {})
        log = self.log(task)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments.run", "--task", repr(task)]
        command += ["--out", str(self.places.out), "--budget", str(self.budget)]
        with log.open("ab") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    def _collect(self) -> None:
        """Wait until a task ends, and say so."""
        while True:
            for task, (process, start) in self.running.items():
                if process.poll() is not None:
                    del self.running[task]
                    self._tell(task, process.returncode, time.monotonic() - start)
                    return
            time.sleep(0.2)

    def _tell(self, task: Task, code: int, seconds: float) -> None:
        self.finished_expected += task.seconds(self.budget)
        number = self.total - len(self.waiting) - len(self.running)
        if code or not self.done(task):
            self.failed.append(task)
            print(f"[{number}/{self.total}] FAILED {describe(task)}: see {self.log(task)}", flush=True)
            return
        rate = (time.monotonic() - self.started) / max(self.finished_expected, 1e-9)
        left = duration(rate * (self.expected - self.finished_expected))
        print(f"[{number}/{self.total}] {describe(task)}: {seconds:.0f} s; {left} left", flush=True)


def describe(task: Task) -> str:
    """A task in a few words."""
    named = {key: value for key, value in vars(task).items() if value not in ("", (), False)}
    training = named.pop("training", None)
    words = [type(task).__name__.lower(), *(f"{v}" for k, v in named.items() if k in ("data", "encoder"))]
    words += [f"{k} {v}" for k, v in named.items() if k not in ("data", "encoder")]
    if training is not None:
        words.append("of " + " ".join(filter(None, [training.schedule, training.variant])))
    return " ".join(words)


def _task(text: str) -> Task:
    from experiments.tasks import Probe, Score, Surface, Training

    task: Task = eval(
        text, {"Probe": Probe, "Training": Training, "Surface": Surface, "Score": Score}
    )  # written by `_process`
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--data", nargs="+", default=list(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tasks at a time")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on steps and images, for a quick look")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    places = Places(chosen.out)
    if chosen.task:
        from lwd.memory import keep_freed_memory

        keep_freed_memory()
        _task(chosen.task).run(places, chosen.budget)
        return
    names = list(PLANS) if chosen.all else chosen.plans
    if not names:
        parser.error(f"name one or more of {', '.join(PLANS)}, or give --all")
    try:
        for name in names:
            checked(name, PLANS, "plan")
        for name in chosen.data:
            checked(name, SETS, "set of images")
    except ValueError as error:
        parser.error(str(error))
    runner = Runner(planned(names, chosen.data, chosen.seeds), places, chosen.budget, chosen.jobs)
    if chosen.dry_run:
        for task in runner.waiting:
            print(f"{duration(task.seconds(chosen.budget)):>8}  {describe(task)}")
    estimate = duration(runner.expected / chosen.jobs)
    print(f"{runner.total} tasks to do, about {estimate} with {chosen.jobs} at a time ({MEASURED_ON}).", flush=True)
    if chosen.dry_run:
        return
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(0 if runner.run() else 1)
    print("Interrupted. Run the same command again to continue.", file=sys.stderr)
    raise SystemExit(130)


if __name__ == "__main__":
    main()
