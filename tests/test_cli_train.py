"""`lwd probe` and `lwd train`: what does not fit is said, sweeps are bisected and split, processes share a run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lwd import cli
from lwd.data import ShardWriter
from lwd.data.embedded import CLASS_NAMES, EMBEDDED_SPEC
from lwd.latents import Group, LatentSpec
from lwd.schedules import load_schedule


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write(tmp_path_factory.mktemp("latents"))


def write(directory, spec=EMBEDDED_SPEC, classes=CLASS_NAMES, side=4):
    """Sixty random latents that the embedded recipe fits."""
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(directory, spec, classes, encoders={"texture": {"encoder": "pixels", "patch": 8}}) as writer:
        writer.add(torch.randn(60, spec.channels, side, side, generator=generator), torch.arange(60) % len(classes))
    return directory


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.split())
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_latents_that_do_not_fit_the_recipe_are_described(tmp_path, capsys):
    other = write(tmp_path / "other", LatentSpec([Group("texture", 3), Group("depth", 2)]), list("abcdefghijkl"), 8)
    message = fails(f"train --latents {other} --out {tmp_path}/run --schedule synchronous", capsys)
    assert "does not fit the recipe 'embedded'" in message
    assert "groups of 3 texture + 2 depth channels, the recipe expects 64 texture + 16 semantic" in message
    assert "a grid of 8 x 8, the recipe expects 4 squared" in message
    assert "12 classes, the recipe expects at most 10" in message


def test_nothing_to_probe_and_nothing_to_resume(latents, tmp_path, capsys):
    assert "fixed schedule 'offset:0.3'" in fails(
        f"probe --latents {latents} --out {tmp_path}/p --recipe embedded-offset", capsys
    )
    assert "probe with that one's recipe" in fails(
        f"probe --latents {latents} --out {tmp_path}/p --recipe imagenet-b-weak", capsys
    )
    message = fails(f"train --latents {latents} --out {tmp_path}/r --schedule synchronous --resume", capsys)
    assert "no checkpoint in" in message
    message = fails(f"train --latents {latents} --out {tmp_path}/s --schedule synchronous --accumulate 5", capsys)
    assert "a batch of 64 cannot be shared evenly by 1 processes in 5 parts" in message


def test_out_of_memory_says_what_to_change(latents, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("lwd.training.train", full)
    message = fails(f"train --latents {latents} --out {tmp_path} --schedule synchronous", capsys)
    assert "--accumulate with twice the number halves" in message
    assert "--parallel fsdp" in message


def test_another_recipe_in_the_same_directory_is_refused(latents, tmp_path, capsys):
    common = f"train --latents {latents} --out {tmp_path}/run --budget 0.003 --no-tensorboard"
    cli.main(f"{common} --schedule synchronous".split())
    message = fails(f"{common} --schedule offset --recipe embedded-offset --seed 1", capsys)
    assert "train.jacobian: 'detached' in the checkpoint, 'none' now" in message
    assert "train.seed: 0 in the checkpoint, 1 now" in message
    assert "schedule.kind: 'synchronous' in the checkpoint, 'offset' now" in message


def test_heldout_latents_are_measured(latents, tmp_path):
    cli.main(
        f"train --latents {latents} --out {tmp_path}/run --heldout {latents} --schedule synchronous --budget 0.003 "
        "--validate-every 64 --sample-every 0 --no-tensorboard".split()
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation"] > 0
    assert not (tmp_path / "run" / "samples").exists()


def test_a_sweep_can_be_bisected(latents, tmp_path, capsys):
    cli.main(
        f"probe --latents {latents} --out {tmp_path} --kinetic 0.01 0.3 --bisect --budget 0.02 --no-tensorboard".split()
    )
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    # So short a probe stays at the identity: the lower end is stable, and there is nothing to narrow down.
    assert [run["kinetic"] for run in sweep["runs"]] == [0.01, 0.3]
    assert sweep["picked"] == 0.01
    assert (tmp_path / "sweep.png").exists()
    assert "lambda 0.01     delay" in capsys.readouterr().out


def test_processes_share_a_run_or_split_a_sweep(latents, tmp_path):
    def torchrun(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lwd"]
        done = subprocess.run(
            [*command, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    options = ["--latents", str(latents), "--budget", "0.02", "--no-tensorboard", "--device", "cpu"]
    torchrun("probe", *options, "--out", str(tmp_path / "split"), "--kinetic", "0.1", "0.3", "--split")
    cli.main(["probe", *options, "--out", str(tmp_path / "one"), "--kinetic", "0.1", "0.3"])
    for name in ("lambda-0.1", "lambda-0.3"):
        one, split = (load_schedule(tmp_path / way / name / "schedule.json") for way in ("one", "split"))
        torch.testing.assert_close(one.rho, split.rho, rtol=1e-4, atol=1e-4)
    schedule = str(tmp_path / "split" / "schedule.json")
    printed = torchrun("train", *options[:2], "--budget", "0.003", *options[4:], "--out", str(tmp_path / "run"),
                       "--schedule", schedule, "--parallel", "fsdp", "--recompute", "2")  # fmt: skip
    assert "on 2 x cpu" in printed
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*/*.distcp"))) == 2
