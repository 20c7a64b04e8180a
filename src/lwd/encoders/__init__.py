"""Encoders: images to latents of one group, and back where that is possible."""

from lwd.encoders.autoencoder import ImageAutoencoder
from lwd.encoders.composite import CompositeEncoder, ProjectedFeatures, SharedFeatures
from lwd.encoders.efficientnet import EfficientNetFeatures, EfficientNetMaps
from lwd.encoders.foundation import FoundationFeatures
from lwd.encoders.pca import PCA, PCAFit
from lwd.encoders.pixels import PixelPatches
from lwd.encoders.semvae import SemVAE, SemVAEConfig

__all__ = [
    "PCA",
    "CompositeEncoder",
    "EfficientNetFeatures",
    "EfficientNetMaps",
    "FoundationFeatures",
    "ImageAutoencoder",
    "PCAFit",
    "PixelPatches",
    "ProjectedFeatures",
    "SemVAE",
    "SemVAEConfig",
    "SharedFeatures",
]
