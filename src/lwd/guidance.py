"""Guidance: two denoisers combined into one, which is again a denoiser.

    v = v_weak + w (v_main - v_weak)

AutoGuidance (Karras et al. 2024) takes as weak model a smaller one trained on the same schedule; classifier-free
guidance (Ho & Salimans 2022) takes the same model without its label, if wanted only in an interval of local time
(Kynkaanniemi et al. 2024). The scale w may differ per group, and may vary along global time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lwd.latents import LatentSpec, resolve_spec
from lwd.objective import Denoiser

Interval = tuple[float, float]


class ScaleCurve:
    """A guidance scale that varies along global time: straight lines between knots, flat before and after them.

    Args:
        tau: global times of the knots, increasing, in [0, 1].
        scale: w at the knots: a number each, or one per group each.

    Raises:
        ValueError: times that do not increase within [0, 1]; another number of scales than of times.
    """

    def __init__(self, tau: Sequence[float], scale: Sequence[float] | Sequence[Sequence[float]]) -> None:
        values = torch.as_tensor(scale, dtype=torch.float64)
        self.tau = torch.as_tensor(tau, dtype=torch.float64)
        self.scale = values[:, None] if values.ndim == 1 else values
        rising = bool((self.tau.diff() > 0).all()) and bool(((self.tau >= 0) & (self.tau <= 1)).all())
        if self.tau.ndim != 1 or not len(self.tau) or not rising:
            raise ValueError(f"the knots of a guidance scale are global times that increase within [0, 1], not {tau}")
        if self.scale.ndim != 2 or len(self.scale) != len(self.tau) or not self.scale.isfinite().all():
            raise ValueError(f"{len(self.tau)} knots need as many finite guidance scales, not {scale}")

    def __call__(self, tau: Tensor) -> Tensor:
        """w at `tau` [B]: [B, 1], or [B, G] where it was given per group."""
        knots, scale = self.tau.to(tau), self.scale.to(tau)
        right = torch.searchsorted(knots, tau.contiguous()).clamp(1, max(1, len(knots) - 1))
        left, right = right - 1, right.clamp(max=len(knots) - 1)
        width = (knots[right] - knots[left]).clamp(min=torch.finfo(tau.dtype).tiny)
        share = ((tau - knots[left]) / width).clamp(0, 1)[:, None]
        return torch.lerp(scale[left], scale[right], share)

    def to_dict(self) -> dict[str, Any]:
        scale = self.scale[:, 0] if self.scale.shape[1] == 1 else self.scale
        return {"tau": self.tau.tolist(), "scale": scale.tolist()}


Scale = float | Sequence[float] | ScaleCurve


class _Guidance:
    """What both kinds share: how much each group of each image is guided.

    Attributes:
        needs_tau: whether the scale varies along global time; a sampler then passes it.
    """

    def __init__(self, scale: Scale, interval: Interval | Sequence[Interval] | None, spec: LatentSpec | None) -> None:
        self.scale, self.interval, self.spec = _checked_scale(scale), _checked_interval(interval), spec
        self.needs_tau = isinstance(self.scale, ScaleCurve)

    def weight(self, z: Tensor, t: Tensor, tau: Tensor | None) -> Tensor | float | None:
        """w, [B, 1 or C, 1, 1], or one number; None where nothing is guided, so that one evaluation is enough."""
        if isinstance(self.scale, ScaleCurve):
            if tau is None:
                raise ValueError("this guidance scale varies along global time: call it with tau=, as `sample` does")
            w = self.scale(tau).to(t.dtype)
        elif all(w == 1 for w in self.scale):
            return None
        elif len(self.scale) == 1 and self.interval is None:
            return self.scale[0]  # no tensor: a GPU would wait for its copy in every evaluation
        else:
            w = t.new_tensor(self.scale)[None]
        if w.shape[1] not in (1, t.shape[1]):
            raise ValueError(f"{w.shape[1]} guidance scales for {t.shape[1]} groups; give one, or one per group")
        if self.interval is not None:
            if len(self.interval) not in (1, t.shape[1]):
                raise ValueError(f"{len(self.interval)} intervals for {t.shape[1]} groups; give one, or one per group")
            start, end = t.new_tensor(self.interval).T
            w = torch.where((t >= start) & (t <= end), w, 1.0)
        # A constant scale is never 1 everywhere; looking costs the device a synchronisation, which saves a network.
        if (self.interval is not None or self.needs_tau) and bool((w == 1).all()):
            return None
        w = w.to(z.dtype).expand(len(z), -1)
        # One shared scale needs no knowledge of the groups.
        return w[:, :, None, None] if w.shape[1] == 1 else self._spec(z, t).expand(w)

    def _spec(self, z: Tensor, t: Tensor) -> LatentSpec:
        return resolve_spec(self.spec, None, z.shape[1], t.shape[1])


class AutoGuidance(_Guidance):
    """v_weak + w (v_main - v_weak), same label for both (LWD section 4.1, SFD).

    Args:
        main: the denoiser to guide.
        weak: a worse denoiser of the same latents, trained on the same schedule.
        scale: w, one number, one per group, or a `ScaleCurve`; 1 is `main` alone.
        interval: local times [from, to] in which a group is guided, one for all groups or one per group; elsewhere it
            follows `main`.
        spec: the latent groups; by default those of `main`.

    Raises:
        ValueError: a scale that is not finite, an interval that is not 0 <= from < to <= 1, models of other groups;
            when called, another number of scales or intervals than of groups.
    """

    def __init__(
        self,
        main: Denoiser,
        weak: Denoiser,
        scale: Scale,
        *,
        interval: Interval | Sequence[Interval] | None = None,
        spec: LatentSpec | None = None,
    ) -> None:
        super().__init__(scale, interval, spec if spec is not None else getattr(main, "spec", None))
        self.main, self.weak = main, weak
        weak_spec = getattr(weak, "spec", None)
        if self.spec is not None and weak_spec is not None and weak_spec.sizes != self.spec.sizes:
            raise ValueError(
                f"the weak model denoises groups of {weak_spec.sizes} channels, the main one {self.spec.sizes}"
            )

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor, tau: Tensor | None = None) -> Tensor:
        v_main = self.main(z, t, labels)
        w = self.weight(v_main, t, tau)
        return v_main if w is None else torch.lerp(self.weak(z, t, labels).to(v_main.dtype), v_main, w)


class ClassifierFreeGuidance(_Guidance):
    """v_null + w (v_label - v_null), with and without label in one batch.

    Args:
        model: a denoiser trained with label dropout.
        scale: w, one number, one per group, or a `ScaleCurve`; 1 is the conditional model alone.
        null_label: the label that stands for "no label"; a LightningDiT's `null_label`.
        interval: local times [from, to] in which a group is guided, one for all groups or one per group.
        spec: the latent groups; by default those of `model`.

    Raises:
        ValueError: as `AutoGuidance`.
    """

    def __init__(
        self,
        model: Denoiser,
        scale: Scale,
        null_label: int,
        interval: Interval | Sequence[Interval] | None = None,
        *,
        spec: LatentSpec | None = None,
    ) -> None:
        super().__init__(scale, interval, spec if spec is not None else getattr(model, "spec", None))
        self.model, self.null_label = model, null_label

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor, tau: Tensor | None = None) -> Tensor:
        w = self.weight(z, t, tau)
        if w is None:
            return self.model(z, t, labels)
        null = torch.full_like(labels, self.null_label)
        v_label, v_null = self.model(z.repeat(2, 1, 1, 1), t.repeat(2, 1), torch.cat([labels, null])).chunk(2)
        return torch.lerp(v_null, v_label, w.to(v_null.dtype) if isinstance(w, Tensor) else w)


def _checked_scale(scale: Scale) -> tuple[float, ...] | ScaleCurve:
    if isinstance(scale, ScaleCurve):
        return scale
    values = tuple(torch.as_tensor(scale, dtype=torch.float64).flatten().tolist())
    if not values or not all(abs(w) < float("inf") for w in values):
        raise ValueError(f"guidance scale must be finite, not {scale}")
    return values


def _checked_interval(interval: Interval | Sequence[Interval] | None) -> tuple[Interval, ...] | None:
    if interval is None:
        return None
    intervals = cast(Sequence[Interval], interval if isinstance(interval[0], Sequence) else (interval,))
    for pair in intervals:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= 1:
            raise ValueError(f"guidance interval {tuple(pair)} must satisfy 0 <= from < to <= 1 (local time)")
    return tuple((float(start), float(end)) for start, end in intervals)
