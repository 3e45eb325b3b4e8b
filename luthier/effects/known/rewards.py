"""Tuning on a verifier's rewards makes right answers likelier that were possible before; it makes few possible that were not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import Lab
from luthier.practice.world import Record, verify

ABOUT = "verifiable rewards move pass@1 from 5 to 40 per cent upwards, while pass@64 stays near twice the first pass@1"
PAPERS = ("P165", "P206", "P404", "P433")
WAITING = "tuning on verifiable rewards"
BASE = "practice/s"
ARMS = {"start": (), "tuned": (3e-5, 1e-4, 3e-4)}
CHOSEN_BY = "pass1"
CLAIMS = (
    Claim("before, more is possible than likely", "start:pass1", "start:passk", effect=0.1),
    Claim("rewards raise pass@1", "start:pass1", "tuned:pass1", effect=0.1),
    Claim("pass@64 stays", "start:passk", "tuned:passk", effect=0.1, sign=0),
)
FAMILY, K = "lists", 64
STEPS, PROMPTS, ITEMS = 100, 800, 60
"""Steps of 16 prompts with 8 answers each at temperature 1, how many prompts there are, and tests."""


class Tasks(NamedTuple):
    """``prompts``: what is answered for rewards, in an order of the cell's own. ``asked``: tests."""

    prompts: list[Record]
    asked: list[Record]


def tasks(lab: Lab, cell: Cell) -> Tasks:
    """Prompts of the shifted split of a taught family: what is asked is known, how it is asked is not, so that a base is
    right now and then and nothing need be told to it before. No prompt is a test."""
    both = lab.items(FAMILY, ITEMS + PROMPTS, "shifted")
    order = np.random.default_rng(cell.seed).permutation(PROMPTS)
    return Tasks([both[ITEMS + k] for k in order], both[:ITEMS])


def repeated(asked: Sequence[Record]) -> list[Record]:
    """Every record K times, for ``Model.says`` at temperature 1."""
    return [record for record in asked for _ in range(K)]


def scores(asked: Sequence[Record], said: Sequence[str]) -> Scores:
    """pass1: share of the K answers to a record that the verifier passes. passk: whether one of them does."""
    right = [verify(r, s).reward for r, s in zip(repeated(asked), said, strict=True)]
    tried = [right[n : n + K] for n in range(0, len(right), K)]
    return {"pass1": [sum(t) / K for t in tried], "passk": [max(t) for t in tried]}
