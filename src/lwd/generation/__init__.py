"""Images from a trained pipeline: in memory, or as sets on disk that many processes make together."""

from lwd.generation.config import SampleConfig
from lwd.generation.draw import DrawnImages, channels_last, draw_images
from lwd.generation.job import sample_to_directory
from lwd.generation.sheets import SampleSheets
from lwd.generation.store import SampleStore, save_npz
from lwd.pipeline import image_seed

__all__ = [
    "DrawnImages",
    "SampleConfig",
    "SampleSheets",
    "SampleStore",
    "channels_last",
    "draw_images",
    "image_seed",
    "sample_to_directory",
    "save_npz",
]
