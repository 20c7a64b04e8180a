"""Denoiser networks."""

from lwd.backbones.config import SIZES, LightningDiTConfig, lightningdit_config
from lwd.backbones.lightningdit import LightningDiT

__all__ = ["SIZES", "LightningDiT", "LightningDiTConfig", "lightningdit_config"]
