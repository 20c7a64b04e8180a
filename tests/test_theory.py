"""The paper's theorems, checked against the library on Gaussian data, where everything is known in closed form."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import lwd
from gaussian import (
    SCHEDULES,
    Gaussian,
    Pairs,
    gauss_legendre,
    normal,
    polynomial,
    random_gaussian,
    unequal_spec,
)
from lwd import LatentSpec, LocalTimes, Schedule
from lwd.objective import ScheduleTerms

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def data_for(schedule: Schedule, positions: int = 2) -> Gaussian:
    return random_gaussian(unequal_spec(schedule.groups), positions)


def labels_for(batch: Tensor) -> Tensor:
    return torch.zeros(len(batch), dtype=torch.long)


def at_every_tau(data: Gaussian, taus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact batch repeated at every global time: x0, x1, tau."""
    x0, x1 = data.exact_batch()
    n = len(x0)
    return x0.repeat(len(taus), 1, 1, 1), x1.repeat(len(taus), 1, 1, 1), taus.repeat_interleave(n)


# The helper itself


def test_exact_batch_has_the_moments_of_the_population():
    data = data_for(SCHEDULES["offset"])
    x0, x1 = data.exact_batch()
    z = torch.cat([x0, x1], dim=1)[:, :, 0]  # [B, 2C, K]
    moments = torch.einsum("bik,bjk->kij", z, z) / len(z)
    expected = torch.stack([torch.block_diag(data.eye, sigma) for sigma in data.covariance])
    torch.testing.assert_close(moments, expected, rtol=1e-12, atol=1e-12)


def test_denoiser_agrees_with_the_formulas_for_pairs():
    pairs = Pairs([1.0, 0.3, 4.0], [2.0, 0.5, 1.0], [0.9, -0.2, 0.0])
    data = pairs.gaussian()
    times = torch.tensor([[0.2, 0.7], [0.5, 0.5], [0.05, 0.95]], dtype=torch.float64)
    z, (t, s) = normal(3, 2, 1, 3), times.numpy().T[:, :, None]
    vt, vs, c = pairs.vt, pairs.vs, pairs.c
    s11, s22, s12 = t**2 * vt + (1 - t) ** 2, s**2 * vs + (1 - s) ** 2, t * s * c
    z_tex, z_sem = z[:, 0, 0].numpy(), z[:, 1, 0].numpy()
    a, b = (s22 * z_tex - s12 * z_sem, s11 * z_sem - s12 * z_tex) / (s11 * s22 - s12**2)
    expected = np.stack([(t * vt - (1 - t)) * a + s * c * b, t * c * a + (s * vs - (1 - s)) * b], 1)
    np.testing.assert_allclose(data(z, times)[:, :, 0].numpy(), expected, rtol=1e-12)


# Theorem 3.1


@every_schedule
def test_interpolant_has_the_covariance_of_eq_12(schedule):
    data = data_for(schedule)
    taus = torch.tensor([0.0, 0.1, 0.37, 0.8, 1.0], dtype=torch.float64)
    x0, x1, tau = at_every_tau(data, taus)
    z = lwd.interpolate(x0, x1, schedule(tau).t, data.spec)[:, :, 0].unflatten(0, (len(taus), -1))
    covariance = torch.einsum("nbik,nbjk->nkij", z, z) / z.shape[1]
    a = data.spec.expand(schedule(taus).t)[:, None, :, 0]  # diagonal of A_tau, [N, 1, C, 1]
    expected = a * data.covariance * a.mT + torch.diag_embed((1 - a[..., 0]) ** 2)
    torch.testing.assert_close(covariance, expected.expand_as(covariance), rtol=1e-12, atol=1e-12)


