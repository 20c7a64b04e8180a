"""What several test files share: reference tensors, one thread, repeatable hypothesis, GPU tests only with a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor

from lwd.backbones import LightningDiT

torch.set_num_threads(1)  # the tensors here are tiny, and results must not depend on the machine
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@dataclass(frozen=True)
class Reference:
    """One file of tests/fixtures: values that public reference code computed."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The entries whose name starts with `prefix` and a dot, named without it."""
        start = prefix + "."
        return {name.removeprefix(start): x for name, x in self.tensors.items() if name.startswith(start)}

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.metadata["config"])


@lru_cache
def load_reference(name: str) -> Reference:
    path = Path(__file__).parent / "fixtures" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        return Reference({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """`reference("sfd_semantic_first")` gives that file's tensors and metadata."""
    return load_reference


@pytest.fixture(scope="session")
def semantic_first(reference: Callable[[str], Reference]) -> tuple[LightningDiT, Reference]:
    """SFD's two-clock network with the reference's weights, and what the reference computed with it."""
    values = reference("sfd_semantic_first")
    return LightningDiT.from_sfd(values.under("state")).requires_grad_(False), values


@pytest.fixture(scope="session")
def one_clock(reference: Callable[[str], Reference]) -> tuple[LightningDiT, Reference]:
    """The same for the synchronous LightningDiT."""
    values = reference("lightningdit_synchronous")
    return LightningDiT.from_sfd(values.under("state")).requires_grad_(False), values
