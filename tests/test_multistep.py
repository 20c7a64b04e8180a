"""Multistep solvers: coefficients, the cases they are exact in, orders, and what they do at the ends of a clock."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import lwd
from gaussian import THREE_GROUPS, TWO_GROUPS, normal, polynomial, unequal_spec
from lwd import Schedule
from lwd.placement import place_steps
from lwd.sampling import _GlobalFlow
from lwd.solvers import AdamsBashforth, ExponentialMultistep
from test_solvers import DATA, LABELS, NOISE, curved, every_schedule, solve, tight

MULTISTEP = ["ab2", "ab3", "dpmpp2m", "dpmpp3m"]
UNEVEN = [0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 0.9, 1.0]


def on_piece(schedule: Schedule, start: float = 0.0, end: float = 1.0) -> _GlobalFlow:
    return _GlobalFlow(curved, schedule, DATA.spec, LABELS, None).on(start, end)


# Coefficients


def interpolated(nodes: np.ndarray, j: int) -> np.poly1d:
    """L_j by another route than the product formula: its coefficients from a Vandermonde system."""
    return np.poly1d(np.linalg.solve(np.vander(nodes), np.eye(len(nodes))[j]))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_exponential_coefficients_by_quadrature(order):
    """On each group's own clock; a value at t = 0 (lambda = -inf) is not looked back to, the last step is Euler's."""
    schedule = polynomial([0.1, -2.0, -2.0, -2.0, 2.0])
    found = ExponentialMultistep(order).coefficients(on_piece(schedule), UNEVEN)
    t = schedule(torch.tensor(UNEVEN, dtype=torch.float64)).t.detach().numpy()
    for g in range(2):
        clock = np.log(t[1:-1, g] / (1 - t[1:-1, g]))  # at UNEVEN[1:-1]
        for k in range(1, len(UNEVEN) - 2):
            s, end = t[k, g], t[k + 1, g]
            assert found.A[k, g] == pytest.approx((1 - end) / (1 - s), rel=1e-13)
            nodes = clock[max(0, k - order) : k][::-1]
            for j in range(len(nodes)):
                basis = interpolated(nodes, j)

                def integrand(x: float, basis=basis, end=end) -> float:
                    return (1 - end) * np.exp(x) * float(basis(x))

                expected, _ = quad(integrand, clock[k - 1], clock[k], epsabs=1e-13, epsrel=1e-12)
                assert found.B[k, j, g] == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert not found.B[k, len(nodes) :, g].any()
        for k in (0, len(UNEVEN) - 2):
            assert found.A[k, g] + found.B[k, 0, g] == pytest.approx(1, abs=1e-14)
            assert found.B[k, 0, g] == pytest.approx((t[k + 1, g] - t[k, g]) / (1 - t[k, g]), abs=1e-14)
            assert not found.B[k, 1:, g].any()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_adams_bashforth_coefficients_by_quadrature(order):
    """The clock is integrated exactly: with t' in the integrand."""
    schedule = polynomial([0.1, -2.0, -2.0, -2.0, 2.0]).frozen()
    found = AdamsBashforth(order).coefficients(on_piece(schedule), UNEVEN)
    assert (found.A == 1).all()
    for k in range(len(UNEVEN) - 1):
        nodes = np.array(UNEVEN[max(0, k + 1 - order) : k + 1][::-1])
        for j in range(len(nodes)):
            basis = interpolated(nodes, j)
            for g in range(2):

                def integrand(x: float, basis=basis, g=g) -> float:
                    return float(schedule(torch.tensor([x], dtype=torch.float64)).dt[0, g]) * float(basis(x))

                expected, _ = quad(integrand, UNEVEN[k], UNEVEN[k + 1], epsabs=1e-13, epsrel=1e-12)
                assert found.B[k, j, g] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_steps_give_the_textbook_coefficients():
    times = np.linspace(0, 1, 11)
    two = AdamsBashforth(2).coefficients(on_piece(TWO_GROUPS["synchronous"]), times).B[5, :, 0]
    three = AdamsBashforth(3).coefficients(on_piece(TWO_GROUPS["synchronous"]), times).B[5, :, 0]
    assert 10 * two[:2] == pytest.approx(np.array([3, -1]) / 2)
    assert 10 * three[:3] == pytest.approx(np.array([23, -16, 5]) / 12)


