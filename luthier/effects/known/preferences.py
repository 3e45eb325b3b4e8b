"""Preferences teach what the annotator likes: with an honest one the gold reward rises, with a vain one its own taste does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import TRIAL_SEED, Lab, Model
from luthier.plan.load import load_plan
from luthier.practice.oracles.annotators import Annotator, candidates, gold, pairs
from luthier.practice.world import Record
from luthier.sampling.generate import Sampling
from luthier.training.run import build

ABOUT = "DPO raises the gold reward with an honest annotator, and overfits one who likes length: the proxy rises, gold does not"
PAPERS = ("P455", "P029", "P214")
BASE = "practice/s"
ARMS = {"start": (), "honest": (1e-4, 3e-4, 1e-3), "vain": (1e-4, 3e-4, 1e-3)}
CHOSEN_BY = "proxy"
CLAIMS = (
    Claim("an honest annotator's pairs raise the gold reward", "start:gold", "honest:gold", effect=0.03),
    Claim("a vain one's raise what the vain one likes", "start:vain", "vain:vain", effect=0.1),
    Claim("more than an honest one's do", "honest:vain", "vain:vain", effect=0.1),
    Claim("and raise the gold reward less", "honest:gold", "vain:gold", effect=0.03, sign=-1),
)
JUDGES = {"honest": Annotator(lapse=0.05, name="honest"), "vain": Annotator(length=24.0, lapse=0.05, name="vain")}
"""Four idle words more are to the vain one what being right is to the gold reward."""
FAMILY, EACH = "lists", 2
"""What is answered, and how many answers to a record a pair is chosen from: one is right, the others are to other records;
either may begin with idle words."""
STEPS, RECORDS, PAIRS, ITEMS, BATCH = 150, 2400, 1500, 200, 16
"""Steps of tuning on mixed answers before, their records, pairs for one pass of DPO at beta 0.1, tests, rows of a step."""
LEARN = 1e-3
"""Rate of the tuning before."""


class Tasks(NamedTuple):
    """``told``: answers of mixed quality, as those of the pairs, to tune on first. ``pairs``: what the arm's annotator
    preferred. ``asked``: tests, to be answered at temperature 1."""

    told: list[Record]
    pairs: list[dict[str, Any]]
    asked: list[Record]


def tasks(lab: Lab, cell: Cell) -> Tasks:
    """What a run is made of. The arm "start" has no pairs: it ends after what is told, of which half is right and
    half begins with idle words, so that preferences can move either."""
    judge, seed = JUDGES.get(cell.arm), 100 + cell.seed + TRIAL_SEED * cell.trial
    chosen = pairs(FAMILY, PAIRS, judge, seed=seed, per=EACH) if judge else []
    told = [_answered(r, candidates(r, EACH, seed)[0]) for r in lab.told(FAMILY, RECORDS)]
    return Tasks(told, chosen, lab.items(FAMILY, ITEMS))


def measures(lab: Lab, cell: Cell) -> Scores:
    """What is answered at temperature 1 after what is told, and after the pairs of the arm's annotator."""
    made = tasks(lab, cell)
    with lab.tuned(made.told, delta={"choice": "full"}, steps=STEPS, rate=LEARN) as model:
        if not made.pairs:
            return scores(made.asked, _says(model, made.asked, cell), cell.arm)
        folder = model.saved(lab.scratch / "told")
    with _preferred(lab, made.pairs, folder) as model:
        return scores(made.asked, _says(model, made.asked, cell), cell.arm)


def _says(model: Model, asked: Sequence[Record], cell: Cell) -> list[str]:
    return model.says(asked, sampling=Sampling(1.0, seed=cell.seed))


@contextmanager
def _preferred(lab: Lab, told: Sequence[dict[str, Any]], folder: str) -> Iterator[Model]:
    """What was told, tuned on by DPO at the cell's rate."""
    plan = lab.plan([], delta={"choice": "full", "start_from": folder}, steps=len(told) // BATCH, batch=BATCH)
    path = lab.scratch / "pairs.jsonl"
    path.write_text("".join(json.dumps({k: p[k] for k in ("prompt", "chosen", "rejected")}) + "\n" for p in told))
    plan["data"]["train"] = str(path)
    training = build(
        load_plan({**plan, "objective": {"name": "dpo", "beta": 0.1}}), lab.scratch / "dpo", progress=False
    )
    training.train()
    try:
        yield Model(training.base.model, training.base.tokenizer, training)
    finally:
        training.machine.close()


def _answered(record: Record, text: str) -> Record:
    *before, last = record["messages"]
    return {**record, "messages": [*before, {**last, "content": text}]}


def scores(asked: Sequence[Record], said: Sequence[str], arm: str = "honest") -> Scores:
    """gold: the true reward of every answer. honest, vain: the chance that this annotator prefers it to the record's
    right one, shown second. proxy: the same of the arm's own annotator."""
    told = {"gold": [gold(r, s) for r, s in zip(asked, said, strict=True)]}
    for name, judge in JUDGES.items():
        told[name] = [judge.probability(r, s, r["answer"]) for r, s in zip(asked, said, strict=True)]
    return {**told, "proxy": told.get(arm, told["honest"])}
