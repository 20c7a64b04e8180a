"""Latent sets: images to shards on disk, tensors in memory, and the order they are read in."""

from lwd.data.dataset import LatentDataset
from lwd.data.memory import Batch, StoredBatch, TensorLatents
from lwd.data.order import BatchOrder
from lwd.data.writer import ShardWriter

__all__ = ["Batch", "BatchOrder", "LatentDataset", "ShardWriter", "StoredBatch", "TensorLatents"]