@every_schedule
def test_flow_transports_noise_through_eq_12(schedule):
    """The flow is linear, so a basis pushed through it gives the matrix M with cov(z) = M M^T: no sampling error."""
    data, taus = data_for(schedule), (0.15, 0.5, 0.8, 1.0)
    basis = data.eye[:, :, None, None].expand(-1, -1, 1, len(data.covariance))
    result = lwd.sample(data, schedule, basis, labels_for(basis), atol=1e-11, rtol=1e-10, record=taus)
    for tau, state in zip(taus, result.states, strict=True):
        m = state[:, :, 0].permute(2, 1, 0)
        expected = data.state_covariance(schedule(torch.tensor([tau], dtype=torch.float64)).t)[0]
        torch.testing.assert_close(m @ m.mT, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(m @ m.mT, data.covariance, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["offset", "polynomial", "cascaded of 3"])
def test_samples_have_the_covariance_of_eq_12(name):
    schedule, n, taus = SCHEDULES[name], 20_000, (0.4, 1.0)
    data = data_for(schedule, positions=1)
    noise = normal(n, data.spec.channels, 1, 1)
    result = lwd.sample(data, schedule, noise, labels_for(noise), solver="heun", steps=24, record=taus)
    for tau, state in zip(taus, result.states, strict=True):
        z = state[:, :, 0, 0]
        expected = data.state_covariance(schedule(torch.tensor([tau], dtype=torch.float64)).t)[0, 0]
        variance = expected.diag()
        standard_error = ((expected**2 + variance[:, None] * variance) / n).sqrt()
        assert ((z.T @ z / n - expected).abs() < 5 * standard_error).all()
        assert (z.mean(0).abs() < 5 * (variance / n).sqrt()).all()


@every_schedule
def test_ideal_flow_in_score_form(schedule):
    """Eq. 14-16, the score taken by autograd from the log density."""
    data = data_for(schedule)
    tau = torch.tensor([0.31, 0.36, 0.41, 0.6], dtype=torch.float64)
    times = LocalTimes(*(x.detach() for x in schedule(tau)))
    inside = ((times.t > 0) & (times.t < 1)).double()
    t = data.spec.expand(times.t.clamp(1e-3, 1 - 1e-3))
    z = normal(len(tau), data.spec.channels, 1, 2).requires_grad_()
    (score,) = torch.autograd.grad(data.log_density(z, times.t).sum(), z)
    v = data(z, times.t)
    mask = data.spec.expand(inside)
    torch.testing.assert_close(mask * v, mask * (z / t + (1 - t) / t * score), rtol=1e-9, atol=1e-9)
    dt = data.spec.expand(times.dt)
    flow = lwd.global_velocity(v, times.dt, data.spec)
    torch.testing.assert_close(mask * flow, mask * (dt / t * z + dt * (1 - t) / t * score), rtol=1e-9, atol=1e-9)
    assert inside.any()


@every_schedule
def test_continuity_equation(schedule):
    """d/dtau log p + div V + V . grad log p = 0 at random points."""
    data = data_for(schedule)
    tau = torch.tensor([0.05, 0.21, 0.42, 0.58, 0.91], dtype=torch.float64, requires_grad=True)
    z = normal(len(tau), data.spec.channels, 1, 2).requires_grad_()
    times = schedule(tau)
    d_tau, score = torch.autograd.grad(data.log_density(z, times.t).sum(), (tau, z))
    flow = lwd.global_velocity(data(z, times.t), times.dt, data.spec)
    units = torch.eye(z[0].numel(), dtype=z.dtype).view(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
    jacobian = torch.autograd.grad(flow, z, units, is_grads_batched=True)[0]
    divergence = (jacobian * units).sum(dim=(0, 2, 3, 4))
    terms = torch.stack([d_tau, divergence, (flow * score).sum(dim=(1, 2, 3))])
    assert terms.abs().max() > 0.1
    torch.testing.assert_close(terms.sum(0), torch.zeros_like(tau), rtol=0, atol=1e-9)


# Theorem 3.2


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.03, 40.0), (7.0, 0.2)])
@pytest.mark.parametrize("jacobian", ["detached", "exact", "none"])
@pytest.mark.parametrize("reduction", ["global", "groups"])
def test_weighted_loss_is_minimal_at_the_ideal_flow_whatever_the_weights(weights, jacobian, reduction):
    spec = LatentSpec([lwd.Group("texture", 2, weights[0]), lwd.Group("semantic", 1, weights[1])])
    data, schedule = random_gaussian(spec, positions=1), SCHEDULES["polynomial"].frozen()
    taus = torch.tensor([0.2, 0.55, 0.9], dtype=torch.float64)
    x0, x1, tau = at_every_tau(data, taus)
    t = schedule(taus).t
    ideal = data.velocity_covariance(t)[:, 0] @ data.state_covariance(t)[:, 0].inverse()  # [N, C, C]

    def loss(w: Tensor) -> Tensor:
        def linear(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return (w.repeat_interleave(len(z) // len(w), 0) @ z[:, :, 0]).unsqueeze(2)

        return lwd.denoiser_objective(
            linear, schedule, spec, x0, x1, labels_for(x0), tau, cosine=0.0, jacobian=jacobian, reduction=reduction
        ).total

    # A quadratic in w: one Newton step from anywhere ends at the minimum, unique as the Hessian is definite.
    start = normal(*ideal.shape, seed=1)
    gradient = torch.autograd.functional.jacobian(loss, start).flatten()
    hessian = torch.autograd.functional.hessian(loss, start).view(len(gradient), -1)
    assert torch.linalg.eigvalsh(hessian)[0] > 0
    learned = start - torch.linalg.solve(hessian, gradient).view_as(start)
    torch.testing.assert_close(learned, ideal, rtol=1e-8, atol=1e-8)


def test_kinetic_term_shrinks_the_minimiser_by_a_known_factor():
    """R_kin reaches the denoiser: w t' |v - u|^2 + lambda t'^2 |v|^2 is minimal at v* / (1 + lambda t' / w)."""
    data, schedule = data_for(SCHEDULES["polynomial"], 1), SCHEDULES["polynomial"].frozen()
    x0, x1, tau = at_every_tau(data, torch.tensor([0.7], dtype=torch.float64))
    dt, w = schedule(tau).dt, torch.tensor([group.weight for group in data.spec.groups], dtype=torch.float64)
    shrink = data.spec.expand(1 / (1 + 0.3 * dt / w)).requires_grad_()
    terms = lwd.schedule_objective(
        lambda z, t, labels: shrink * data(z, t),
        schedule, data.spec, x0, x1, labels_for(x0), tau, kinetic=0.3, reduction="groups",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.total, shrink)
    torch.testing.assert_close(gradient.sum(0), torch.zeros_like(gradient[0]), rtol=0, atol=1e-12)


# Lemma 3.3


def random_losses(seed: int):
    """Two smooth positive functions of (t_tex, t_sem), [N] each."""
    c = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, 3))) * 0.3

    def losses(t, s):
        basis_t, basis_s = (torch.stack([torch.ones_like(x), torch.sin(2 * x), torch.cos(3 * x)]) for x in (t, s))
        return list(torch.einsum("gij,in,jn->gn", c, basis_t, basis_s).exp())

    return losses


