"""Gaussian data, for which the ideal flow, its losses and its score are known in closed form.

`Gaussian` works for any groups and is itself a denoiser, the exact v* of Eq. 7. `Pairs` is the same for independent
pairs of scalars, one texture and one semantic, written out by hand in numpy with its derivatives: a second
derivation, to check the first and the library against.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lwd import (
    BernsteinSchedule,
    CascadedSchedule,
    Group,
    LatentSpec,
    OffsetSchedule,
    PiecewiseLinearSchedule,
    PolynomialSchedule,
    Schedule,
    ShiftedSchedule,
    SynchronousSchedule,
)

PAIR_SPEC = LatentSpec([Group("texture", 1), Group("semantic", 1)])


class Gaussian:
    """x1 ~ N(0, covariance_k) over the channels of position k, positions independent; latents are [B, C, 1, K].

    Args:
        spec: which channels belong to which group.
        covariance: of the data, [K, C, C], float64.
    """

    def __init__(self, spec: LatentSpec, covariance: Tensor) -> None:
        self.spec, self.covariance = spec, covariance
        self.eye = torch.eye(spec.channels, dtype=covariance.dtype)

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """v*(z, t) = cov(u, z) cov(z)^-1 z."""
        weights = torch.linalg.solve(self.state_covariance(t), _columns(z))
        return _channels(self.velocity_covariance(t) @ weights)

    def state_covariance(self, t: Tensor) -> Tensor:
        """cov(z) at local times t [B, G], [B, K, C, C]: A Sigma A + (1 - A)^2 (Eq. 12)."""
        a = self.spec.expand(t)[:, :, 0, 0]
        return (a[:, :, None] * a[:, None, :])[:, None] * self.covariance + (self.eye * (1 - a[:, :, None]) ** 2)[
            :, None
        ]

    def velocity_covariance(self, t: Tensor) -> Tensor:
        """cov(u, z), [B, K, C, C]: Sigma A - (1 - A)."""
        a = self.spec.expand(t)[:, :, 0, 0]
        return a[:, None, None, :] * self.covariance - (self.eye * (1 - a[:, :, None]))[:, None]

    def log_density(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z), [B]."""
        columns = _columns(z)[..., 0]
        zero = torch.zeros_like(columns[0, 0])
        return torch.distributions.MultivariateNormal(zero, self.state_covariance(t)).log_prob(columns).sum(dim=1)

    def exact_batch(self) -> tuple[Tensor, Tensor]:
        """x0, x1 [2C, C, 1, K] whose second moments are those of the population, without sampling error.

        Every expectation of a quadratic form of (x0, x1), such as a loss of a linear denoiser, is the plain mean over
        these points: column i of sqrt(2C) diag(I, chol Sigma).
        """
        c = self.spec.channels
        roots = torch.linalg.cholesky(self.covariance).permute(2, 1, 0)  # [column, C, K]
        noise = self.eye.T[:, :, None].expand(c, c, len(self.covariance))
        x0 = torch.cat([noise, torch.zeros_like(roots)])[:, :, None] * (2 * c) ** 0.5
        x1 = torch.cat([torch.zeros_like(noise), roots])[:, :, None] * (2 * c) ** 0.5
        return x0, x1


def _columns(z: Tensor) -> Tensor:
    return z[:, :, 0].transpose(1, 2)[..., None]


def _channels(columns: Tensor) -> Tensor:
    return columns[..., 0].transpose(1, 2)[:, :, None]


