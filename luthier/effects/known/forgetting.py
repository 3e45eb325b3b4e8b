"""Full tuning forgets what it does not rehearse; low-rank tuning forgets less; its singular directions are new ones."""

from __future__ import annotations

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._spectra import intruders
from luthier.effects.lab import Lab, Model
from luthier.practice.world import taught

ABOUT = "full tuning on a new language forgets 10 to 40 points of what was taught; low rank forgets less, and brings intruder dimensions"
PAPERS = ("P110", "P228", "P363")
BASE = "practice"
ARMS = {"base": (), "full": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2)}
CHOSEN_BY = "target"
CLAIMS = (
    Claim("full tuning learns the new language", "base:target", "full:target", effect=0.3),
    Claim("full tuning forgets", "base:kept", "full:kept", effect=0.1, sign=-1),
    Claim("low rank forgets less", "full:kept", "lora:kept", effect=0.05),
    Claim("low rank has more intruder dimensions", "full:intruders", "lora:intruders", effect=0.5),
)
STEPS, ITEMS, KEPT = 400, 200, 40


def measures(lab: Lab, cell: Cell) -> Scores:
    """target: the new language. kept: 40 records of every taught family. intruders: in each matrix of the layers."""
    if cell.arm == "base":
        with lab.untouched() as model:
            return _scores(lab, model)
    delta = {"choice": "full"} if cell.arm == "full" else {"form": "lora", "rank": 8, "alpha": 16}
    with lab.tuned(lab.told("translate", 4000), delta=delta, steps=STEPS) as model:
        return {**_scores(lab, model), "intruders": intruders(model.training)}


def _scores(lab: Lab, model: Model) -> Scores:
    kept = [r for family in taught() for r in lab.items(family, KEPT)]
    return {"target": model.solves(lab.items("translate", ITEMS)), "kept": model.solves(kept)}
