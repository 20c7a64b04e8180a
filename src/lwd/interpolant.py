"""The asynchronous path from noise to data, each group at its own local time (LWD Eq. 4-11)."""

from __future__ import annotations

from torch import Tensor

from lwd.latents import LatentSpec


def interpolate(x0: Tensor, x1: Tensor, t: Tensor, spec: LatentSpec) -> Tensor:
    """The asynchronous state z of Eq. 5: x_g(t_g) = (1 - t_g) x0_g + t_g x1_g for every group g.

    Args:
        x0: noise, [B, C, H, W].
        x1: data latents, [B, C, H, W].
        t: local times, [B, G].
        spec: which channels belong to which group.

    Raises:
        ValueError: shapes that do not match `spec` or each other.
    """
    spec.check(x1, "x1")
    if x0.shape != x1.shape:
        raise ValueError(f"noise x0 has shape {tuple(x0.shape)}, data x1 {tuple(x1.shape)}; they must agree")
    if t.shape != (len(x1), len(spec)):
        raise ValueError(f"local times have shape {tuple(t.shape)}, expected [{len(x1)}, {len(spec)}]")
    t = spec.expand(t)
    return (1 - t) * x0 + t * x1


def target_velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """The sample's local velocity u_g = x1_g - x0_g (Eq. 4), in local time and so the same for all groups; all of them
    [B, C, H, W]."""
    return x1 - x0


def global_velocity(velocity: Tensor, dt: Tensor, spec: LatentSpec) -> Tensor:
    """Local velocities [B, C, H, W] and speeds dt = t' [B, G] to the velocity [B, C, H, W] of the state in global time,
    V_g = t_g' v_g (Eq. 11, 13)."""
    return spec.expand(dt) * velocity
