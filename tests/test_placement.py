"""Placement: the energy density in closed form, equal arc lengths, kinks, spacing, errors."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import lwd
from gaussian import PAIR_SPEC, TWO_GROUPS, Pairs, normal
from lwd.placement import KineticDensity, kinetic_density, place_steps
from test_solvers import DATA, LABELS, NOISE, every_schedule

PAIRS = Pairs.power_law(4)


def constant(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.ones_like(z)


@every_schedule
def test_density_of_gaussian_data(schedule):
    """The flow is linear, so a scaled basis for noise has the population's second moments, without sampling error."""
    n = 2 * len(PAIRS.vt)
    noise = np.sqrt(n) * torch.eye(n, dtype=torch.float64).view(n, 2, 1, -1)
    density = kinetic_density(PAIRS.gaussian(), schedule, noise, torch.zeros(n, dtype=torch.long), points=80)
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(density.tau)], dtype=torch.float64)
    t, dt = (x.detach().numpy() for x in schedule(middles))
    energy = PAIRS.energy(t[:, 0], t[:, 1])
    expected = dt[:, 0] ** 2 * energy["tex"] + dt[:, 1] ** 2 * energy["sem"]
    np.testing.assert_allclose(density.density, expected, rtol=2e-3)


def test_arc_length_of_straight_lines():
    """Both groups at unit velocity along SFD's path: one moves, then both, then the other, at 1.3 of local time."""
    schedule = TWO_GROUPS["offset"]
    density = kinetic_density(constant, schedule, NOISE[:, :2], LABELS, points=9, spec=PAIR_SPEC)
    assert len(density.density) == 9
    length = dict(zip(density.tau, density.arc_length(), strict=True))
    a, b = schedule.kinks
    assert length[a] == pytest.approx(0.3)
    assert length[b] - length[a] == pytest.approx(0.7 * np.sqrt(2))
    assert length[1.0] - length[b] == pytest.approx(0.3)
    placed = place_steps(schedule, 8, density)
    # 8 steps over lengths of 0.3, 0.99, 0.3: 2, 4 and 2; equal within a piece, as speed is constant there.
    assert placed == pytest.approx([0, a / 2, *np.linspace(a, b, 5), (1 + b) / 2, 1])


def test_steps_of_equal_arc_length():
    """At unit velocity the arc length is that of the curve (t_tex, t_sem) itself."""
    schedule = TWO_GROUPS["polynomial"].frozen()
    density = kinetic_density(constant, schedule, NOISE[:, :2], LABELS, points=200, spec=PAIR_SPEC)

    def speed(tau: float) -> float:
        return float(schedule(torch.tensor([tau], dtype=torch.float64)).dt.norm())

    assert density.arc_length()[-1] == pytest.approx(quad(speed, 0, 1)[0], rel=1e-4)
    placed = place_steps(schedule, 10, density)
    lengths = [quad(speed, a, b)[0] for a, b in pairwise(placed)]
    assert lengths == pytest.approx([quad(speed, 0, 1)[0] / 10] * 10, rel=2e-3)
    assert placed[1] > 0.1 > 1 - placed[-2]  # the texture is fast at the end


@every_schedule
@pytest.mark.parametrize("steps", [3, 7, 20])
def test_placed_steps_are_taken(schedule, steps):
    density = kinetic_density(DATA, schedule, NOISE, LABELS, points=12)
    for measured in (None, density):
        for spacing in ("uniform", "cosine"):
            times = place_steps(schedule, steps, measured, spacing=spacing)
            assert len(times) == steps + 1
            assert set(schedule.kinks) < {*times, 2.0}
            assert lwd.sample(DATA, schedule, NOISE, LABELS, solver="ab2", steps=times).evaluations == steps


@every_schedule
def test_without_a_density_steps_are_those_of_a_count(schedule):
    counted = lwd.sample(DATA, schedule, NOISE, LABELS, solver="euler", steps=13).latents
    placed = lwd.sample(DATA, schedule, NOISE, LABELS, solver="euler", steps=place_steps(schedule, 13)).latents
    torch.testing.assert_close(placed, counted, rtol=1e-12, atol=1e-12)


def test_cosine_spacing():
    assert place_steps(TWO_GROUPS["synchronous"], 4, spacing="cosine") == pytest.approx(
        [0, 0.5 - np.sqrt(0.125), 0.5, 0.5 + np.sqrt(0.125), 1]
    )
    assert place_steps(TWO_GROUPS["cascaded"], 5, spacing="cosine") == pytest.approx([0, 0.125, 0.375, 0.5, 0.75, 1])


def test_a_flow_that_stands_still_gets_equal_steps():
    schedule = TWO_GROUPS["cascaded"]
    still = kinetic_density(lambda z, t, labels: 0 * z, schedule, NOISE, LABELS, points=4, spec=DATA.spec)
    assert still.arc_length()[-1] == 0
    assert place_steps(schedule, 6, still) == place_steps(schedule, 6)
    half = KineticDensity((0.0, 0.25, 0.5, 1.0), (0.0, 0.0, 1.0))
    assert place_steps(schedule, 3, half) == pytest.approx([0, 0.5, 0.75, 1])


def test_density_of_a_denoiser_that_asks_for_global_time():
    class Varying:
        needs_tau, spec = True, DATA.spec

        def __call__(self, z: Tensor, t: Tensor, labels: Tensor, *, tau: Tensor) -> Tensor:
            return tau[:, None, None, None].expand_as(z)

    density = kinetic_density(Varying(), TWO_GROUPS["synchronous"], NOISE, LABELS, points=4)
    assert density.density == pytest.approx([2 * x**2 for x in (0.125, 0.375, 0.625, 0.875)])


def test_the_pilot_is_deterministic():
    runs = [kinetic_density(DATA, TWO_GROUPS["polynomial"], normal(3, 3, 1, 2), LABELS) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0].density) == 32


def test_errors():
    schedule = TWO_GROUPS["offset"]
    with pytest.raises(ValueError, match="2 steps for a path of 3 pieces"):
        place_steps(schedule, 2)
    with pytest.raises(ValueError, match="not measured on this schedule: of its kinks"):
        place_steps(schedule, 5, KineticDensity((0.0, 0.5, 1.0), (1.0, 2.0)))
    with pytest.raises(ValueError, match="spacing is 'log'"):
        place_steps(schedule, 5, spacing="log")
    with pytest.raises(ValueError, match="2 densities need 3 increasing edges"):
        KineticDensity((0.0, 1.0), (1.0, 2.0))
    with pytest.raises(ValueError, match="finite and not negative"):
        KineticDensity((0.0, 1.0), (float("nan"),))
