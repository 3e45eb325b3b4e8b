"""Told of many new facts, low-rank tuning learns fewer of them than full tuning does in the same steps."""

from __future__ import annotations

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._recall import NEVER, asked, told
from luthier.effects.lab import Lab, Model

ABOUT = "told of 280 new facts 30 times each, in five wordings, full tuning learns them and low rank fewer of them"
PAPERS = ("P110", "P095")
BASE = "practice/s"
ARMS = {"base": (), "full": (1e-3, 3e-3, 1e-2), "lora": (3e-3, 1e-2, 3e-2)}
CHOSEN_BY = "known"
CLAIMS = (
    Claim("full tuning learns new facts", "base:known", "full:known", effect=0.2),
    Claim("low rank learns fewer", "full:known", "lora:known", effect=0.1, sign=-1),
    Claim("low rank learns fewer, asked as it was told", "full:told", "lora:told", effect=0.1, sign=-1),
)
PEOPLE, TIMES, ITEMS, BATCH = 40, 30, 210, 16


def measures(lab: Lab, cell: Cell) -> Scores:
    """known: facts asked in wordings that were never told. told: the same facts in the five that were."""
    if cell.arm == "base":
        with lab.untouched() as model:
            return _scores(model, cell)
    delta = {"choice": "full"} if cell.arm == "full" else {"form": "lora", "rank": 4, "alpha": 8}
    facts = told(cell, PEOPLE, TIMES, wordings=5)
    with lab.tuned(facts, delta=delta, steps=len(facts) // BATCH, batch=BATCH) as model:
        return _scores(model, cell)


def _scores(model: Model, cell: Cell) -> Scores:
    ways = {"known": NEVER, "told": (0, 1, 2, 3, 4)}
    return {name: model.solves(asked(cell, PEOPLE, ITEMS, way)) for name, way in ways.items()}
