"""`lwd semvae`: the semantic encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


def semvae(
    out: Path,
    latents: Path | None = None,
    data: str | None = None,
    split: str | None = None,
    features: str | None = None,
    channels: int = 16,
    steps: int = 1_000_000,
    batch: int = 64,
    heldout: int = 500,
    size: int = 256,
    grid: int | None = None,
    workers: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["float32", "bf16"] | None = None,
) -> None:
    """Train a SemVAE, the semantic encoder, on features stored in a latent set or computed from images.

    The defaults are the published settings. Interrupted, the same command goes on, step for step.

    Args:
        out: directory of the run; the result is model/ in it, for `lwd encode --semantic semvae:...`.
        latents: latent set with REPA features (`lwd encode --repa`), to train on those.
        data: or images, as `lwd encode` takes them, with the --features to compute.
        split: of a Hugging Face data set: which part of it.
        features: feature network, as `lwd encode` takes it.
        channels: of the semantic group.
        steps: of training; the learning rate is constant for 80 % of them and decays then.
        batch: images per step.
        heldout: images kept from training, to measure the reconstruction with.
        size: pixels per side of the images.
        grid: positions per side of the features.
        workers: threads that read images.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        precision: of the training; by default bf16 where the hardware has it.
    """
    import torch

    from lwd import distributed
    from lwd.data.feature_source import ImageFeatures, StoredFeatures, hold_out
    from lwd.data.images import open_images
    from lwd.data.reading import Reading
    from lwd.encoders.choose import feature_network
    from lwd.encoders.semvae import SemVAE, SemVAEConfig
    from lwd.encoders.semvae_training import SemVAETrainConfig, train_semvae
    from lwd.machine import default_precision, own_device
    from lwd.randomness import derived_seed
    from lwd.runs import write_run_config

    with distributed.joined():
        where = own_device(device)
        if (latents is None) == (data is None):
            raise ValueError("give either --latents, a set with stored features, or --data with --features")
        if latents is not None:
            source: Any = StoredFeatures(latents)
        else:
            if features is None or data is None:
                raise ValueError("--data needs --features: the network whose features the SemVAE compresses")
            network = feature_network(features, grid=grid, device=where)
            source = ImageFeatures(open_images(data, split=split), network, Reading(size, batch=batch, workers=workers))
        training, validation = hold_out(source, heldout, seed)
        config = SemVAETrainConfig(
            steps=steps, batch_size=batch, seed=seed, precision=precision or default_precision(where)
        )
        torch.manual_seed(derived_seed(seed, "semvae weights"))
        model = SemVAE(SemVAEConfig(features=source.width, channels=channels))
        write_run_config(out, where, train=config, model=model.config, images=len(training), heldout=len(validation))
        history = train_semvae(model, training, config, directory=out, device=where, validation=validation)
        last = history[-1]
        if distributed.rank() == 0:
            print(f"The SemVAE is {out / 'model'}; loss {last['loss']:.4f} after {steps} steps.")
