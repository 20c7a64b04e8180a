"""The errors of a denoiser at all combinations of local times, and what a schedule through them costs.

A denoiser that was trained on independent times (`lwd.IndependentTimes`) knows every state of the cube of local times.
Once its errors l_g (Eq. 22-23) and speeds are measured on a grid, the objective of the probe is known for every
schedule,

    cost = integral [ sum_g W(t_g) l_g t_g' + lambda sum_g t_g'^2 ||v_g||^2 / d_g ] d tau,

and can be minimised without training anything: `lwd.paths`. With W(t) = t / (1 - t), the irreducible part of the first
sum is the same for every schedule, so that schedules differ by what the denoiser does worse than an exact one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwd.batches import LatentSource
from lwd.files import write_atomically
from lwd.interpolant import interpolate, target_velocity
from lwd.latents import LatentSpec
from lwd.objective import Denoiser, information_weight
from lwd.progress import Progress
from lwd.randomness import stream
from lwd.schedules import Schedule

FORMAT = "lwd-surface/1"
Weights = Literal["information", "uniform"]


@dataclass(frozen=True)
class ErrorSurface:
    """Errors and speeds at the nodes of a grid over the cube of local times.

    Attributes:
        spec: the groups.
        times: the nodes, [K] float64 from 0 to 1, the same for every group.
        errors: l_g at every node, [K, ..., K, G]; axis g is the local time of group g.
        speeds: ||v_g||^2 / d_g there.
        about: how it was measured, as JSON.
    """

    spec: LatentSpec
    times: Tensor
    errors: Tensor
    speeds: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.times),) * len(self.spec) + (len(self.spec),)
        if self.errors.shape != shape or self.speeds.shape != shape:
            raise ValueError(
                f"{len(self.times)} times of {len(self.spec)} groups need errors and speeds of shape {shape}, not "
                f"{tuple(self.errors.shape)} and {tuple(self.speeds.shape)}"
            )

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Errors and speeds, [P, G] each, at local times `t` [P, G]: multilinear between nodes, differentiable in t."""
        groups, place = len(self.spec), t * (len(self.times) - 1)
        low = place.detach().floor().long().clamp(0, len(self.times) - 2)
        share = place - low
        table = torch.cat([self.errors, self.speeds], dim=-1).to(t)
        found = t.new_zeros(len(t), 2 * groups)
        for corner in product((0, 1), repeat=groups):
            up = torch.tensor(corner, device=t.device)
            weight = torch.where(up == 1, share, 1 - share).prod(dim=1, keepdim=True)
            found = found + weight * table[tuple((low + up).unbind(dim=1))]
        return found[:, :groups], found[:, groups:]

    def density(self, t: Tensor, dt: Tensor, *, kinetic: float = 0.0, weights: Weights = "information") -> Tensor:
        """The integrand of the cost, [P], at local times `t` [P, G] passed at the speed `dt` [P, G].

        Args:
            kinetic: lambda.
            weights: of the errors: ``"information"`` as `schedule_objective` has them under that name, or
                ``"uniform"``: those of Eq. 36, with the groups' weights.
        """
        errors, speeds = self.at(t)
        shares = self.spec.shares(t)
        if weights == "information":
            shares = shares * information_weight(t)
        elif weights == "uniform":
            shares = shares * self.spec.weights(t)
        else:
            raise ValueError(f"weights are one of {', '.join(get_args(Weights))}, not {weights!r}")
        return (shares * errors * dt + kinetic * dt.square() * speeds).sum(dim=1)

    def cost(
        self, schedule: Schedule, *, kinetic: float = 0.0, weights: Weights = "information", points: int = 512
    ) -> Tensor:
        """What `schedule` costs, a scalar that is differentiable in its parameters; by the midpoint rule.

        Raises:
            ValueError: the schedule is of other groups.
        """
        if schedule.names != self.spec.names:
            raise ValueError(f"the schedule is of the groups {schedule.names}, the surface of {self.spec.names}")
        tau = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        times = schedule(tau)
        return self.density(times.t, times.dt, kinetic=kinetic, weights=weights).mean()

    def save(self, path: str | Path) -> Path:
        """Write everything into one safetensors file, atomically."""
        tensors = {name: getattr(self, name).contiguous() for name in ("times", "errors", "speeds")}
        about = {"format": FORMAT, "groups": self.spec.to_dict(), "about": dict(self.about)}
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is something else, or damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no error surface {path}; `lwd path` measures one")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in ("times", "errors", "speeds")}
            return cls(
                LatentSpec.from_dict(json.loads(metadata["groups"])), **tensors, about=json.loads(metadata["about"])
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not an error surface or is damaged ({error}); measure it again") from error


@torch.no_grad()
def measure_surface(
    denoiser: Denoiser,
    data: LatentSource,
    *,
    points: int = 25,
    images: int = 256,
    batch: int = 128,
    device: torch.device | str = "cpu",
    about: Mapping[str, Any] | None = None,
) -> ErrorSurface:
    """Measure a denoiser at all nodes, with the same images and the same noise at each.

    Args:
        denoiser: in eval mode; (z, t, labels) -> local velocities.
        data: held-out latents, normalised as those it was trained on.
        points: K, nodes per group; the denoiser is evaluated K^G times for every image.
        images: how many, drawn at random, but always the same: sets are often sorted by class.
        about: kept with the surface.

    Raises:
        ValueError: fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"a surface needs at least 2 points per group, not {points}")
    chosen = torch.randperm(len(data), generator=stream(0, "held-out images"))[:images]
    spec, images = data.spec, len(chosen)
    times = torch.linspace(0, 1, points, dtype=torch.float64)
    nodes = list(product(range(points), repeat=len(spec)))
    sums = torch.zeros(len(nodes), 2, len(spec), dtype=torch.float64)
    with Progress("error surface", images * len(nodes), unit="evaluation") as progress:
        for start in range(0, images, batch):
            drawn = data.gather(chosen[start : start + batch])
            x1, labels = drawn.latents.to(device), drawn.labels.to(device)
            x0 = torch.randn(x1.shape, generator=stream(0, "surface", start, torch.device(device)), device=device)
            u = target_velocity(x0, x1)
            for number, node in enumerate(nodes):
                t = times[list(node)].to(x1).expand(len(x1), -1)
                velocity = denoiser(interpolate(x0, x1, t, spec), t, labels).float()
                found = torch.stack([spec.group_mean((velocity - u) ** 2), spec.group_mean(velocity**2)])
                sums[number] += found.double().sum(dim=1).cpu()
                progress.advance(len(x1))
    means = (sums / images).unflatten(0, (points,) * len(spec))
    return ErrorSurface(spec, times, means[..., 0, :], means[..., 1, :], {"images": images, **(about or {})})
