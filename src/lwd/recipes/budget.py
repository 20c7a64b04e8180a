"""What a recipe costs, on paper: operations, memory, GPU-hours (see `lwd.cost`)."""

from __future__ import annotations

from dataclasses import dataclass

from lwd.cost import (
    FREE_SHARE,
    GIB,
    H100,
    STATE_BYTES,
    TRAINING_FACTOR,
    Card,
    activation_bytes,
    block_flops,
    forward_flops,
    parameter_count,
    state_bytes,
    token_count,
)
from lwd.recipes.base import Recipe


@dataclass(frozen=True)
class Cost:
    """What one recipe costs.

    Attributes:
        parameters: trainable, the REPA projector included.
        denoiser_parameters: without the projector, which sampling does not need.
        forward: operations per image of the denoiser, without the projector.
        training: operations of stage II.
        probe: operations of one probe of stage I; 0 without one.
        sweep: how many probes the recipe's sweep over lambda has.
        batch: the global batch of stage II.
        images, epochs: seen in stage II.
        state: bytes of weights, gradients, optimizer and average; see `lwd.cost.state_bytes`.
        activations: bytes per image; see `lwd.cost.activation_bytes`.
        card: what the hours are of.
    """

    parameters: int
    denoiser_parameters: int
    forward: int
    training: int
    probe: int
    sweep: int
    batch: int
    images: int
    epochs: float
    state: int
    activations: int
    card: Card

    @property
    def training_hours(self) -> float:
        """GPU-hours of stage II."""
        return self.card.hours(self.training)

    @property
    def probe_hours(self) -> float:
        """GPU-hours of one probe."""
        return self.card.hours(self.probe)

    @property
    def sweep_hours(self) -> float:
        """GPU-hours of all probes of the sweep."""
        return self.sweep * self.probe_hours

    def memory(self, batch: int, shards: int = 1) -> int:
        """Bytes on one GPU that takes `batch` images at a time.

        Args:
            shards: processes that FSDP spreads the state over; the bf16 copies are whole on each of them.
        """
        spread = self.parameters * STATE_BYTES
        return spread // shards + (self.state - spread) + batch * self.activations

    def micro_batch(self, memory: int | None = None) -> int:
        """Most images at a time that fit into a GPU, such that they divide the global batch.

        Args:
            memory: bytes of the GPU; the card's by default. A tenth is left free.

        Raises:
            ValueError: not even one image fits.
        """
        available = (self.card.memory if memory is None else memory) * (1 - FREE_SHARE)
        for size in range(self.batch, 0, -1):
            if self.batch % size == 0 and self.memory(size) <= available:
                return size
        raise ValueError(
            f"one image needs {self.memory(1) / GIB:.1f} GiB, of which {self.state / GIB:.1f} GiB are weights, "
            f"gradients, optimizer and average; {available / GIB:.1f} GiB can be used. Shard the model (FSDP), "
            "or take a smaller one"
        )


def cost_of(recipe: Recipe, card: Card = H100, *, recompute: int = 0) -> Cost:
    """What `recipe` costs on `card`, by the formulas of `lwd.cost`.

    Args:
        recompute: blocks that are run again in the backward pass, as `TrainConfig.recompute`: less memory, more work.
    """
    config, train, probe = recipe.backbone, recipe.train, recipe.probe
    repa = train.repa > 0 and config.repa_depth is not None
    forward = forward_flops(config)
    again = recompute * block_flops(config, token_count(config))
    parameters = parameter_count(config)
    return Cost(
        parameters=parameters,
        denoiser_parameters=parameter_count(config, projector=False),
        forward=forward,
        training=recipe.images * (TRAINING_FACTOR * forward_flops(config, projector=repa) + again),
        probe=0 if probe is None else probe.steps * probe.batch_size * TRAINING_FACTOR * forward,
        sweep=0 if probe is None else len(recipe.kinetics),
        batch=train.batch_size,
        images=recipe.images,
        epochs=recipe.epochs,
        state=state_bytes(parameters, train.precision),
        activations=activation_bytes(config, train.precision, projector=repa, recompute=recompute),
        card=card,
    )
