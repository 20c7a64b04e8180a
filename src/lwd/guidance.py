"""Guidance: two denoisers combined into one, which is again a denoiser.

    v = v_weak + w (v_main - v_weak)

AutoGuidance (Karras et al. 2024) takes as weak model a smaller one trained on the same schedule; classifier-free
guidance (Ho & Salimans 2022) takes the same model without its label, if wanted only in an interval of local time
(Kynkaanniemi et al. 2024). The scale w may differ per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwd.latents import LatentSpec, resolve_spec
from lwd.objective import Denoiser

Scale = float | Sequence[float]
Interval = tuple[float, float]


class AutoGuidance:
    """v_weak + w (v_main - v_weak), same label for both (LWD section 4.1, SFD).

    Args:
        main: the denoiser to guide.
        weak: a worse denoiser of the same latents, trained on the same schedule.
        scale: w, one number or one per group; 1 is `main` alone.
        interval: local times [from, to] in which a group is guided; elsewhere it follows `main`.
        spec: the latent groups; by default those of `main`.
    """

    def __init__(
        self,
        main: Denoiser,
        weak: Denoiser,
        scale: Scale,
        *,
        interval: Interval | None = None,
        spec: LatentSpec | None = None,
    ) -> None:
        self.main, self.weak = main, weak
        self.scale, self.interval = _checked_scale(scale), _checked_interval(interval)
        self.spec = spec if spec is not None else getattr(main, "spec", None)
        weak_spec = getattr(weak, "spec", None)
        if self.spec is not None and weak_spec is not None and weak_spec.sizes != self.spec.sizes:
            raise ValueError(
                f"the weak model denoises groups of {weak_spec.sizes} channels, the main one {self.spec.sizes}"
            )

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        v_main = self.main(z, t, labels)
        w = _effective_scale(self.scale, self.interval, t, v_main.dtype)
        if w is None:
            return v_main
        v_weak = self.weak(z, t, labels).to(v_main.dtype)
        return torch.lerp(v_weak, v_main, _per_channel(w, self, z, t))


class ClassifierFreeGuidance:
    """v_null + w (v_label - v_null), with and without label in one batch.

    Args:
        model: a denoiser trained with label dropout.
        scale: w, one number or one per group; 1 is the conditional model alone.
        null_label: the label that stands for "no label"; a LightningDiT's `null_label`.
        interval: local times [from, to] in which a group is guided.
        spec: the latent groups; by default those of `model`.
    """

    def __init__(
        self,
        model: Denoiser,
        scale: Scale,
        null_label: int,
        interval: Interval | None = None,
        *,
        spec: LatentSpec | None = None,
    ) -> None:
        self.model, self.null_label = model, null_label
        self.scale, self.interval = _checked_scale(scale), _checked_interval(interval)
        self.spec = spec if spec is not None else getattr(model, "spec", None)

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        w = _effective_scale(self.scale, self.interval, t, z.dtype)
        if w is None:
            return self.model(z, t, labels)
        null = torch.full_like(labels, self.null_label)
        v_label, v_null = self.model(z.repeat(2, 1, 1, 1), t.repeat(2, 1), torch.cat([labels, null])).chunk(2)
        return torch.lerp(v_null, v_label, _per_channel(w, self, z, t).to(v_null.dtype))


def _effective_scale(
    scale: tuple[float, ...], interval: Interval | None, t: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """w for every sample and group, [B, G]; None where nothing is guided, so that one evaluation is enough."""
    if len(scale) not in (1, t.shape[1]):
        raise ValueError(f"{len(scale)} guidance scales for {t.shape[1]} groups; give one, or one per group")
    if all(w == 1 for w in scale):
        return None
    w = t.new_tensor(scale).expand_as(t)
    if interval is not None:
        guided = (t >= interval[0]) & (t <= interval[1])
        if not guided.any():
            return None
        w = torch.where(guided, w, 1.0)
    return w.to(dtype)


def _per_channel(w: Tensor, guidance: AutoGuidance | ClassifierFreeGuidance, z: Tensor, t: Tensor) -> Tensor:
    """[B, C, 1, 1]. One shared scale needs no knowledge of the groups."""
    if len(guidance.scale) == 1 and guidance.interval is None:
        return w[:, :1, None, None]
    return resolve_spec(guidance.spec, None, z.shape[1], t.shape[1]).expand(w)


def _checked_scale(scale: Scale) -> tuple[float, ...]:
    values = tuple(torch.as_tensor(scale, dtype=torch.float64).flatten().tolist())
    if not values or not all(abs(w) < float("inf") for w in values):
        raise ValueError(f"guidance scale must be finite, not {scale}")
    return values


def _checked_interval(interval: Interval | None) -> Interval | None:
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance interval {interval} must satisfy 0 <= from < to <= 1 (local time)")
    return interval
