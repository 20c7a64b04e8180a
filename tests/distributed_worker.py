"""What `test_distributed.py` runs under torchrun: small trainings whose results every process count must share."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lwd import distributed
from lwd.data import TensorLatents
from lwd.latents import Group, LatentSpec
from lwd.loop import PreemptedError
from lwd.parallel import whole_state
from lwd.probe import ProbeConfig, learn_schedule
from lwd.schedules import OffsetSchedule
from lwd.steps import OptimizerConfig
from lwd.training import TrainConfig, train

SPEC = LatentSpec([Group("texture", 3, 1.0), Group("semantic", 2, 1.5)])
TRAIN = TrainConfig(
    steps=50, batch_size=8, precision="float32", log_every=5, save_seconds=0, repa=0.0, ema=0.9, flips=True,
    optimizer=OptimizerConfig(lr=1e-2),
)  # fmt: skip
PROBE = ProbeConfig(steps=50, burn_in=20, batch_size=8, precision="float32", log_every=5, rho_lr=0.05, kinetic=0.02)


class Blocked(nn.Module):
    """A small network of blocks, so that FSDP has something to shard; with odd sizes, so that shards are uneven."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spec, self.null_label = SPEC, 4
        self.label, self.time = nn.Embedding(5, 7), nn.Linear(2, 7)
        self.into, self.out = nn.Conv2d(5, 7, 1), nn.Conv2d(7, 5, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(7, 7, 1), nn.Tanh()) for _ in range(3))

    def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.into(z) + (self.time(t) + self.label(labels))[:, :, None, None]
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def make_data(kind: type[TensorLatents] = TensorLatents) -> TensorLatents:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(31, 5, 4, 4, generator=generator)
    latents[:, 3:] = 0.8 * latents[:, :2] + 0.6 * latents[:, 3:]
    return kind(SPEC, latents, torch.arange(31) % 4, flipped=latents.flip(3))


class Interrupting(TensorLatents):
    """Data that interrupt the process at a certain batch, once."""

    calls = 0
    at = 10**9
    how = staticmethod(lambda: None)

    def gather(self, indices, flip=None):
        self.calls += 1
        if self.calls == self.at:
            self.how()
        return super().gather(indices, flip)


def all_ways(directory: Path) -> None:
    """DDP, FSDP, accumulation, the probe: each leaves its losses and weights."""
    variants = {"ddp": TRAIN, "fsdp": replace(TRAIN, parallel="fsdp"), "accumulated": replace(TRAIN, accumulate=2)}
    for name, config in variants.items():
        result = train(Blocked(), OffsetSchedule(0.3), make_data(), config, directory=directory / name)
        leave(directory / name, result.history, whole_state(result.denoiser))
    learned = learn_schedule(Blocked(), make_data(), PROBE, directory=directory / "probe")
    leave(directory / "probe", learned.history, {"rho": learned.schedule.rho})


def leave(directory: Path, history: list[dict], weights: dict[str, torch.Tensor]) -> None:
    if distributed.rank() == 0:
        torch.save({"losses": [row["loss"] for row in history], "weights": weights}, directory / "result.pt")


def interrupted(directory: Path, how: str) -> None:
    """A training that is interrupted in one of its processes, at its 23rd step, the first time it is started."""
    data = make_data(Interrupting)
    first_time = how != "resume" and not (directory / "interrupted").exists()
    if first_time and distributed.rank() == distributed.world() - 1:
        data.at = 23
        (directory / "interrupted").parent.mkdir(parents=True, exist_ok=True)

        def strike() -> None:
            (directory / "interrupted").write_text(str(os.environ.get("TORCHELASTIC_RESTART_COUNT")))
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)

        data.how = strike
    try:
        result = train(Blocked(), OffsetSchedule(0.3), data, TRAIN, directory=directory)
    except PreemptedError as stop:
        (directory / f"preempted-{distributed.rank()}").write_text(json.dumps(stop.code))
        return
    leave(directory, result.history, whole_state(result.denoiser))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.joined():
        what, where = sys.argv[1], Path(sys.argv[2])
        all_ways(where) if what == "all" else interrupted(where, what)
