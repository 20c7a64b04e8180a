"""Which GPU a process takes."""

import pytest
import torch

from lwd import machine


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as torch says; returns the list of those made current."""
    current = []
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    return current


@pytest.mark.parametrize(
    ("environment", "name", "device"),
    [
        ({}, "auto", "cuda"),
        ({}, "cuda:1", "cuda:1"),
        ({}, "cpu", "cpu"),
        ({"LOCAL_RANK": "1"}, "auto", "cuda:1"),
        ({"LOCAL_RANK": "1"}, "cpu", "cpu"),
        ({"SLURM_LOCALID": "1"}, "auto", "cuda:1"),
        ({"SLURM_LOCALID": "5"}, "auto", "cuda:1"),  # each task sees GPUs of its own
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "1"}, "auto", "cuda:0"),
    ],
)
def test_every_process_takes_its_own_gpu(gpus, monkeypatch, environment, name, device):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    found = machine.own_device(name)
    assert found == torch.device(device)
    assert gpus == ([found] if found.index is not None else [])