class Pairs:
    """K independent pairs of scalars with variances vt, vs and covariance c, by hand.

    t is the texture's local time and s the semantic's, both [N]; results are means over the pairs, [N].
    """

    def __init__(self, vt: object, vs: object, c: object) -> None:
        self.vt, self.vs, self.c = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (vt, vs, c))

    @classmethod
    def power_law(cls, k: int = 16, texture: float = 1.0, semantic: float = 2.5, correlation: float = 0.8) -> Pairs:
        """Variances i^-texture and i^-semantic, scaled to mean 1."""
        i = np.arange(1, k + 1.0)
        vt, vs = i**-texture, i**-semantic
        vt, vs = vt / vt.mean(), vs / vs.mean()
        return cls(vt, vs, correlation * np.sqrt(vt * vs))

    def gaussian(self) -> Gaussian:
        rows = [np.stack([self.vt, self.c], -1), np.stack([self.c, self.vs], -1)]
        return Gaussian(PAIR_SPEC, torch.from_numpy(np.stack(rows, 1)))

    def energy(self, t: np.ndarray, s: np.ndarray) -> dict[str, np.ndarray]:
        """E v*_g^2 of both groups ("tex", "sem") and its derivatives in t ("tex_t", "sem_t")."""
        t, s = np.asarray(t)[:, None], np.asarray(s)[:, None]
        vt, vs, c = self.vt, self.vs, self.c
        s11, s22, s12 = t**2 * vt + (1 - t) ** 2, s**2 * vs + (1 - s) ** 2, t * s * c
        ds11, ds12 = 2 * t * vt - 2 * (1 - t), s * c
        det = s11 * s22 - s12**2
        ddet = ds11 * s22 - 2 * s12 * ds12
        # cov(u_g, z) = (p, q) and its derivative in t.
        groups = {"tex": (t * vt - (1 - t), s * c, vt + 1, 0.0), "sem": (t * c, s * vs - (1 - s), c, 0.0)}
        out = {}
        for name, (p, q, dp, dq) in groups.items():
            form = p**2 * s22 - 2 * p * q * s12 + q**2 * s11
            dform = 2 * p * dp * s22 - 2 * (dp * q + p * dq) * s12 - 2 * p * q * ds12 + 2 * q * dq * s11 + q**2 * ds11
            out[name] = (form / det).mean(1)
            out[f"{name}_t"] = (dform / det - form * ddet / det**2).mean(1)
        return out

    def loss(self, t: np.ndarray, s: np.ndarray) -> dict[str, np.ndarray]:
        """l*_g = Var(u_g) - E v*_g^2 and its derivatives in t, keys as `energy`."""
        energy = self.energy(t, s)
        return {
            "tex": self.vt.mean() + 1 - energy["tex"],
            "sem": self.vs.mean() + 1 - energy["sem"],
            "tex_t": -energy["tex_t"],
            "sem_t": -energy["sem_t"],
        }

    def objective(
        self, rho: np.ndarray, kinetic: float, jacobian: str, weights: tuple[float, float] = (1.0, 1.0)
    ) -> tuple[float, np.ndarray]:
        """L_rho (Eq. 38, sums over groups as printed) and the estimator's gradient in rho, by quadrature."""
        tau, w = gauss_legendre(96)
        t, dt, t_rho, dt_rho = curve(rho, tau)
        loss, energy = self.loss(t, tau), self.energy(t, tau)
        w_tex, w_sem = weights
        value = w @ (w_tex * dt * loss["tex"] + w_sem * loss["sem"] + kinetic * (dt**2 * energy["tex"] + energy["sem"]))
        gradient = t_rho @ (w * (w_tex * dt * loss["tex_t"] + w_sem * loss["sem_t"]))
        if jacobian == "exact":
            gradient += dt_rho @ (w * w_tex * loss["tex"])
        gradient += kinetic * (t_rho @ (w * (dt**2 * energy["tex_t"] + energy["sem_t"])))
        gradient += kinetic * (dt_rho @ (w * 2 * dt * energy["tex"]))
        return float(value), gradient


def curve(rho: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Eq. 40-41 in monomials: t, t' [N] and their derivatives in rho [M+1, N]."""
    m = np.arange(len(rho))[:, None]
    a = np.logaddexp(0, rho)[:, None]
    z = (a / (m + 1)).sum()
    t, dt = (a * tau ** (m + 1) / (m + 1)).sum(0) / z, (a * tau**m).sum(0) / z
    sigmoid = 1 / (1 + np.exp(-np.asarray(rho)))[:, None]
    return t, dt, sigmoid * (tau ** (m + 1) - t) / ((m + 1) * z), sigmoid * (tau**m - dt / (m + 1)) / z


def gauss_legendre(n: int, start: float = 0.0, end: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [start, end]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return start + (end - start) * (x + 1) / 2, w * (end - start) / 2


def polynomial(rho: np.ndarray | list[float], groups: int = 2) -> PolynomialSchedule:
    """The learned family with rho in float64."""
    values = torch.as_tensor(np.asarray(rho, dtype=np.float64))
    schedule = PolynomialSchedule(values.shape[-1] - 1, groups=groups).double()
    schedule.rho.data.copy_(values)
    return schedule


def random_gaussian(spec: LatentSpec, positions: int = 2, seed: int = 0) -> Gaussian:
    """Data whose channels are all correlated, with eigenvalues of about 0.2 to 6."""
    root = torch.randn(positions, spec.channels, spec.channels + 1, generator=_generator(seed), dtype=torch.float64)
    return Gaussian(spec, root @ root.mT / spec.channels + 0.2 * torch.eye(spec.channels, dtype=torch.float64))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TWO_GROUPS: dict[str, Schedule] = {
    "synchronous": SynchronousSchedule(),
    "offset": OffsetSchedule(0.3),
    "polynomial": polynomial([0.1, -2.0, -2.0, -2.0, 2.0]),
    "cascaded": CascadedSchedule(),
    "shifted": ShiftedSchedule((0.5, 3.0)),
    "bernstein": BernsteinSchedule([[0.0, 0.0], [0.1, 0.6], [0.1, 0.6], [0.7, 1.0], [1.0, 1.0]]),
    "piecewise_linear": PiecewiseLinearSchedule([0.0, 0.3, 0.7, 1.0], [[0.0, 0.0], [0.1, 0.5], [0.4, 0.8], [1.0, 1.0]]),
}
THREE_GROUPS: dict[str, Schedule] = {
    "synchronous of 3": SynchronousSchedule(3),
    "offset of 3": OffsetSchedule(0.4, groups=3),
    "polynomial of 3": polynomial([[0.1, -2.0, 1.0], [-1.0, 0.5, -3.0]], groups=3),
    "cascaded of 3": CascadedSchedule(3),
    "shifted of 3": ShiftedSchedule((0.4, 1.0, 2.5)),
    "bernstein of 3": BernsteinSchedule([[0.0] * 3, [0.0, 0.4, 0.9], [0.5, 0.5, 0.9], [1.0] * 3]),
}
SCHEDULES = TWO_GROUPS | THREE_GROUPS
"""One of every kind, for two and for three groups."""


def unequal_spec(groups: int) -> LatentSpec:
    """Groups of 2, 1, 1 channels, so that nothing that confuses groups with channels can pass."""
    return LatentSpec([Group(f"group{g}", 2 if g == 0 else 1, 1.0 + g) for g in range(groups)])
