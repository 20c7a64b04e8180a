"""Training a SemVAE on feature maps, stored or computed as they are needed (Semantic-First Diffusion)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lwd import distributed
from lwd.compute import Precision, autocast
from lwd.data.feature_source import FeatureMaps
from lwd.data.order import BatchOrder
from lwd.encoders.semvae import SemVAE
from lwd.loop import Hook, run_job
from lwd.parallel import adamw, guarded_step, load_network_state, network_state
from lwd.randomness import derived_seed, stream
from lwd.steps import identity_of


class TensorFeatures:
    """Feature maps [N, F, h, w] in memory, as a source to train on."""

    def __init__(self, maps: Tensor) -> None:
        if maps.ndim != 4 or not len(maps):
            raise ValueError(f"feature maps must be [N, F, h, w] with N at least 1, not {tuple(maps.shape)}")
        self.maps, self.width = maps, maps.shape[1]

    def __len__(self) -> int:
        return len(self.maps)

    def gather(self, indices: Tensor) -> Tensor:
        return self.maps[indices].float()


@dataclass(frozen=True)
class SemVAETrainConfig:
    """How a SemVAE is trained; the defaults are the published settings.

    Attributes:
        batch_size: of all processes together.
        lr: of AdamW, times `factor`.
        weight_decay: PyTorch's default, which the published training leaves as it is.
        warmup_steps: steps of linear warm-up, cut to a tenth of a short run.
        constant: share of the steps after which the learning rate decays, along a cosine, to `final` times itself.
        mse, cosine, kl: weights of the losses; see `semvae_loss`.
        validate_every: images between two evaluations on held-out features, where there are any.
    """

    steps: int = 1_000_000
    batch_size: int = 64
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup_steps: int = 500
    constant: float = 0.8
    final: float = 0.1
    mse: float = 1.0
    cosine: float = 1.0
    kl: float = 1e-7
    seed: int = 0
    precision: Precision = "bf16"
    log_every: int = 100
    save_seconds: float = 600.0
    validate_every: int = 128_000

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.constant <= 1:
            raise ValueError(f"steps={self.steps} must be at least 1, and constant={self.constant} between 0 and 1")

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with at `step` (0 first)."""
        warmup = min(self.warmup_steps, self.steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        begin = self.constant * self.steps
        if step < begin:
            return 1.0
        cosine = (1 + math.cos(math.pi * (step - begin) / (self.steps - begin))) / 2
        return self.final + (1 - self.final) * cosine


class SemVAETerms(NamedTuple):
    """The loss and its parts, scalars; only the total is weighted."""

    total: Tensor
    mse: Tensor
    cosine: Tensor
    kl: Tensor


def semvae_loss(recon: Tensor, target: Tensor, mean: Tensor, logvar: Tensor, config: SemVAETrainConfig) -> SemVAETerms:
    """The training loss, in float32.

    `mse` is the mean over everything. `cosine` is one minus the cosine of the angle between the feature vectors of a
    position, its mean over positions and images. `kl` is the divergence of the posterior from the standard normal,
    summed over channels and positions, its mean over images.

    The published training takes the cosine over the tokens instead, one per feature, as the default axis of PyTorch's
    function makes it; its evaluation takes it over the features, as we do throughout.

    Args:
        recon, target: feature maps [N, F, h, w].
        mean, logvar: of the posterior, [N, C, h, w].
    """
    recon, target, mean, logvar = recon.float(), target.float(), mean.float(), logvar.float()
    mse = F.mse_loss(recon, target)
    cosine = 1 - F.cosine_similarity(recon, target, dim=1).mean()
    kl = _divergence(mean, logvar).mean()
    return SemVAETerms(config.mse * mse + config.cosine * cosine + config.kl * kl, mse, cosine, kl)


def _divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over channels and positions, [N]."""
    return (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(dim=1) / 2


@torch.no_grad()
def evaluate_semvae(model: SemVAE, source: FeatureMaps, *, batch_size: int = 64) -> dict[str, float]:
    """How well features survive: decoded from the very latents that `model.transform` gives, image n seeded by n.

    Returns:
        ``mse``, mean over everything; ``cosine_similarity``, mean over positions and images; ``kl``, mean over images;
        ``explained_variance``, the share of the features' variance about their means over all positions that the
        reconstruction explains (1 is perfect, 0 no better than those means).

    Raises:
        ValueError: no features, or features that never vary.
    """
    if not len(source):
        raise ValueError("there are no held-out features to evaluate on")
    width = model.config.features
    total, squares = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
    error = cosine = kl = 0.0
    positions = 0
    for indices in torch.arange(len(source)).split(batch_size):
        maps = source.gather(indices).to(next(model.parameters()))
        mean, logvar = model.moments(maps)
        recon = model.decode(model.draw(mean, logvar, indices.tolist()))
        error += float((recon - maps).square().sum(dtype=torch.float64))
        cosine += float(F.cosine_similarity(recon, maps, dim=1).sum(dtype=torch.float64))
        kl += float(_divergence(mean, logvar).sum(dtype=torch.float64))
        total += maps.sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
        squares += maps.square().sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
        positions += maps[:, 0].numel()
    variation = float((squares - total.square() / positions).sum())
    if variation <= 0:
        raise ValueError("the held-out features never vary; there is nothing to explain")
    return {
        "mse": error / (positions * width),
        "cosine_similarity": cosine / positions,
        "kl": kl / len(source),
        "explained_variance": 1 - error / variation,
    }


def train_semvae(
    model: SemVAE,
    source: FeatureMaps,
    config: SemVAETrainConfig,
    *,
    directory: Path | str | None = None,
    device: torch.device | str = "cpu",
    validation: FeatureMaps | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place on the features of `source`; go on where an interrupted run in `directory` stopped.

    A resumed run takes the very steps the uninterrupted one would have taken: batches and noise are functions of (seed,
    step). Under torchrun, all processes call it and do the same training as one process would.

    Args:
        directory: gets ``checkpoints/``, ``metrics.jsonl``, and the result as ``model/``; None keeps nothing.
        validation: held-out features; what `evaluate_semvae` finds joins the log lines as ``heldout_mse`` and so on,
            every `validate_every` images and at the end.

    Returns:
        The log lines of all steps; the model is left in eval mode.

    Raises:
        ValueError: features of another width than the model's; a checkpoint made with other settings; a batch that the
            processes cannot share evenly.
        NonFiniteLossError: NaN or infinity; the last good checkpoint is kept.
    """
    directory = None if directory is None else Path(directory)
    job = _Training(model.to(device), source, config, torch.device(device))
    hooks = []
    if validation is not None:
        # The last step may be a multiple of `validate_every` too; it is evaluated once.
        measure = lru_cache(maxsize=1)(job.validation(validation))
        hooks = [Hook(images, measure) for images in (config.validate_every, config.steps * config.batch_size)]
    history = run_job(
        job,
        config.steps,
        directory=directory,
        identity={"train": identity_of(config), "model": asdict(model.config), "images": len(source)},
        title="train SemVAE",
        batch_size=config.batch_size,
        log_every=config.log_every,
        save_seconds=config.save_seconds,
        hooks=hooks,
    )
    model.eval()
    if directory is not None:
        if distributed.rank() == 0:
            model.save_pretrained(directory / "model")
        distributed.wait_for_all()
    return history


class _Training:
    """The job of `train_semvae`; see `lwd.loop.Job`."""

    def __init__(self, model: SemVAE, source: FeatureMaps, config: SemVAETrainConfig, device: torch.device) -> None:
        self.model, self.source, self.config, self.device = model.train(), source, config, device
        rank, world, size = distributed.rank(), distributed.world(), config.batch_size
        self.order = BatchOrder(len(source), size, derived_seed(config.seed, "order"), rank=rank, world=world)
        self.part = slice(rank * size // world, (rank + 1) * size // world)
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = model
        if world > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # see lwd.parallel.Trained
                ids = [device.index] if device.type == "cuda" else None
                self.forward = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        self.optimizer = adamw(model.parameters(), device, lr=config.lr, weight_decay=config.weight_decay)
        self.waited = 0.0

    def update(self, step: int) -> dict[str, Tensor]:
        config = self.config
        start = time.perf_counter()
        maps = self.source.gather(self.order.indices(step)).to(self.device, torch.float32, non_blocking=True)
        self.waited += time.perf_counter() - start
        # Every process draws the noise of the whole batch, so that it does not depend on how many there are.
        shape = (config.batch_size, self.model.channels, *maps.shape[2:])
        noise = torch.randn(shape, generator=stream(config.seed, "noise", step, self.device), device=self.device)
        with autocast(config.precision, self.device):
            recon, mean, logvar = self.forward(maps, noise[self.part])
        terms = semvae_loss(recon, maps, mean, logvar, config)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * config.factor(step)
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        norm = guarded_step(self.optimizer)
        metrics = {"loss": terms.total, "mse": terms.mse, "cosine": terms.cosine, "kl": terms.kl}
        return {name: value.detach() for name, value in metrics.items()} | {"gradient_norm": norm}

    def describe(self) -> dict[str, Any]:
        waited, self.waited = self.waited, 0.0
        return {"waited_for_data": waited}

    def explain(self, step: int) -> str:
        indices = self.order.indices(step)
        finite = self.source.gather(indices).isfinite().flatten(1).all(dim=1).cpu()
        if bool(finite.all()):
            return (
                "The features of that batch are finite, so the update diverged: lower the learning rate or use float32."
            )
        return f"The features of images {indices[~finite].tolist()[:8]} are NaN or infinite: compute them again."

    def state_dict(self) -> dict[str, Any]:
        return network_state(self.model, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_network_state(self.model, self.optimizer, state)

    def validation(self, heldout: FeatureMaps) -> Callable[[int], dict[str, Any]]:
        def measure(step: int) -> dict[str, Any]:
            self.model.eval()
            found = evaluate_semvae(self.model, heldout, batch_size=self.config.batch_size)
            self.model.train()
            return {f"heldout_{name}": value for name, value in found.items()}

        return measure
