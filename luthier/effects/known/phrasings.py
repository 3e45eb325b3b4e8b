"""A fact told in one wording is not known in another; told as often in five, it is."""

from __future__ import annotations

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._recall import NEVER, asked, told
from luthier.effects.lab import Lab

ABOUT = (
    "a fact told 40 times in one wording is known in that one only; told as often in five, it is known in others too"
)
PAPERS = ("P095", "P461")
BASE = "practice/s"
ARMS = {"one": (1e-3, 3e-3, 1e-2), "five": (1e-3, 3e-3, 1e-2)}
CHOSEN_BY = "both"
CLAIMS = (
    Claim("told in one wording, a fact is not known in another", "one:told", "one:never", effect=0.2, sign=-1),
    Claim("told in five, it is known in another more often", "one:never", "five:never", effect=0.2),
    Claim(
        "told in five, it is known in a told one as well as told in that one alone", "one:told", "five:told", 0.05, 0
    ),
)
PEOPLE, TIMES, ITEMS, BATCH = 30, 40, 210, 16


def measures(lab: Lab, cell: Cell) -> Scores:
    """told: facts asked in the wording that both arms were told. never: in two that neither was. both: all of these.

    Both arms are told every fact equally often, in as many steps of full tuning.
    """
    facts = told(cell, PEOPLE, TIMES, wordings={"one": 1, "five": 5}[cell.arm])
    with lab.tuned(facts, delta={"choice": "full"}, steps=len(facts) // BATCH, batch=BATCH) as model:
        scores = {
            name: model.solves(asked(cell, PEOPLE, ITEMS, way)) for name, way in {"told": (0,), "never": NEVER}.items()
        }
    return {**scores, "both": [*scores["told"], *scores["never"]]}
