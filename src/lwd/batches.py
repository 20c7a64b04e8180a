"""Training batches as a pure function of the step, on any number of processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lwd import distributed
from lwd.data.dataset import LatentDataset
from lwd.data.loader import BatchLoader
from lwd.data.memory import Batch
from lwd.data.order import BatchOrder
from lwd.latents import LatentSpec, Normalization
from lwd.objective import TimeDistribution, sample_tau
from lwd.randomness import derived_seed, stream


class LatentSource(Protocol):
    """Where batches come from; `lwd.data.LatentDataset` is one."""

    spec: LatentSpec
    normalization: Normalization

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor, flip: Tensor | None = None) -> Batch: ...


class BatchConfig(Protocol):
    """The settings that decide what a batch is; `TrainConfig` and `ProbeConfig` have them."""

    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def label_dropout(self) -> float: ...
    @property
    def flips(self) -> bool: ...
    @property
    def accumulate(self) -> int: ...


@dataclass(frozen=True)
class TrainingBatch:
    """Everything one step needs, on the device."""

    x0: Tensor
    x1: Tensor
    labels: Tensor
    tau: Tensor
    features: Tensor | None

    def parts(self, count: int) -> Iterator[TrainingBatch]:
        """The batch in `count` equal parts, for gradient accumulation."""
        features = [None] * count if self.features is None else self.features.chunk(count)
        tensors = (tensor.chunk(count) for tensor in (self.x0, self.x1, self.labels, self.tau))
        return (TrainingBatch(*parts) for parts in zip(*tensors, features, strict=True))


class Batches:
    """The batches of a run: data order, flips, noise, times and label dropout.

    Every process draws the noise, times and dropout of the whole batch and keeps its part. So the same seed gives the
    same training on any number of processes, whatever they are.

    Attributes:
        waited: seconds spent waiting for data so far.

    Raises:
        ValueError: a batch that the processes, or the steps of accumulation, cannot share evenly; label dropout
            without a null label.
    """

    def __init__(self, data: LatentSource, config: BatchConfig, denoiser: nn.Module, device: torch.device) -> None:
        self.data, self.seed, self.device, self.flips = data, config.seed, device, config.flips
        rank, world = distributed.rank(), distributed.world()
        if config.batch_size % (world * config.accumulate):
            raise ValueError(
                f"a batch of {config.batch_size} cannot be shared evenly by {world} processes in {config.accumulate} "
                "parts each: the batch is the recipe's, so choose numbers whose product divides it"
            )
        order_seed = derived_seed(config.seed, "order")
        self.order = BatchOrder(len(data), config.batch_size, order_seed, rank=rank, world=world)
        self.part = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)
        self.batch_size, self.label_dropout = config.batch_size, config.label_dropout
        self.null_label = getattr(denoiser, "null_label", None)
        if self.label_dropout > 0 and self.null_label is None:
            raise ValueError("label dropout needs a denoiser with a `null_label`; set label_dropout=0 to train without")
        # A set on disk is read ahead.
        self.loader = None
        if isinstance(data, LatentDataset):
            self.loader = BatchLoader(data, self.order, device, flips=self.flips)
        self.waited = 0.0

    def draw(self, step: int, distribution: TimeDistribution = "uniform", clocks: int = 1) -> TrainingBatch:
        """This process's part of the batch of `step`; `clocks` as in `sample_tau`."""
        start = time.perf_counter()
        if self.loader is not None:
            batch = self.loader.get(step)
        else:
            flip = self.order.flips(step) if self.flips else None
            batch = self.data.gather(self.order.indices(step), flip)
        x1 = batch.latents.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        features = None if batch.features is None else batch.features.to(self.device, non_blocking=True)
        self.waited += time.perf_counter() - start
        generator = stream(self.seed, "noise", step, self.device)
        x0 = torch.randn((self.batch_size, *x1.shape[1:]), generator=generator, device=self.device)[self.part]
        tau = sample_tau(self.batch_size, distribution, clocks=clocks, generator=generator, device=self.device)
        tau = tau[self.part]
        if self.label_dropout > 0:
            chance = torch.rand(self.batch_size, generator=generator, device=self.device)[self.part]
            labels = torch.where(chance < self.label_dropout, cast(int, self.null_label), labels)
        return TrainingBatch(x0, x1, labels, tau, features)

    def explain(self, step: int) -> str:
        """Whether the data of `step` is to blame for a loss that is not finite."""
        indices = self.order.indices(step)
        finite = self.data.gather(indices).latents.isfinite().flatten(1).all(dim=1)
        if bool(finite.all()):
            return (
                "The latents of that batch are finite, so the update diverged: lower the learning rate or use float32."
            )
        return f"The latents of images {indices[~finite.cpu()].tolist()[:8]} are NaN or infinite: encode them again."
