"""Error surfaces and the best schedules through them, on Gaussian data with exact denoisers and on made-up ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lwd
from gaussian import PAIR_SPEC, Pairs, gauss_legendre, polynomial
from lwd import BernsteinSchedule, OffsetSchedule, SynchronousSchedule
from lwd.data import TensorLatents
from lwd.latents import Group, LatentSpec, Normalization
from lwd.objective import information_weight
from lwd.paths import best_path, best_polynomial
from lwd.surface import ErrorSurface, measure_surface

TIMES = torch.linspace(0, 1, 33, dtype=torch.float64)
PAIRS = Pairs.power_law(16)
CURVES = {
    "synchronous": SynchronousSchedule(),
    "inner": polynomial([0.1, -2.0, -2.0, -2.0, 2.0]),
    "extreme": polynomial([-80.0, -80.0, -80.0, -80.0, 0.0]),
    "texture first": BernsteinSchedule([[0.0, 0.0], [1.0, 0.5], [1.0, 1.0]]),
}


def surface_of(errors, speeds=None, groups: int = 2, times: torch.Tensor = TIMES) -> ErrorSurface:
    """A made-up surface: functions of the local times to lists of values by group."""
    grid = torch.meshgrid(*[times] * groups, indexing="ij")
    spec = LatentSpec([Group(f"group{g}", 1) for g in range(groups)]) if groups > 2 else PAIR_SPEC
    zero = [torch.zeros_like(grid[0])] * groups
    values = [torch.stack(torch.broadcast_tensors(*(f(*grid) if f else zero)), dim=-1) for f in (errors, speeds)]
    return ErrorSurface(spec, times, *values)


def exact(times: torch.Tensor = TIMES) -> ErrorSurface:
    """The surface of the exact denoiser of the pairs, in closed form."""

    def at(t, s):
        shape = t.shape
        loss, energy = (f(t.reshape(-1).numpy(), s.reshape(-1).numpy()) for f in (PAIRS.loss, PAIRS.energy))
        return [[torch.from_numpy(found[g]).view(shape) for g in ("tex", "sem")] for found in (loss, energy)]

    return surface_of(lambda t, s: at(t, s)[0], lambda t, s: at(t, s)[1], times=times)


def test_a_measured_surface_is_the_closed_form():
    data = PAIRS.gaussian()
    gaussian = torch.Generator().manual_seed(0)
    roots = torch.linalg.cholesky(data.covariance)
    latents = (roots @ torch.randn(6000, len(roots), 2, 1, generator=gaussian, dtype=torch.float64))[..., 0]
    source = TensorLatents(
        PAIR_SPEC, latents.transpose(1, 2)[:, :, None].float(), torch.zeros(6000, dtype=torch.long),
        normalization=Normalization((0.0, 0.0), (1.0, 1.0)),
    )  # fmt: skip
    single = lambda z, t, labels: data(z.double(), t.double())  # noqa: E731
    found = measure_surface(single, source, points=5, images=6000, batch=4000, about={"run": "x"})
    expected = exact(found.times)
    torch.testing.assert_close(found.errors, expected.errors, rtol=0.03, atol=0.01)
    torch.testing.assert_close(found.speeds, expected.speeds, rtol=0.03, atol=0.01)
    assert found.about == {"run": "x", "images": 6000}
    # The same noise at every node: neighbours differ by much less than two measurements do.
    again = measure_surface(single, source, points=5, images=6000, batch=4000)
    assert torch.equal(again.errors, found.errors)
    with pytest.raises(ValueError, match="at least 2 points"):
        measure_surface(single, source, points=1)


def test_between_nodes_it_is_multilinear_and_differentiable():
    surface = surface_of(
        lambda t, s: [1 + 2 * t + 3 * s + 4 * t * s, s + 0 * t], lambda t, s: [t + 0 * s, 1 - s + 0 * t]
    )
    t = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.cat([t, torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)]).requires_grad_()
    errors, speeds = surface.at(t)
    a, b = t.detach().T
    torch.testing.assert_close(errors.detach(), torch.stack([1 + 2 * a + 3 * b + 4 * a * b, b], dim=1))
    torch.testing.assert_close(speeds.detach(), torch.stack([a, 1 - b], dim=1))
    gradient = torch.autograd.grad(errors[:, 0].sum(), t)[0]
    torch.testing.assert_close(gradient, torch.stack([2 + 4 * b, 3 + 4 * a], dim=1))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("weights", ["information", "uniform"])
def test_cost_is_the_probes_objective(curve, weights):
    """`schedule_objective` with the exact denoiser, in expectation and by quadrature."""
    fine = exact(torch.linspace(0, 1, 201, dtype=torch.float64))
    data, schedule, total = PAIRS.gaussian(), CURVES[curve].double(), 0.0
    x0, x1 = data.exact_batch()
    labels = torch.zeros(len(x0), dtype=torch.long)
    jacobian = "information" if weights == "information" else "exact"
    for tau, weight in zip(*gauss_legendre(300), strict=True):
        taus = torch.full((len(x0),), tau, dtype=torch.float64)
        terms = lwd.schedule_objective(
            data, schedule, PAIR_SPEC, x0, x1, labels, taus, kinetic=0.1, jacobian=jacobian
        )  # fmt: skip
        total += weight * terms.total.item()
    assert float(fine.cost(schedule.frozen(), kinetic=0.1, weights=weights)) == pytest.approx(total, rel=2e-3)


def test_in_the_weights_of_information_an_exact_denoiser_leaves_nothing_to_choose():
    surface = exact(torch.linspace(0, 1, 201, dtype=torch.float64))
    costs = [float(surface.cost(curve.frozen().double(), points=4000)) for curve in CURVES.values()]
    assert np.ptp(costs) < 2e-3 * np.mean(costs)
    uniform = [float(surface.cost(curve.frozen().double(), weights="uniform")) for curve in CURVES.values()]
    assert np.ptp(uniform) > 0.05 * np.mean(uniform)
    # The kinetic term alone decides: the path found costs what no other does less, but for quadrature.
    path = best_path(surface, kinetic=0.02)
    least = min(float(surface.cost(curve.frozen().double(), kinetic=0.02)) for curve in CURVES.values())
    assert float(surface.cost(path, kinetic=0.02)) < 1.0005 * least


def test_the_best_path_follows_a_valley():
    """Errors that vanish on t = s^2 alone; a kinetic term would pull it away."""
    surface = surface_of(lambda t, s: [0 * t, (t - s**2) ** 2 / (0.01 + information_weight(s))])
    path = best_path(surface)
    tau = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(path(tau).t[:, 0], tau**2, rtol=0, atol=0.02)
    assert path.provenance["path"]["cost"] < 1e-3
    assert path.kinks == ()
    polynomial_path = best_polynomial(surface)
    torch.testing.assert_close(polynomial_path(tau).t[:, 0], tau**2, rtol=0, atol=0.02)
    far = best_path(
        surface_of(lambda t, s: [0 * t, (t - s**2) ** 2], lambda t, s: [1 + 0 * t, 1 + 0 * t]), kinetic=100.0
    )
    torch.testing.assert_close(far(tau).t[:, 0], tau, rtol=0, atol=0.01)


def test_the_search_sees_past_a_local_minimum():
    """Two valleys, a shallow one on the near side of the start of a descent, and a deep one above the diagonal."""

    def errors(t, s):
        shallow, deep = (t - s**2).abs() * 5 + 0.3, (t - s**0.5).abs() * 5
        return [0 * t, torch.minimum(shallow, deep) + 0 * s]

    surface = surface_of(errors)
    tau = torch.linspace(0.05, 1, 101, dtype=torch.float64)  # at 0 the root is steeper than knots can follow
    torch.testing.assert_close(best_path(surface, weights="uniform")(tau).t[:, 0], tau.sqrt(), rtol=0, atol=0.06)


def test_three_groups():
    surface = surface_of(
        lambda a, b, c: [0 * a, 0 * a, (a - c**3).abs() + (b - c**2).abs()],
        groups=3, times=torch.linspace(0, 1, 17, dtype=torch.float64),
    )  # fmt: skip
    tau = torch.linspace(0, 1, 51, dtype=torch.float64)
    path = best_path(surface, weights="uniform")
    assert path.names == ("group0", "group1", "group2")
    torch.testing.assert_close(path(tau).t, torch.stack([tau**3, tau**2, tau], dim=1), rtol=0, atol=0.06)


def test_surfaces_are_kept(tmp_path):
    surface = exact(torch.linspace(0, 1, 3, dtype=torch.float64))
    again = ErrorSurface.load(surface.save(tmp_path / "surface.safetensors"))
    assert again.spec == surface.spec
    assert torch.equal(again.errors, surface.errors)
    assert torch.equal(again.speeds, surface.speeds)
    (tmp_path / "cut").write_bytes((tmp_path / "surface.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut is not an error surface or is damaged"):
        ErrorSurface.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="`lwd path` measures one"):
        ErrorSurface.load(tmp_path / "none")


def test_what_does_not_fit_is_refused():
    surface = exact()
    with pytest.raises(ValueError, match=r"need errors and speeds of shape \(33, 33, 2\)"):
        ErrorSurface(PAIR_SPEC, TIMES, surface.errors[1:], surface.speeds)
    with pytest.raises(ValueError, match="weights are one of information, uniform, not 'exact'"):
        best_path(surface, weights="exact")
    with pytest.raises(ValueError, match="lambda is at least 0"):
        best_polynomial(surface, kinetic=-1.0)
    with pytest.raises(ValueError, match=r"of the groups \('a', 'b'\), the surface"):
        surface.cost(OffsetSchedule(0.3, names=("a", "b")))
