"""The losses of the schedule and of the denoiser (LWD Eq. 22-23, 35-39).

    L_flow  = E_tau [ sum_g w_g sg(t_g') l_g ]                          Eq. 35   `schedule_objective().flow`
    R_kin   = E_tau [ sum_g t_g'^2 ||v_g||^2 / d_g ]                    Eq. 37   `schedule_objective().kinetic`
    L_rho   = L_flow + lambda R_kin                                     Eq. 38   `schedule_objective().total`
    L_theta = L_flow + cosine direction + REPA                          Eq. 39   `denoiser_objective().total`

Two settings decide what "sum over groups" means. ``"global"`` is one mean over all channels and positions,
sum_g w_g d_g l_g / sum_g d_g: what the reference code ran, and why w_sem = 2 there balances 32 against 16 channels
(Appendix B). ``"groups"`` is the sum of per-group means as Eq. 35 and 37 are printed. The flow loss defaults to the
first, the kinetic term, whose reduction the paper leaves open, to the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lwd.interpolant import interpolate, target_velocity
from lwd.latents import LatentSpec
from lwd.schedules import LocalTimes, Schedule

Jacobian = Literal["detached", "exact", "none", "information"]
Reduction = Literal["global", "groups"]
TimeDistribution = Literal["uniform", "logit_normal"]
Repa = Literal["cos", "cos_mse"]

INFORMATION_END = 0.95
"""The local time from which on the weight t / (1 - t) of information stays at its value of 19.

Beyond it, little but noise of the input is left to predict, at a weight without bound. The price is that the
irreducible loss does depend on the schedule a little: on power-law Gaussian data by 0.03 % among convex curves and
0.3 % among all, where that of Eq. 36 does by 9 % and 19 %.
"""


class Denoiser(Protocol):
    """Anything that maps (z [B, C, H, W], t [B, G], labels [B]) to local velocities [B, C, H, W]."""

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor, /) -> Tensor: ...


class ProjectingDenoiser(Protocol):
    """A denoiser that also gives its projected hidden tokens [B, N, F] for REPA."""

    def __call__(
        self, z: Tensor, t: Tensor, labels: Tensor, /, *, return_projection: bool
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ScheduleTerms:
    """Terms of L_rho: scalars, differentiable in the denoiser and in the schedule's parameters.

    `per_group` [B, G] holds l_g of every sample (Eq. 22-23), unweighted; `kinetic` is R_kin without lambda.
    """

    total: Tensor
    flow: Tensor
    kinetic: Tensor
    per_group: Tensor


@dataclass(frozen=True)
class DenoiserTerms:
    """Terms of L_theta: scalars before their weights, and l_g of every sample in `per_group` [B, G]."""

    total: Tensor
    flow: Tensor
    cosine: Tensor
    repa: Tensor
    per_group: Tensor


def schedule_objective(
    denoiser: Denoiser,
    schedule: Schedule,
    spec: LatentSpec,
    x0: Tensor,
    x1: Tensor,
    labels: Tensor,
    tau: Tensor,
    *,
    kinetic: float = 0.04,
    jacobian: Jacobian = "detached",
    reduction: Reduction = "global",
    kinetic_reduction: Reduction = "groups",
) -> ScheduleTerms:
    """L_rho = L_flow + lambda R_kin (Eq. 38), for one batch.

    Args:
        denoiser: (z, t, labels) -> local velocities.
        schedule: gives t(tau) and t'(tau); its gradient flows through both.
        x0, x1: noise and data latents, [B, C, H, W].
        labels: [B]; passed on to the denoiser.
        tau: global times [B], uniform in [0, 1] for the corrected loss of Lemma 3.3; [B, G] for `IndependentTimes`.
        kinetic: lambda.
        jacobian: the factor t_g' of Eq. 35. ``"detached"`` as in the paper: it corrects the weighting but sends no
            gradient to the schedule. ``"exact"``: differentiated too, which makes the gradient that of the
            local-time form, Eq. 36; a different estimator, not a refinement. ``"none"``: uncorrected.
            ``"information"``: differentiated, times `information_weight`, without the groups' weights. The irreducible
            loss is then the same for all schedules (I-MMSE, Guo et al. 2005), and rho follows the denoiser's own error
            alone; for that, leave `reduction` at ``"global"``, which counts every dimension once.
        reduction, kinetic_reduction: how groups are summed, see the module's docstring.

    Raises:
        ValueError: tensors, schedule and spec that do not match, or an unknown choice.
    """
    _check_choice("jacobian", jacobian, Jacobian)
    times = schedule(tau)
    velocity = _checked_velocity(denoiser(interpolate(x0, x1, times.t, spec), times.t, labels), x1)
    per_group = spec.group_mean((velocity - target_velocity(x0, x1)) ** 2)
    flow = _flow_loss(per_group, times, spec, jacobian, reduction)
    speed = times.dt**2 * spec.group_mean(velocity**2)
    r_kin = (speed * _group_factors(spec, kinetic_reduction, speed)).sum(dim=1).mean()
    return ScheduleTerms(flow + kinetic * r_kin, flow, r_kin, per_group)


def denoiser_objective(
    denoiser: Denoiser | ProjectingDenoiser,
    schedule: Schedule,
    spec: LatentSpec,
    x0: Tensor,
    x1: Tensor,
    labels: Tensor,
    tau: Tensor,
    *,
    features: Tensor | None = None,
    cosine: float = 1.0,
    repa: float = 1.0,
    repa_loss: Repa = "cos",
    jacobian: Jacobian = "detached",
    reduction: Reduction = "global",
) -> DenoiserTerms:
    """L_theta (Eq. 39): corrected flow loss, cosine direction of the whole composite velocity, REPA alignment.

    Args:
        features: clean-image features for REPA, [B, F, h, w] or [B, N, F]; without them the REPA term is 0.
        cosine, repa: weights of the two auxiliary terms (1 and 1 in the paper).
        repa_loss: ``"cos"`` as in the paper, or ``"cos_mse"``, the mean of cosine and squared error.
        jacobian: ``"detached"`` for the corrected loss; ``"none"`` is SFD's own uncorrected loss, in which the
            error of a resting group still counts; ``"information"`` weighs errors by information.

    Other arguments and errors as `schedule_objective`.
    """
    _check_choice("jacobian", jacobian, Jacobian)
    _check_choice("repa_loss", repa_loss, Repa)
    wants_projection = features is not None and repa > 0
    times = schedule(tau)
    z, u = interpolate(x0, x1, times.t, spec), target_velocity(x0, x1)
    if wants_projection:
        velocity, tokens = cast(ProjectingDenoiser, denoiser)(z, times.t, labels, return_projection=True)
    else:
        velocity = cast(Denoiser, denoiser)(z, times.t, labels)
    velocity = _checked_velocity(velocity, x1)
    per_group = spec.group_mean((velocity - u) ** 2)
    flow = _flow_loss(per_group, times, spec, jacobian, reduction)
    direction = (1 - F.cosine_similarity(velocity, u, dim=1)).mean()
    alignment = flow.new_zeros(())
    if wants_projection:
        assert features is not None
        alignment = repa_alignment(tokens, features, repa_loss)
    return DenoiserTerms(flow + cosine * direction + repa * alignment, flow, direction, alignment, per_group)


def repa_alignment(tokens: Tensor, features: Tensor, loss: Repa = "cos") -> Tensor:
    """1 - cos(projected tokens, features) over the feature axis, averaged (REPA, Yu et al. 2025).

    Args:
        tokens: projected hidden states, [B, N, F].
        features: [B, F, h, w] with h w = N, or [B, N, F].
    """
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    if features.shape != tokens.shape:
        raise ValueError(f"REPA features {tuple(features.shape)} do not match projected tokens {tuple(tokens.shape)}")
    tokens, features = tokens.float(), features.float()
    cos = (1 - F.cosine_similarity(tokens, features, dim=-1)).mean()
    return cos if loss == "cos" else (cos + F.mse_loss(tokens, features)) / 2


def sample_tau(
    batch: int,
    distribution: TimeDistribution = "uniform",
    *,
    clocks: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Global times [B]: uniform, or logit-normal(0, 1) as in SFD's and LightningDiT's training.

    Args:
        clocks: `Schedule.clocks`; for more than one, times [B, clocks], independent of one another.
    """
    _check_choice("distribution", distribution, TimeDistribution)
    shape = (batch,) if clocks == 1 else (batch, clocks)
    if distribution == "uniform":
        return torch.rand(shape, generator=generator, device=device)
    return torch.randn(shape, generator=generator, device=device).sigmoid()


