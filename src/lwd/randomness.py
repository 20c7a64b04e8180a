"""Random streams as pure functions of (seed, purpose, step).

Nothing random has a hidden state to save: step 1,000 of a resumed run draws what step 1,000 of an uninterrupted one
drew, and two consumers never share a stream.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for one purpose at one step."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose at one step."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, step))
