"""Small networks with weights that are not zero anywhere, and how they are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd import Group, LightningDiT, LightningDiTConfig

TWO = (Group("texture", 4), Group("semantic", 2, 2.0))
SMALL = LightningDiTConfig(TWO, input_size=4, num_classes=3, hidden_size=16, depth=2, num_heads=2)


def random_model(config: LightningDiTConfig, seed: int = 0) -> LightningDiT:
    """Weights drawn so that nothing, modulations included, is zero."""
    generator = torch.Generator().manual_seed(seed)
    model = LightningDiT(config)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model


def inputs(config: LightningDiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, config.spec.channels, config.input_size, config.input_size, generator=generator)
    t = torch.rand(batch, len(config.groups), generator=generator)
    return z, t, torch.arange(batch) % (config.num_classes + 1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.2g}"


def reference_arguments(model: LightningDiT, values) -> tuple[Tensor, Tensor, Tensor]:
    """x1, local times and labels of a fixture; one clock reads t_sem."""
    times = [values["t_tex"], values["t_sem"]][-len(model.spec) :]
    return values["x1"], torch.stack(times, dim=1), values["y"]
