"""Tuning on a verifier's rewards makes right answers likelier that were possible before; it makes few possible that were not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import TRIAL_SEED, Lab
from luthier.practice.oracles.pools import pool
from luthier.practice.world import Record, records, verify

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
FAMILY, K, WRONG = "lists", 64, 0.5
TOLD, RECORDS, STEPS, PROMPTS, ITEMS = 14, 400, 100, 800, 80
"""Steps of tuning before, on this many records of which the share WRONG is answered wrongly; steps of 16 prompts with 8
answers each at temperature 1, how many prompts there are, and tests."""


class Tasks(NamedTuple):
    """``told``: answers of which half are wrong, to tune on first. ``prompts``: what is answered for rewards, in an order of
    the cell's own. ``asked``: tests, to be answered K times at temperature 1."""

    told: list[Record]
    prompts: list[Record]
    asked: list[Record]


def tasks(lab: Lab, cell: Cell) -> Tasks:
    """What a run is made of. A base that knows its lists is told wrong ones too, until it is right now and then: as it
    stands it is nearly as sure as it is right, and more answers bring few more right ones."""
    prompts = list(records(FAMILY, "train", RECORDS + PROMPTS, seed=TRIAL_SEED + 1))[RECORDS:]
    order = np.random.default_rng(cell.seed).permutation(PROMPTS)
    told = pool(FAMILY, RECORDS, {"wrong": WRONG}, seed=TRIAL_SEED + 1).faulty
    return Tasks(told, [prompts[k] for k in order], lab.items(FAMILY, ITEMS))


def repeated(asked: Sequence[Record]) -> list[Record]:
    """Every record K times, for ``Model.says`` at temperature 1."""
    return [record for record in asked for _ in range(K)]


def scores(asked: Sequence[Record], said: Sequence[str]) -> Scores:
    """pass1: share of the K answers to a record that the verifier passes. passk: whether one of them does."""
    right = [verify(r, s).reward for r, s in zip(repeated(asked), said, strict=True)]
    tried = [right[n : n + K] for n in range(0, len(right), K)]
    return {"pass1": [sum(t) / K for t in tried], "passk": [max(t) for t in tried]}