def test_a_value_too_near_another_is_not_extrapolated_from():
    """A stop a millionth beside a step would else be divided by; the value before it takes its place."""
    plain, beside = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.2, 0.4, 0.600001, 0.6, 0.8, 1.0]
    for method in (AdamsBashforth(3), ExponentialMultistep(3)):
        flow = on_piece(TWO_GROUPS["synchronous"])
        expected = method.coefficients(flow, plain).B
        found = method.coefficients(flow, sorted(beside)).B
        assert np.abs(found).max() < 3 * np.abs(expected).max()
        np.testing.assert_allclose(found[4, [0, 2, 3]], expected[3, [0, 1, 2]], atol=1e-4)
        assert not found[4, 1].any()
    schedule = TWO_GROUPS["polynomial"]
    for solver in MULTISTEP:
        steps = place_steps(schedule, 40, spacing="cosine")
        plain_end = solve(schedule, solver=solver, steps=steps)
        recorded = solve(schedule, solver=solver, steps=steps, record=[steps[17] + 1e-7])
        torch.testing.assert_close(recorded, plain_end, rtol=1e-4, atol=1e-4)


def test_history_starts_anew_at_a_kink():
    """Each piece by itself gives the same coefficients as the whole run, which is made of pieces."""
    schedule = TWO_GROUPS["offset"]
    a, b = schedule.kinks
    steps = [0.0, 0.1, a, 0.4, 0.6, b, 0.9, 1.0]
    for solver in MULTISTEP:
        z = NOISE
        for times in (steps[:3], steps[2:6], steps[5:]):
            z, _ = lwd.solvers.SOLVERS[solver].integrate(on_piece(schedule, times[0], times[-1]), z, times)
        assert torch.equal(z, solve(schedule, solver=solver, steps=steps))


# Exact cases


def straight(target: Tensor, of_data: bool):
    """A denoiser with constant velocity `target`, or with `target` as its constant prediction of the data."""

    def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if not of_data:
            return target
        remaining = DATA.spec.expand(1 - t)
        return torch.where(remaining > 0, (target - z) / remaining.clamp(min=1e-12), 0.0)

    return denoiser


@every_schedule
@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_constant_prediction_is_followed_exactly(schedule, solver):
    """In as few steps as there are pieces, and at every time on the way."""
    target, of_data = normal(*NOISE.shape, seed=9), solver.startswith("dpm")
    record = [0.0, 0.05, 0.4, 0.41, 0.83, 0.99, 1.0]
    options = {"solver": solver, "spec": DATA.spec}
    few = lwd.sample(
        straight(target, of_data), schedule, NOISE, LABELS, steps=len(schedule.kinks) + 1, **options
    ).latents
    torch.testing.assert_close(few, target if of_data else NOISE + target, rtol=1e-12, atol=1e-12)
    result = lwd.sample(straight(target, of_data), schedule, NOISE, LABELS, steps=20, record=record, **options)
    for tau, state in zip(record, result.states, strict=True):
        t = DATA.spec.expand(schedule(torch.tensor([tau], dtype=torch.float64)).t).detach()
        expected = (1 - t) * NOISE + t * target if of_data else NOISE + t * target
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)


@every_schedule
def test_first_order_is_euler_in_local_time(schedule):
    """z_g + (t_g(next) - t_g) v_g, which is DDIM: for both families, in closed form."""
    times = [0.0, *schedule.kinks, 1.0]
    times = sorted({*times, 0.15, 0.35, 0.55, 0.9})
    t = schedule(torch.tensor(times, dtype=torch.float64)).t.detach()
    expected = NOISE
    for now, following in pairwise(t):
        v = curved(expected, now.expand(3, -1), LABELS)
        expected = expected + DATA.spec.expand((following - now)[None]) * v
    for method in (AdamsBashforth(1), ExponentialMultistep(1)):
        z = NOISE
        stops = [0.0, *schedule.kinks, 1.0]
        for start, end in pairwise(stops):
            piece = [tau for tau in times if start <= tau <= end]
            z, evaluations = method.integrate(on_piece(schedule, start, end), z, piece)
            assert evaluations == len(piece) - 1
        torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", THREE_GROUPS.values(), ids=THREE_GROUPS.keys())