def flow_loss(schedule: Schedule, losses, jacobian: str) -> float:
    """`schedule_objective().flow` by quadrature over tau, for a denoiser whose error is exactly `losses`."""
    spec, u, total = unequal_spec(2), normal(1, 3, 1, 1), 0.0
    spec = LatentSpec([lwd.Group(group.name, group.channels) for group in spec.groups])

    def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return u + spec.expand(torch.stack(losses(t[:, 0], t[:, 1]), 1).sqrt())

    for tau, weight in zip(*gauss_legendre(40), strict=True):
        terms = lwd.schedule_objective(
            denoiser, schedule, spec, torch.zeros_like(u), u, labels_for(u), torch.tensor([tau], dtype=torch.float64),
            kinetic=0.0, jacobian=jacobian, reduction="groups",
        )  # fmt: skip
        total += weight * terms.flow.item()
    return total


@pytest.mark.parametrize("seed", range(5))
def test_corrected_loss_is_the_local_time_form(seed):
    """Eq. 35 = Eq. 36 for random schedules and losses; without the factor, it is the distorted Eq. 31 instead."""
    schedule = polynomial(np.random.default_rng(seed).normal(size=5))
    losses = random_losses(seed)
    nodes, weights = (torch.from_numpy(x) for x in gauss_legendre(400))
    pair = schedule.inverse(nodes, 0)
    texture = losses(nodes, pair)[0]
    semantic = losses(schedule(nodes).t[:, 0].detach(), nodes)[1]
    local = float(weights @ (texture + semantic))
    for jacobian in ("detached", "exact"):
        assert flow_loss(schedule, losses, jacobian) == pytest.approx(local, rel=1e-6)
    uncorrected = flow_loss(schedule, losses, "none")
    density = 1 / schedule(pair).dt[:, 0].detach()
    assert uncorrected == pytest.approx(float(weights @ (density * texture + semantic)), rel=1e-6)
    assert abs(uncorrected / local - 1) > 0.005


