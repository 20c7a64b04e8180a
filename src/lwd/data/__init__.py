"""Latent sets: shards on disk, tensors in memory, and the order they are read in."""

from lwd.data.memory import Batch, TensorLatents
from lwd.data.order import BatchOrder
from lwd.data.shards import LatentDataset, ShardWriter

__all__ = ["Batch", "BatchOrder", "LatentDataset", "ShardWriter", "TensorLatents"]
