"""Solvers: order of convergence, tolerance, independence of images, and how many evaluations they take."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import lwd
from gaussian import TWO_GROUPS, Gaussian, normal, random_gaussian, unequal_spec
from lwd import Schedule
from lwd.solvers import SOLVERS, Dopri5, RungeKutta, dormand_prince

every_schedule = pytest.mark.parametrize("schedule", TWO_GROUPS.values(), ids=TWO_GROUPS.keys())
DATA = random_gaussian(unequal_spec(2), positions=2, seed=3)
NOISE = normal(3, 3, 1, 2, seed=4)
LABELS = torch.arange(3)


def curved(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A smooth denoiser that is not linear, so that no order is reached by luck."""
    return DATA(z, t) + 0.3 * torch.sin(z.flip(1)) * torch.cos(2 * t.sum(dim=1))[:, None, None, None]


def solve(schedule: Schedule, **options) -> Tensor:
    return lwd.sample(curved, schedule, NOISE, LABELS, spec=DATA.spec, **options).latents


def tight(schedule: Schedule) -> Tensor:
    return solve(schedule, atol=1e-12, rtol=1e-12)


@every_schedule
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_convergence(schedule, solver, order):
    """Kinks included: were they stepped over, midpoint and Heun would fall to first order on half of these."""
    exact, steps = tight(schedule), [40, 80, 160]
    errors = [(solve(schedule, solver=solver, steps=n) - exact).norm().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


def test_order_is_lost_where_a_kink_is_stepped_over():
    """Why pieces are integrated one by one: with the kinks hidden, Heun on SFD's path is no longer second order."""
    hidden = lwd.OffsetSchedule(0.3)
    exact = tight(hidden)
    hidden.kinks = ()
    steps = [50, 101, 203, 407]
    errors = [(solve(hidden, solver="heun", steps=n) - exact).norm().item() for n in steps]
    with_kinks = (solve(lwd.OffsetSchedule(0.3), solver="heun", steps=50) - exact).norm().item()
    assert errors[0] > 5 * with_kinks
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] < 1.5


def test_coefficients_of_dormand_prince():
    """The propagated solution is of fifth order, the embedded one of fourth."""
    fifth = RungeKutta(Dopri5.c[:-1], Dopri5.a[:-1], Dopri5.a[-1])
    fourth = RungeKutta(Dopri5.c, Dopri5.a, tuple(b - e for b, e in zip((*Dopri5.a[-1], 0.0), Dopri5.e, strict=True)))

    def velocity(tau: Tensor, z: Tensor, rows: Tensor | None) -> Tensor:
        return torch.cos(3 * tau)[:, None, None, None] * z * (1 - 0.2 * z)

    def logistic(z0: Tensor) -> Tensor:
        grown = z0 * math.exp(math.sin(3.0) / 3)
        return grown / (1 + 0.2 * (grown - z0))

    z = normal(4, 1, 1, 1).abs() + 0.5
    for method, order in ((fifth, 5), (fourth, 4)):
        ends = [method.integrate(velocity, z, np.linspace(0, 1, n + 1).tolist())[0] for n in (32, 64, 128)]
        errors = [(end - logistic(z)).abs().max().item() for end in ends]
        slopes = np.diff(np.log2(errors))
        assert slopes == pytest.approx([-order, -order], abs=0.35)
    for row, c in zip(Dopri5.a, Dopri5.c, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-15)
    assert sum(Dopri5.e) == pytest.approx(0, abs=1e-15)


@every_schedule
def test_dopri5_honours_its_tolerance(schedule):
    exact = tight(schedule)
    errors = []
    for rtol in (1e-3, 1e-5, 1e-7, 1e-9):
        difference = solve(schedule, atol=1e-3 * rtol, rtol=rtol) - exact
        errors.append((difference.norm() / exact.norm()).item())
        assert errors[-1] < 5 * rtol
    assert all(b < a / 10 for a, b in pairwise(errors))


