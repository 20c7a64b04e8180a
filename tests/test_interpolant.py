"""The asynchronous path, by hand."""

import pytest
import torch

import lwd
from lwd import Group, LatentSpec

SPEC = LatentSpec([Group("texture", 2), Group("semantic", 1)])


def test_every_group_is_at_its_own_time():
    x0 = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])[:, :, None, None]
    x1 = torch.tensor([[5.0, 6.0, 11.0], [4.0, 8.0, 2.0]])[:, :, None, None]
    t = torch.tensor([[0.25, 0.5], [0.5, 1.0]])
    z = lwd.interpolate(x0, x1, t, SPEC)
    assert z[:, :, 0, 0].tolist() == [[2.0, 3.0, 7.0], [2.0, 4.0, 2.0]]
    assert lwd.target_velocity(x0, x1)[0, :, 0, 0].tolist() == [4.0, 4.0, 8.0]
    flow = lwd.global_velocity(x1, torch.tensor([[2.0, 0.0], [0.5, 1.0]]), SPEC)
    assert flow[:, :, 0, 0].tolist() == [[10.0, 12.0, 0.0], [2.0, 4.0, 2.0]]


def test_ends_are_exactly_noise_and_data():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    assert torch.equal(lwd.interpolate(x0, x1, torch.zeros(2, 2), SPEC), x0)
    assert torch.equal(lwd.interpolate(x0, x1, torch.ones(2, 2), SPEC), x1)


def test_velocity_is_the_derivative_of_the_path():
    """Eq. 11: d/dtau z(tau) = t' u, by autograd through the schedule."""
    schedule = lwd.PolynomialSchedule(rho=[0.1, -2.0, -2.0, -2.0, 2.0])
    x0, x1 = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), torch.tensor([-1.0, 0.5, 7.0]).view(1, 3, 1, 1)

    def path(tau):
        return lwd.interpolate(x0, x1, schedule(tau).t, SPEC)

    tau = torch.tensor([0.6])
    slope = torch.autograd.functional.jacobian(path, tau)[..., 0]
    expected = lwd.global_velocity(lwd.target_velocity(x0, x1), schedule(tau).dt, SPEC)
    torch.testing.assert_close(slope, expected)


def test_shapes_that_do_not_match():
    x, t = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="2 texture \\+ 1 semantic channels"):
        lwd.interpolate(x[:, :2], x[:, :2], t, SPEC)
    with pytest.raises(ValueError, match=r"noise x0 has shape \(1, 3, 4, 4\), data x1 \(2, 3, 4, 4\)"):
        lwd.interpolate(x[:1], x, t, SPEC)
    for bad in (t[:, :1], t[:1], t[:, 0]):
        with pytest.raises(ValueError, match=r"local times have shape .*, expected \[2, 2\]"):
            lwd.interpolate(x, x, bad, SPEC)
