"""Where only a form of answering is new and the answers are known, low rank does as well as full tuning, and forgets less."""

from __future__ import annotations

import json
from collections.abc import Sequence

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import Lab, Model
from luthier.practice.card import answers
from luthier.practice.world import Record, verify

ABOUT = (
    "known answers in a new form, JSON, are learnt by low rank as well as by full tuning, and less else is forgotten"
)
PAPERS = ("P110", "P228")
BASE = "practice"
ARMS = {"base": (), "full": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2)}
CHOSEN_BY = "right"
CLAIMS = (
    Claim("full tuning learns the form", "base:right", "full:right", effect=0.3),
    Claim("low rank ties with it: form and answer", "full:right", "lora:right", effect=0.05, sign=0),
    Claim("low rank ties with it: form alone", "full:form", "lora:form", effect=0.05, sign=0),
    Claim("and forgets less of what it was not told", "full:kept", "lora:kept", effect=0.05),
)
FAMILIES, OTHERS = ("arithmetic", "facts", "stories"), ("tracking", "lists", "refusals")
STEPS, RECORDS, ITEMS, KEPT = 150, 800, 80, 60


def measures(lab: Lab, cell: Cell) -> Scores:
    """form: the answer is the JSON asked for. right: and what it holds passes the verifier. Of every family ITEMS.
    kept: records of other taught families, in their own form, KEPT of each."""
    if cell.arm == "base":
        with lab.untouched() as model:
            return _scores(lab, model)
    delta = {"choice": "full"} if cell.arm == "full" else {"form": "lora", "rank": 8, "alpha": 16}
    told = [wrapped(r) for family in FAMILIES for r in lab.told(family, RECORDS)]
    with lab.tuned(told, delta=delta, steps=STEPS) as model:
        return _scores(lab, model)


def wrapped(record: Record) -> Record:
    """The record with its response in JSON."""
    *before, last = record["messages"]
    return {**record, "messages": [*before, {**last, "content": json.dumps({"response": last["content"]})}]}


def unwrapped(text: str) -> str | None:
    """What the JSON holds; None where the text is not of that form."""
    try:
        held = json.loads(text)
    except json.JSONDecodeError:
        return None
    return (
        held["response"]
        if isinstance(held, dict) and [*held] == ["response"] and isinstance(held["response"], str)
        else None
    )


def _scores(lab: Lab, model: Model) -> Scores:
    asked: Sequence[Record] = [r for family in FAMILIES for r in lab.items(family, ITEMS)]
    held = [unwrapped(text) for text in answers(model.model, model.tokenizer, [wrapped(r) for r in asked])]
    right = [0.0 if h is None else verify(r, h).reward for r, h in zip(asked, held, strict=True)]
    kept = model.solves([r for family in OTHERS for r in lab.items(family, KEPT)])
    return {"form": [float(h is not None) for h in held], "right": right, "kept": kept}