@every_schedule
def test_dopri5_agrees_with_scipy(schedule):
    """An independent integrator, per image, piece by piece."""
    stops = [0.0, *schedule.kinks, 1.0]

    def velocity(tau: float, z: np.ndarray, inside: tuple[float, float], row: int) -> np.ndarray:
        state = torch.from_numpy(z).view(1, 3, 1, 2)
        t = schedule(torch.tensor([tau], dtype=torch.float64)).t
        dt = schedule(torch.tensor([min(max(tau, inside[0]), inside[1])], dtype=torch.float64)).dt
        with torch.no_grad():
            return lwd.global_velocity(curved(state, t, LABELS), dt, DATA.spec).flatten().numpy()

    result = solve(schedule, atol=1e-10, rtol=1e-10)
    for row in range(2):
        z = NOISE[row].flatten().numpy()
        for start, end in pairwise(stops):
            inside = (start, end - 1e-9)
            z = solve_ivp(velocity, (start, end), z, "DOP853", args=(inside, row), atol=1e-9, rtol=1e-9).y[:, -1]
        np.testing.assert_allclose(result[row].flatten().numpy(), z, rtol=1e-6, atol=1e-7)


def test_dopri5_agrees_with_torchdiffeq():
    """Where nothing is stepped over, at tolerances that leave no room; theirs takes one step size for the batch."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    schedule = TWO_GROUPS["polynomial"].frozen()

    def velocity(tau: Tensor, z: Tensor) -> Tensor:
        t, dt = schedule.local_times(tau.clamp(0, 1).repeat(len(z)))
        return lwd.global_velocity(curved(z, t, LABELS), dt, DATA.spec)

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    theirs = odeint(velocity, NOISE, ends, method="dopri5", atol=1e-10, rtol=1e-10)[-1]
    torch.testing.assert_close(tight(schedule), theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["polynomial", "offset"])
def test_an_image_does_not_depend_on_its_batch(name):
    """Equal to rounding, and with the very same steps, whatever it is batched with."""
    schedule = TWO_GROUPS[name]
    noise = NOISE * torch.tensor([1.0, 8.0, 0.1], dtype=torch.float64)[:, None, None, None]
    together = lwd.sample(curved, schedule, noise, LABELS, spec=DATA.spec)
    assert together.evaluations_per_image.unique().numel() > 1
    assert together.evaluations == together.evaluations_per_image.max()
    for row in range(3):
        alone = lwd.sample(curved, schedule, noise[row : row + 1], LABELS[row : row + 1], spec=DATA.spec)
        torch.testing.assert_close(alone.latents[0], together.latents[row], rtol=1e-12, atol=1e-12)
        assert alone.evaluations == together.evaluations_per_image[row]


class Counter:
    """A denoiser that counts its evaluations of every image, by label."""

    def __init__(self) -> None:
        self.seen, self.calls = torch.zeros(3, dtype=torch.long), 0

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        self.seen += torch.bincount(labels, minlength=3)
        assert len(z) == len(t) == len(labels)
        return curved(z, t, labels)


@every_schedule
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "dopri5"])
def test_fixed_steps_take_stages_times_steps_evaluations(schedule, solver):
    counter = Counter()
    result = lwd.sample(counter, schedule, NOISE, LABELS, solver=solver, steps=17, spec=DATA.spec)
    assert result.evaluations == 17 * (2 if solver in ("midpoint", "heun") else 1) == counter.calls
    assert torch.equal(result.evaluations_per_image, counter.seen)


@every_schedule
def test_dopri5_counts_what_it_evaluates(schedule):
    """Two to start each smooth piece, then six a step, accepted or rejected."""
    counter = Counter()
    result = lwd.sample(counter, schedule, NOISE, LABELS, spec=DATA.spec)
    assert torch.equal(result.evaluations_per_image, counter.seen)
    pieces = len(schedule.kinks) + 1
    assert ((result.evaluations_per_image - 2 * pieces) % 6 == 0).all()
    assert 2 * pieces + 6 * pieces <= result.evaluations < 200
    recorded = lwd.sample(Counter(), schedule, NOISE, LABELS, spec=DATA.spec, record=[0.123])
    assert ((recorded.evaluations_per_image - 2 * pieces - 1) % 6 == 0).all()


def test_a_stop_does_not_shorten_the_steps_that_follow():
    """A recorded time just after another cuts one step to a millionth; the steps after it are as long as before."""
    schedule = TWO_GROUPS["polynomial"]
    one = lwd.sample(curved, schedule, NOISE, LABELS, spec=DATA.spec, record=[0.5])
    two = lwd.sample(curved, schedule, NOISE, LABELS, spec=DATA.spec, record=[0.5, 0.500001])
    assert two.evaluations <= one.evaluations + 1 + 6


def test_arrived_images_are_no_longer_evaluated():
    """A still image (zero velocity) costs a handful of evaluations beside one that moves."""

    def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return curved(z, t, labels) * (labels != 1)[:, None, None, None]

    result = lwd.sample(denoiser, TWO_GROUPS["polynomial"], NOISE, LABELS, spec=DATA.spec, rtol=1e-6)
    assert torch.equal(result.latents[1], NOISE[1])
    moving, still = result.evaluations_per_image[0], result.evaluations_per_image[1]
    assert still < 64 < moving


def test_a_stiff_stretch_is_found_by_rejecting_steps():
    """A narrow pulse of velocity in mid-course, whose integral is known."""

    def pulse(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t[:, :1, None, None]
        return torch.exp(-(((t - 0.6) / 0.01) ** 2)) + 0.5 * torch.cos(9 * t) + 0 * z

    z = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    result = lwd.sample(pulse, lwd.SynchronousSchedule(), z, LABELS[:1], rtol=1e-8, atol=1e-8)
    expected = 0.01 * math.sqrt(math.pi) + 0.5 * math.sin(9.0) / 9
    torch.testing.assert_close(result.latents, torch.full_like(z, expected), rtol=0, atol=1e-7)


def test_float32_state_ends_at_exactly_one():
    times: list[Tensor] = []

    def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert z.dtype == t.dtype == torch.float32
        times.append(t)
        return 0.5 * z + t.sum()

    noise = NOISE[:, :2].float()
    result = lwd.sample(denoiser, lwd.SynchronousSchedule(), noise, LABELS, solver="heun", steps=333)
    assert result.latents.dtype == torch.float32
    assert times[0].max() == 0
    assert times[-1].min() == 1


def test_failures_say_where():
    def bad_from(time: float, value: float):
        def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return torch.where(t[:, :1, None, None] > time, value, curved(z, t, labels))

        return denoiser

    for value in (math.nan, math.inf):
        for solver in ("heun", "ab3", "dpmpp2m"):
            options = {"spec": DATA.spec, "solver": solver, "steps": 10}
            with pytest.raises(FloatingPointError, match=r"tau = 0\.[67]000"):  # a multistep one sees it a step later
                lwd.sample(bad_from(0.5, value), TWO_GROUPS["synchronous"], NOISE, LABELS, **options)
        with pytest.raises(FloatingPointError, match="between tau") as error:
            lwd.sample(bad_from(0.5, value), TWO_GROUPS["synchronous"], NOISE, LABELS, spec=DATA.spec)
        first, last = (float(x) for x in re.findall(r"tau = ([\d.]+)", str(error.value)))
        assert first <= 0.5 <= last


def test_adaptive_solver_gives_up(monkeypatch):
    monkeypatch.setattr(dormand_prince, "MAX_ATTEMPTS", 3)
    with pytest.raises(FloatingPointError, match="more than 3 steps"):
        solve(TWO_GROUPS["polynomial"], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("atol", "rtol"), [(-1e-6, 1e-3), (0.0, 0.0), (1e-6, -1.0), (math.nan, 1e-3)])
def test_bad_tolerances(atol, rtol):
    with pytest.raises(ValueError, match="tolerances"):
        solve(TWO_GROUPS["synchronous"], atol=atol, rtol=rtol)


def test_solvers_are_listed():
    assert list(SOLVERS) == ["dopri5", "ab2", "ab3", "dpmpp2m", "dpmpp3m", "heun", "midpoint", "euler"]
    assert isinstance(DATA, Gaussian)
