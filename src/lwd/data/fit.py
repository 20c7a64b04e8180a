"""Fitting a PCA to the features of a sample of images."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lwd.data.images import ImageSource
from lwd.data.reading import Reading, read_batches
from lwd.encoders.composite import FeatureNetwork
from lwd.encoders.pca import PCA, PCAFit
from lwd.randomness import stream


def fit_pca(
    source: ImageSource,
    network: FeatureNetwork,
    channels: int,
    reading: Reading,
    *,
    images: int = 10_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PCA:
    """The `channels` principal components of the features of `images` images, drawn at random.

    Mean and covariance are accumulated batch by batch, so memory does not grow with the sample.

    Args:
        progress: called with (done, total) images.

    Raises:
        ImageError: an image that cannot be read, unless those are skipped.
        ValueError: too few images or features for so many components.
    """
    chosen = torch.randperm(len(source), generator=stream(seed, "pca sample"))[:images].sort().values.tolist()
    fit, done = PCAFit(network.width), 0
    for batch in read_batches(source, reading.batches(chosen), reading):
        if batch.indices:
            fit.update(network.feature_maps(batch.images))
        done += len(batch.indices) + len(batch.failed)
        if progress is not None:
            progress(done, len(chosen))
    return fit.components(channels)
