"""Published rows of the paper's Tables 1 and 2 that belong to no recipe; the paper quotes each system's own paper."""

from __future__ import annotations

from typing import NamedTuple

from lwd.recipes.base import Published


class System(NamedTuple):
    """A row of Table 2: a finished system, with the guidance of its own paper; parameters in millions."""

    name: str
    epochs: int
    parameters: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float
    recall: float


OTHER_CONVERGENCE = {"DiT-XL/2": (Published(400_000, 19.47), Published(7_000_000, 9.62))}
"""Of Table 1."""

OTHER_SYSTEMS = (
    System("DiT-XL", 1400, 675, 2.27, 4.60, 278.2, 0.83, 0.57),
    System("MaskDiT", 1600, 675, 2.28, 5.67, 276.6, 0.80, 0.61),
    System("SiT-XL", 1400, 675, 2.06, 4.50, 270.3, 0.82, 0.59),
    System("FasterDiT", 400, 675, 2.03, 4.63, 264.0, 0.81, 0.60),
    System("MDT", 1300, 675, 1.79, 4.57, 283.0, 0.81, 0.61),
    System("MDTv2", 1080, 675, 1.58, 4.52, 314.7, 0.79, 0.65),
    System("DDT", 400, 675, 1.26, None, 310.6, 0.79, 0.65),
    System("VA-VAE", 800, 675, 1.35, 4.15, 295.3, 0.79, 0.65),
    System("REPA", 800, 675, 1.42, 4.70, 305.7, 0.80, 0.65),
    System("REPA-E", 800, 675, 1.12, 4.09, 302.9, 0.79, 0.66),
    System("ReDi", 800, 675, 1.61, 4.66, 295.1, 0.78, 0.64),
    System("REG", 800, 677, 1.36, 4.25, 299.4, 0.77, 0.66),
    System("RAE-DiT", 800, 676, 1.41, None, 309.4, 0.80, 0.63),
    System("RAE-DiT-DH", 800, 839, 1.13, None, 262.6, 0.78, 0.67),
)
"""Of Table 2, in its order."""
