"""Latent sets: shards on disk, tensors in memory, and the order they are read in."""

from lwd.data.order import BatchOrder
from lwd.data.shards import Batch, LatentDataset, ShardWriter, TensorLatents

__all__ = ["Batch", "BatchOrder", "LatentDataset", "ShardWriter", "TensorLatents"]
