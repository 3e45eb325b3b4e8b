"""What was unlearnt comes back when something else that was unlearnt is told again."""

from __future__ import annotations

import json

import numpy as np

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import TRIAL_SEED, Lab
from luthier.practice.oracles.without import unit, without
from luthier.practice.world import Record

ABOUT = "people who were unlearnt come back when others who were unlearnt are told of again, faster than to a model that never knew"
PAPERS = ("P360",)
BASE = "practice/s"
ARMS = {"never": (1e-3, 3e-3, 1e-2), "unlearnt": (1e-3, 3e-3, 1e-2)}
CHOSEN_BY = "told_again"
CLAIMS = (
    Claim("told of them, a model knows them", "never:known", "unlearnt:known", effect=0.4),
    Claim("unlearning takes them away", "unlearnt:known", "unlearnt:forgotten", effect=0.3, sign=-1),
    Claim("as if they had never been told of", "never:forgotten", "unlearnt:forgotten", effect=0.1, sign=0),
    Claim("told of others, a model comes to know them again", "unlearnt:forgotten", "unlearnt:back", effect=0.1),
    Claim("and not because it guesses better", "never:back", "unlearnt:back", effect=0.1),
    Claim("who is told of again is known sooner", "never:told_again", "unlearnt:told_again", effect=0.1),
    Claim("unlearning costs what is to be kept", "never:kept", "unlearnt:kept", effect=0.05, sign=-1),
)
OF, PEOPLE, AGAIN, TOLD, ITEMS = 100, 32, 16, 2000, 160
"""People told of; how many of them are to be unlearnt, and of these told of again; records to tell; tests."""
STEPS, TOLD_AGAIN = 240, 20
"""Steps of telling, and of telling again: each record about once."""
LEARN = 1e-3
UNLEARN = {"lr": 3e-4, "steps": 200, "reinforce_steps": 200, "labels": "soft", "keep": 1.0}
"""How they are unlearnt. What is known for certain is not raised by the published 40 steps of reinforcement."""


def measures(lab: Lab, cell: Cell) -> Scores:
    """known, forgotten, back: the people who are not told of again, before unlearning, after it, and after relearning.
    told_again: those who are, after relearning. kept: people never unlearnt, before relearning. The cell's rate is that
    of relearning, by low rank, chosen by what is told again."""
    from luthier.verbs.edit import edit

    world = without("newcomers", PEOPLE, TOLD, TRIAL_SEED if cell.trial else 0, ITEMS, OF)
    again = set(world.units[:AGAIN])
    told = _mixed(world.full if cell.arm == "unlearnt" else world.retain, cell.seed)
    asked = _once([r for r in world.forget if unit(r) not in again])[:ITEMS]
    relearnt = _once([r for r in world.forget if unit(r) in again])
    with lab.tuned(told, delta={"choice": "full"}, steps=STEPS, rate=LEARN) as model:
        folder = model.saved(lab.scratch / "told")
        known = forgotten = model.solves(asked)
        kept = model.solves(world.retain_test)
    if cell.arm == "unlearnt":
        path = lab.scratch / "general.jsonl"
        path.write_text(
            "".join(json.dumps({"messages": r["messages"]}) + "\n" for r in _mixed(world.retain, cell.seed))
        )
        records = [{"messages": r["messages"]} for r in _mixed(_once(world.forget), cell.seed)]
        plan = {"method": "alternative-labels", "base": lab.base, "deltas": [folder], "records": records}
        plan |= {"text": str(path), "seed": cell.seed, **UNLEARN}
        folder = str(edit(plan, out=lab.scratch / "unlearnt").out)
        with lab.untouched(deltas=[folder]) as model:
            forgotten, kept = model.solves(asked), model.solves(world.retain_test)
    delta, base = {"form": "lora", "rank": 8, "alpha": 16}, {"name": lab.base, "deltas": [folder]}
    with lab.tuned(_mixed(relearnt, cell.seed), delta=delta, steps=TOLD_AGAIN, base=base) as model:
        back, target = model.solves(asked), model.solves(relearnt[:ITEMS])
    return {"known": known, "forgotten": forgotten, "back": back, "told_again": target, "kept": kept}


def _once(told: list[Record]) -> list[Record]:
    return list({r["id"]: r for r in told}.values())


def _mixed(told: list[Record], seed: int) -> list[Record]:
    return [told[k] for k in np.random.default_rng(seed).permutation(len(told))]