def _checked_velocity(velocity: Tensor, like: Tensor) -> Tensor:
    """In float32 (or float64) whatever precision the network ran in; a wrong shape must not broadcast."""
    if velocity.shape != like.shape:
        raise ValueError(f"the denoiser returned {tuple(velocity.shape)} for a state of {tuple(like.shape)}")
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def information_weight(t: Tensor) -> Tensor:
    """t / (1 - t), the nats that a unit of the error l_g is worth per local time, bounded from `INFORMATION_END` on.

    Because 1/2 mmse_g d(snr_g) = t_g / (1 - t_g) l_g dt_g with snr_g = t_g^2 / (1 - t_g)^2.
    """
    t = t.clamp(max=INFORMATION_END)
    return t / (1 - t)


def _flow_loss(
    per_group: Tensor, times: LocalTimes, spec: LatentSpec, jacobian: Jacobian, reduction: Reduction
) -> Tensor:
    """Eq. 35 for l_g [B, G]."""
    weights = _group_factors(spec, reduction, per_group)
    if jacobian == "information":
        weights = weights * information_weight(times.t) * times.dt
    else:
        weights = weights * spec.weights(per_group)
        if jacobian != "none":
            weights = weights * (times.dt.detach() if jacobian == "detached" else times.dt)
    return (weights * per_group).sum(dim=1).mean()


def _group_factors(spec: LatentSpec, reduction: Reduction, like: Tensor) -> Tensor:
    """[G]: what a per-group mean is multiplied with to make the sum over groups."""
    _check_choice("reduction", reduction, Reduction)
    return spec.shares(like) if reduction == "global" else like.new_ones(len(spec))


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, get_args(choices)))}")