def test_only_the_corrected_loss_ignores_the_schedule_when_losses_depend_on_their_own_time():
    """The confound of section 3.3: reordering gains nothing for such losses, so no schedule may look better."""

    def losses(t, s):
        return [torch.exp(-3 * t), torch.exp(-s)]

    schedules = [polynomial(rho) for rho in ([0.5, -8, -8, -8, -8], [0, 0, 0, 0, 0], [-6, -6, -6, -6, 2])]
    corrected = [flow_loss(schedule, losses, "detached") for schedule in schedules]
    assert corrected == pytest.approx([(1 - np.exp(-3)) / 3 + 1 - np.exp(-1)] * 3, rel=1e-9)
    uncorrected = [flow_loss(schedule, losses, "none") for schedule in schedules]
    assert max(uncorrected) / min(uncorrected) > 1.3


# The information identity


class Scaled(Schedule):
    """Another schedule's curve, shrunk to end at T: a path with a finite amount of information."""

    def __init__(self, inner: Schedule, end: float) -> None:
        super().__init__(inner.groups)
        self.inner, self.end, self.kinks = inner, end, inner.kinks

    def local_times(self, tau: Tensor) -> LocalTimes:
        t, dt = self.inner.local_times(tau)
        return LocalTimes(self.end * t, self.end * dt)

    def parameters_dict(self):
        raise NotImplementedError


def terms_along(schedule: Schedule, pairs: Pairs) -> tuple[LocalTimes, Tensor, Tensor]:
    """Local times [N, G], losses l_g [N, G] and weights [N] at the nodes of a quadrature over the smooth pieces."""
    stops = [0.0, *schedule.kinks, 1.0]
    pieces = [gauss_legendre(200, a, b) for a, b in pairwise(stops)]
    nodes, weights = (torch.from_numpy(np.concatenate(x)) for x in zip(*pieces, strict=True))
    data = pairs.gaussian()
    x0, x1, tau = at_every_tau(data, nodes)
    with torch.no_grad():
        terms: ScheduleTerms = lwd.schedule_objective(data, schedule, data.spec, x0, x1, labels_for(x0), tau)
        times = schedule(nodes)
    return times, terms.per_group.unflatten(0, (len(nodes), -1)).mean(1), weights


def test_information_gained_does_not_depend_on_the_schedule():
    """sum_g t/(1-t) l_g d_g dt_g along any path to T is I(x1; z) = 1/2 log det(I + snr Sigma), to 6 digits."""
    pairs, end = Pairs.power_law(16), 0.98
    covariance = pairs.gaussian().covariance
    snr = end**2 / (1 - end) ** 2
    expected = 0.5 * torch.logdet(torch.eye(2, dtype=torch.float64) + snr * covariance).sum().item()
    uniform = {}
    for name in ("synchronous", "offset", "polynomial", "cascaded", "shifted"):
        (t, dt), loss, weights = terms_along(Scaled(SCHEDULES[name], end), pairs)
        information = (weights @ (t / (1 - t) * dt * loss)).sum().item() * 16
        assert information == pytest.approx(expected, rel=1e-6), name
        uniform[name] = (weights @ (dt * loss)).sum().item() * 16
    # Eq. 36 on its own does tell them apart, in favour of collapse.
    assert uniform["synchronous"] / uniform["cascaded"] > 1.1
    assert min(uniform, key=uniform.get) == "cascaded"
