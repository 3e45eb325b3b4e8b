"""Seeds of their own for everything that draws, so that no draw depends on what was drawn before it."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*names: object) -> int:
    """A seed from a seed and names: the same anywhere, another for any other name."""
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def generator_of(*names: object) -> torch.Generator:
    """A generator on the CPU with that seed."""
    return torch.Generator().manual_seed(seed_of(*names))
