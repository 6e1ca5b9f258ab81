"""Named random streams: everything random is keyed by what it is for, never by when it is drawn."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed of its own for each purpose, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one purpose."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))
