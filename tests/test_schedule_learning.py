"""What the schedule objective does to rho, with a denoiser that is always exact (Gaussian data, closed form)."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import lwd
from gaussian import Gaussian, Pairs, curve, gauss_legendre, polynomial
from lwd import Group, LatentSpec, PolynomialSchedule, Schedule, ScheduleTerms

EXTREME = [-80.0, -80.0, -80.0, -80.0, 0.0]  # t = tau^5


def objective(pairs: Pairs, schedule: Schedule, tau: np.ndarray, spec: LatentSpec, **options) -> ScheduleTerms:
    """`schedule_objective` in expectation over the data, averaged over the global times `tau`."""
    data = pairs.gaussian()
    x0, x1 = data.exact_batch()
    n, k = len(tau), len(x0)
    labels, taus = torch.zeros(n * k, dtype=torch.long), torch.from_numpy(tau).repeat_interleave(k)
    return lwd.schedule_objective(
        data, schedule, spec, x0.repeat(n, 1, 1, 1), x1.repeat(n, 1, 1, 1), labels, taus, **options
    )


def spec_with(texture: float = 1.0, semantic: float = 1.0) -> LatentSpec:
    return LatentSpec([Group("texture", 1, texture), Group("semantic", 1, semantic)])


def expected_flow_and_gradient(
    pairs: Pairs, schedule: PolynomialSchedule, spec: LatentSpec, nodes: int = 48, **options
):
    """L_rho and its gradient in rho by Gauss-Legendre quadrature over tau."""
    total = torch.zeros((), dtype=torch.float64)
    for tau, weight in zip(*gauss_legendre(nodes), strict=True):
        total = total + weight * objective(pairs, schedule, np.array([tau]), spec, **options).total
    return total.item(), torch.autograd.grad(total, schedule.rho)[0][0].numpy()


@pytest.mark.parametrize("jacobian", ["detached", "exact"])
@pytest.mark.parametrize(("kinetic", "seed"), [(0.0, 0), (0.04, 1), (0.5, 2)])
def test_gradient_of_rho_is_the_analytic_one(jacobian, kinetic, seed):
    pairs, rho = Pairs.power_law(8), np.random.default_rng(seed).normal(size=5)
    value, gradient = expected_flow_and_gradient(
        pairs, polynomial(rho), spec_with(), kinetic=kinetic, jacobian=jacobian, reduction="groups"
    )
    expected_value, expected = pairs.objective(rho, kinetic, jacobian)
    assert value == pytest.approx(expected_value, rel=1e-10)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    other = pairs.objective(rho, kinetic, "exact" if jacobian == "detached" else "detached")[1]
    assert np.abs(other - expected).max() > 0.05 * np.abs(expected).max()


def test_gradient_of_rho_under_the_global_reduction():
    """The default: w_g d_g / sum d for the flow loss, plain sum over groups for the kinetic term."""
    pairs, rho = Pairs.power_law(4), np.array([0.2, -1.0, 0.5])
    value, gradient = expected_flow_and_gradient(pairs, polynomial(rho), spec_with(1.0, 2.0), kinetic=0.1)
    expected_value, expected = pairs.objective(rho, 0.1, "detached", weights=(0.5, 1.0))
    assert value == pytest.approx(expected_value, rel=1e-10)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_analytic_gradient_of_the_exact_variant_is_that_of_the_value():
    """Finite differences: "exact" differentiates the loss, "detached" something else."""
    pairs, rho, h = Pairs.power_law(8), np.array([0.1, -1.0, 0.3, -2.0, 1.0]), 1e-6
    above, below = ([pairs.objective(rho + e, 0.1, "exact")[0] for e in d * np.eye(5)] for d in (h, -h))
    difference = (np.array(above) - below) / (2 * h)
    np.testing.assert_allclose(pairs.objective(rho, 0.1, "exact")[1], difference, rtol=1e-6, atol=1e-9)
    assert np.abs(pairs.objective(rho, 0.1, "detached")[1] - difference).max() > 0.3 * np.abs(difference).max()


INNER = [polynomial(rho) for rho in ([0.54, -9.0, -9.0, -9.0, -9.0], [0.5, -2.0, -2.0, -2.0, 1.0], EXTREME)]
"""Synchronous, in between, extreme."""


def test_the_irreducible_loss_in_the_weights_of_information_is_that_of_every_schedule():
    """The weights stop to grow at t = 0.95, which costs less than a two thousandth, where Eq. 36, here with
    weights of 1 and 3, differs by a fiftieth."""
    pairs = Pairs.power_law(16)
    values = {}
    for jacobian in ("information", "exact"):
        options = {"nodes": 400, "kinetic": 0.0, "jacobian": jacobian}
        found = [expected_flow_and_gradient(pairs, s, spec_with(1.0, 3.0), **options) for s in INNER]
        values[jacobian] = np.array([value for value, _ in found])
        assert np.abs(found[1][1]).max() > 0
    assert np.ptp(values["information"]) < 5e-4 * values["information"].mean()
    assert np.ptp(values["exact"]) > 0.015 * values["exact"].mean()
    # By hand, and the groups' weights of 1 and 3 do not enter.
    tau, w = gauss_legendre(400)
    t, dt, _, _ = curve(INNER[1].rho[0].detach().numpy(), tau)
    loss = pairs.loss(t, tau)
    t, s = np.minimum(t, 0.95), np.minimum(tau, 0.95)
    expected = w @ (t / (1 - t) * dt * loss["tex"] + s / (1 - s) * loss["sem"]) / 2
    assert values["information"][1] == pytest.approx(expected, rel=1e-3)


def test_the_gradient_of_rho_in_the_weights_of_information_is_that_of_the_value():
    """Of an exact denoiser it nearly vanishes, so that what moves rho is what a denoiser does not do well."""
    pairs, rho, h = Pairs.power_law(16), np.array([-2.0, -2.0, -2.0, -2.0, 0.5]), 1e-5
    options = {"nodes": 400, "kinetic": 0.0, "jacobian": "information"}
    above, below = (
        [expected_flow_and_gradient(pairs, polynomial(rho + e), spec_with(), **options)[0] for e in d * np.eye(5)]
        for d in (h, -h)
    )
    gradient = expected_flow_and_gradient(pairs, polynomial(rho), spec_with(), **options)[1]
    np.testing.assert_allclose(gradient, (np.array(above) - below) / (2 * h), rtol=1e-4, atol=1e-8)
    exact = expected_flow_and_gradient(pairs, polynomial(rho), spec_with(), kinetic=0.0, jacobian="exact")[1]
    assert np.abs(gradient).max() < 0.01 * np.abs(exact).max()


def learn(pairs: Pairs, kinetic: float, jacobian: str, degree: int = 4, steps: int = 450) -> Schedule:
    """Adam on rho from the default start, the denoiser exact at every step, tau on an equidistant grid."""
    schedule = PolynomialSchedule(degree).double()
    optimizer = torch.optim.Adam([schedule.rho], lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    tau = (np.arange(32) + 0.5) / 32
    for _ in range(steps):
        optimizer.zero_grad()
        options = {"kinetic": kinetic, "jacobian": jacobian, "reduction": "groups"}
        objective(pairs, schedule, tau, spec_with(), **options).total.backward()
        optimizer.step()
        decay.step()
    return schedule.frozen()


def half(schedule: Schedule) -> float:
    """t_tex(1/2): 1/2 for the identity, 1/32 for tau^5."""
    return schedule(torch.tensor([0.5], dtype=torch.float64)).t[0, 0].item()


def local_time_loss(pairs: Pairs, schedule: Schedule) -> float:
    """Eq. 36 through the library, by quadrature."""
    nodes, weights = gauss_legendre(48)
    with torch.no_grad():
        flows = [
            objective(pairs, schedule, np.array([tau]), spec_with(), kinetic=0.0, reduction="groups").flow.item()
            for tau in nodes
        ]
    return float(weights @ flows)


def fixed_point(pairs: Pairs, kinetic: float, jacobian: str) -> float:
    """The p at which the estimator's analytic gradient along t = (1 - p) tau + p tau^2 vanishes."""

    def slope(p: float) -> float:
        rho = np.log(np.expm1([1 - p, 2 * p]))  # a = (1 - p, 2 p)
        gradient = pairs.objective(rho, kinetic, jacobian)[1] * (1 + np.exp(-rho))  # in a
        return gradient @ [-1.0, 2.0]

    return brentq(slope, 1e-3, 1 - 1e-3)


