"""The same training on one, two and four processes; killed, preempted, resumed on another number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed_worker import TRAIN, Blocked, OffsetSchedule, all_ways, interrupted, make_data
from lwd.batches import Batches
from lwd.checkpoints import Checkpoints
from lwd.training import train

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(processes: int, *arguments: object, restarts: int = 0) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}", str(WORKER), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one, two and four processes made of the same trainings."""
    directory = tmp_path_factory.mktemp("ways")
    all_ways(directory / "1")
    for processes in (2, 4):
        torchrun(processes, "all", directory / str(processes))
    return directory


def assert_same(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    a, b = torch.load(one / "result.pt"), torch.load(other / "result.pt")
    torch.testing.assert_close(a["losses"], b["losses"], rtol=tolerance, atol=0)
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        torch.testing.assert_close(value, b["weights"][name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "accumulated", "probe"])
def test_the_number_of_processes_changes_nothing(results, processes, way):
    assert_same(results / "1" / way, results / str(processes) / way)


def test_accumulation_and_fsdp_are_the_same_training(results):
    assert_same(results / "1" / "ddp", results / "1" / "accumulated")
    assert_same(results / "1" / "ddp", results / "2" / "fsdp")


@pytest.mark.parametrize(("before", "after"), [("2/ddp", "one"), ("4/fsdp", "one"), ("2/fsdp", "three")])
def test_a_run_goes_on_with_another_number_of_processes(results, tmp_path, before, after):
    """Its newest checkpoints removed, a run is resumed from the middle by one process, or by four."""
    import shutil

    shutil.copytree(results / before, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    shutil.rmtree(checkpoints.path(50))
    assert checkpoints.steps() == [45]
    if after == "one":
        train(Blocked(), OffsetSchedule(0.3), make_data(), TRAIN, directory=tmp_path / "run")
    else:
        torchrun(4, "resume", tmp_path / "run")
    state = Checkpoints(tmp_path / "run")
    assert state.meta(50)["images"] == 400
    losses = [row["loss"] for row in read_log(tmp_path / "run")]
    torch.testing.assert_close(losses, torch.load(results / "1/ddp/result.pt")["losses"], rtol=2e-5, atol=0)


def read_log(directory):
    import json

    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_process_is_restarted_and_the_run_equals_the_uninterrupted_one(results, tmp_path):
    torchrun(2, "kill", tmp_path / "run", restarts=1)
    assert (tmp_path / "run" / "interrupted").read_text() == "0"
    assert_same(results / "2" / "ddp", tmp_path / "run", tolerance=0)


def test_a_preempted_run_saves_the_step_it_is_at_and_goes_on(results, tmp_path):
    # The last of two processes gets SIGTERM in step 23; both agree on it after step 30.
    torchrun(2, "term", tmp_path / "run")
    assert [(tmp_path / "run" / f"preempted-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert Checkpoints(tmp_path / "run").steps()[-1] == 30
    torchrun(2, "term", tmp_path / "run")
    assert_same(results / "2" / "ddp", tmp_path / "run", tolerance=0)


def test_a_preempted_single_process_stops_between_two_log_lines_without_a_trace(tmp_path):
    directory = tmp_path / "run"
    interrupted(directory, "term")
    assert (directory / "preempted-0").exists()
    assert Checkpoints(directory).steps()[-1] == 23
    interrupted(directory, "term")
    whole = train(Blocked(), OffsetSchedule(0.3), make_data(), TRAIN, directory=tmp_path / "whole")
    resumed = torch.load(directory / "result.pt")
    for name, value in whole.denoiser.state_dict().items():
        assert torch.equal(value, resumed["weights"][name]), name
    assert [row["loss"] for row in whole.history] == resumed["losses"]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr("lwd.distributed.world", lambda: 3)
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared evenly by 3 processes in 1 parts each"):
        Batches(make_data(), TRAIN, Blocked(), torch.device("cpu"))
