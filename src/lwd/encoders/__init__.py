"""Encoders: images to latents of one group, and back where that is possible."""

from lwd.encoders.efficientnet import EfficientNetFeatures
from lwd.encoders.pca import PCA, PCAFit
from lwd.encoders.pixels import PixelPatches

__all__ = ["PCA", "EfficientNetFeatures", "PCAFit", "PixelPatches"]