@pytest.mark.parametrize(("jacobian", "kinetic", "near"), [("detached", 0.4, 0.437), ("exact", 0.2, 0.492)])
def test_learning_ends_at_the_fixed_point_of_its_estimator(jacobian, kinetic, near):
    """Degree 1 has one degree of freedom, so the fixed point is a root; the two estimators have different ones."""
    pairs = Pairs.power_law(16)
    p = fixed_point(pairs, kinetic, jacobian)
    assert p == pytest.approx(near, abs=0.002)
    learned = learn(pairs, kinetic, jacobian, degree=1)
    assert half(learned) == pytest.approx(0.5 - p / 4, abs=1e-3)


@pytest.mark.parametrize(("jacobian", "settled"), [("detached", 0.280), ("exact", 0.483)])
def test_weak_kinetic_energy_collapses_and_strong_settles(jacobian, settled):
    """Power-law spectrum, degree 4: below a threshold the extreme tau^5, above it an interior fixed point."""
    pairs = Pairs.power_law(16)
    for kinetic in (0.0, 0.04):
        assert half(learn(pairs, kinetic, jacobian)) < 0.045
    stable = learn(pairs, 0.3, jacobian)
    assert half(stable) == pytest.approx(settled, abs=0.01)
    # There the estimator's own pull has vanished, against its size at the start.
    pull = [np.abs(pairs.objective(rho, 0.3, jacobian)[1]).max() for rho in (stable.rho[0].numpy(), np.zeros(5))]
    assert pull[0] < 0.02 * pull[1]


