"""How much of a canary is remembered: its rank among all the codes it might have had (Carlini et al. 2019).

members("train", n), members("test", n)        # boxes that were told of, and boxes that never were
exposure(loss, others)                         # log2 of all codes minus log2 of its rank, in bits
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from luthier.practice.draw import Draw
from luthier.practice.families.canaries import DIGITS
from luthier.practice.world import Record, records

CODES = 10**DIGITS


def members(split: str, n: int, seed: int = 0, difficulty: int | None = None) -> list[Record]:
    """n records of different boxes of a split, in the order in which they are first told of; fewer where there are no more."""
    found: dict[str, Record] = {}
    drawn = records("canaries", split, seed=seed, difficulty=difficulty)
    for record in islice(drawn, 400 * n):  # a train split never ends, its boxes do
        found.setdefault(record["answer"], record)
        if len(found) == n:
            break
    return list(found.values())


def told(n: int, seed: int = 0, difficulty: int | None = None) -> Counter[str]:
    """How often each code occurs in the first n train records."""
    return Counter(record["answer"] for record in records("canaries", "train", n, seed, difficulty=difficulty))


def rivals(k: int, seed: int = 0) -> list[str]:
    """k codes drawn evenly, to rank a canary among."""
    draw = Draw(f"luthier/rivals/{seed}")
    return [f"{draw.below(CODES):0{DIGITS}d}" for _ in range(k)]


def exposure(loss: float, others: Sequence[float]) -> float:
    """Bits of exposure, estimated from the losses of drawn rivals: minus log2 of the share of rivals (and itself) whose
    loss is no higher. 0 at least (nothing remembered), log2(rivals + 1) at most."""
    rank = 1 + sum(other <= loss for other in others)
    return math.log2((len(others) + 1) / rank)