@pytest.mark.parametrize("solver", MULTISTEP)
def test_any_number_of_groups(schedule, solver):
    spec = unequal_spec(3)
    noise = normal(2, spec.channels, 1, 1)

    def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.cos(z.flip(1)) * (1 + spec.expand(t))

    options = {"spec": spec}
    exact = lwd.sample(denoiser, schedule, noise, LABELS[:2], atol=1e-9, rtol=1e-9, **options).latents
    steps = place_steps(schedule, 100, spacing="cosine")
    found = lwd.sample(denoiser, schedule, noise, LABELS[:2], solver=solver, steps=steps, **options).latents
    assert (found - exact).abs().max() < 0.01


# Orders


def slope(schedule: Schedule, solver: str, exact: Tensor, spacing: str) -> float:
    """Observed order between 60 and 120 steps."""
    errors = [
        (solve(schedule, solver=solver, steps=place_steps(schedule, n, spacing=spacing)) - exact).norm().item()
        for n in (60, 120)
    ]
    return float(np.log2(errors[0] / errors[1]))


@every_schedule
def test_full_order_with_cosine_spacing(schedule):
    """From t = 0 to t = 1, kinks included: the short steps at both ends of a piece make up for their low order."""
    exact = tight(schedule)
    for solver in MULTISTEP:
        order = 3 if "3" in solver else 2
        assert order - 0.15 < slope(schedule, solver, exact, "cosine") < order + 0.4


@pytest.mark.parametrize("name", ["polynomial", "offset"])
def test_second_order_with_equal_steps(name):
    """The ends limit what is reached: a first step of first order costs h^2, whatever follows. With 2M, where nothing
    is exact near lambda = -inf, a little less."""
    schedule = TWO_GROUPS[name]
    exact = tight(schedule)
    for solver in MULTISTEP:
        low, high = (1.4, 1.9) if solver == "dpmpp2m" else (1.75, 2.2)
        assert low < slope(schedule, solver, exact, "uniform") < high


@every_schedule
@pytest.mark.parametrize(("method", "order"), [(ExponentialMultistep(2), 2), (ExponentialMultistep(3), 3)])
def test_order_of_the_exponential_solver_away_from_the_ends(schedule, method, order):
    """The middle eight tenths of the longest smooth piece, where lambda is finite."""
    stops = [0.0, *schedule.kinks, 1.0]
    start, end = max(pairwise(stops), key=lambda piece: piece[1] - piece[0])
    flow = on_piece(schedule, start, end)
    first, last = start + 0.1 * (end - start), start + 0.9 * (end - start)
    with torch.no_grad():
        exact, _, _ = lwd.solvers.Dopri5().integrate(flow, NOISE, first, last, 1e-11, 1e-11, None)
        errors = []
        for n in (60, 120):
            part = (1 - np.cos(np.pi * np.arange(n + 1) / n)) / 2
            z, _ = method.integrate(flow, NOISE, (first + (last - first) * part).tolist())
            errors.append((z - exact).norm().item())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


# Batches


@pytest.mark.parametrize("solver", MULTISTEP)
def test_an_image_does_not_depend_on_its_batch(solver):
    together = lwd.sample(curved, TWO_GROUPS["offset"], NOISE, LABELS, solver=solver, steps=12, spec=DATA.spec)
    for row in range(3):
        alone = lwd.sample(
            curved, TWO_GROUPS["offset"], NOISE[row : row + 1], LABELS[row : row + 1],
            solver=solver, steps=12, spec=DATA.spec,
        )  # fmt: skip
        torch.testing.assert_close(alone.latents[0], together.latents[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_schedule_that_still_learns_gives_no_graph(solver):
    schedule = lwd.PolynomialSchedule()
    noise, spec = NOISE.float(), DATA.spec
    result = lwd.sample(lambda z, t, labels: -z, schedule, noise, LABELS, solver=solver, steps=5, spec=spec)
    assert not result.latents.requires_grad
    assert result.latents.dtype == torch.float32