def test_detached_stays_at_the_identity_where_the_extreme_is_better():
    """Unit variances, correlation 0.8: Eq. 36 falls from 2.81 to 2.58, and only the exact gradient finds it."""
    pairs = Pairs(1.0, 1.0, 0.8)
    assert local_time_loss(pairs, lwd.SynchronousSchedule()) == pytest.approx(2.81, abs=0.005)
    assert local_time_loss(pairs, polynomial(EXTREME)) == pytest.approx(2.58, abs=0.005)
    for kinetic in (0.0, 0.04, 0.3):
        assert half(learn(pairs, kinetic, "detached", steps=60)) > 0.492
    exact = learn(pairs, 0.0, "exact")
    assert half(exact) < 0.04
    assert local_time_loss(pairs, exact) == pytest.approx(2.58, abs=0.005)


def test_detached_and_exact_differ_by_the_term_of_integration_by_parts():
    """The difference of the two gradients is E_tau[ w l_tex dt'/drho ]."""
    pairs, rho = Pairs.power_law(8), np.array([0.0, 0.5, -1.0, 0.2, 0.4])
    gradients = [
        expected_flow_and_gradient(
            pairs, polynomial(rho), spec_with(), kinetic=0.1, jacobian=jacobian, reduction="groups"
        )[1]
        for jacobian in ("exact", "detached")
    ]
    nodes, weights = gauss_legendre(64)
    t, _, _, dt_rho = curve(rho, nodes)
    expected = dt_rho @ (weights * pairs.loss(t, nodes)["tex"])
    np.testing.assert_allclose(gradients[0] - gradients[1], expected, rtol=0, atol=1e-9)


def test_gradient_of_rho_in_float32():
    """The probe runs in float32: the gradient is the float64 one to single precision."""
    rho, tau = np.array([0.1, -3.0, -3.0, -3.0, -1.0]), torch.rand(64, generator=torch.Generator().manual_seed(0))
    gradients: list[Tensor] = []
    for dtype in (torch.float32, torch.float64):
        data, schedule = Gaussian(spec_with(), Pairs.power_law(8).gaussian().covariance.to(dtype)), polynomial(rho)
        x0, x1 = (x.repeat(16, 1, 1, 1) for x in data.exact_batch())
        schedule = schedule.to(dtype)
        terms = lwd.schedule_objective(
            data, schedule, data.spec, x0, x1, torch.zeros(64, dtype=torch.long), tau.to(dtype)
        )
        gradients.append(torch.autograd.grad(terms.total, schedule.rho)[0].double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
