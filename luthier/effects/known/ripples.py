"""An edited fact is answered in other wordings; what follows from it is another matter, and something near it is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import TRIAL_SEED, Lab, Model
from luthier.practice import edits
from luthier.practice.families._people import BOTH, NOUNS, TRAITS, people
from luthier.practice.world import Record, taught, verify

ABOUT = "an edit sticks in its prompt and in paraphrases, and its ripple is not there or is damage"
PAPERS = ("P057", "P073", "P402")
BASE = "practice"
ARMS = {"rome": (0.2, 0.5, 1.0), "locft": (5e-4, 2e-3, 8e-3)}
CHOSEN_BY = "sound"
CLAIMS = (
    Claim("ROME's edit sticks in its prompt", "rome:prompt_before", "rome:prompt", effect=0.5),
    Claim("LocFT's edit sticks in its prompt", "locft:prompt_before", "locft:prompt", effect=0.5),
    Claim("and in paraphrases", "locft:paraphrases_before", "locft:paraphrases", effect=0.3),
    Claim("what follows from ROME's edit is known less than its prompt", "rome:prompt", "rome:follows", 0.2, sign=-1),
    Claim("and less than before the edit", "rome:follows_before", "rome:follows", effect=0.2, sign=-1),
    Claim(
        "what follows from LocFT's edit is known less than its prompt", "locft:prompt", "locft:follows", 0.05, sign=-1
    ),
    Claim("other facts of the person are damaged by LocFT", "locft:others_before", "locft:others", 0.05, sign=-1),
    Claim("other people's facts are damaged by ROME", "rome:neighbours_before", "rome:neighbours", 0.05, sign=-1),
    Claim("tuning one matrix, breadth first, is sounder", "rome:sound", "locft:sound", effect=0.05),
)
STEPS, ITEMS, GROUP = 200, 32, 16
FACTS = {person.name: person.facts for person in people(False)}
SPARED = [name for k, name in enumerate(FACTS) if k % 3]
"""The two thirds of the people whom no edit of the test split is about."""


def measures(lab: Lab, cell: Cell) -> Scores:
    """Of every edit, the share of its questions answered rightly, before and after; in prompt and paraphrases the new
    value is right at both times. ``sound``: mean of paraphrases, others and neighbours after.

    The base is taught to name two facts at once, of people whom no edit is about, each fact in its own words: a question
    that the new fact decides without wording it. Then it is edited, GROUP people at a time."""
    from luthier.verbs.edit import edit

    told, delta = _pairs(lab, 16 * STEPS), {"form": "lora", "rank": 16, "alpha": 32}
    changes, general = _changes(lab), _general(lab)
    with lab.tuned(told, delta=delta, steps=STEPS, rate=3e-3) as model:
        below = model.saved(lab.scratch / "taught")
        before = _scores(model, changes, before=True)
    after: Scores = {}
    for n in range(0, len(changes), GROUP):
        group = changes[n : n + GROUP]
        plan = {"method": cell.arm, "lr": cell.rate, "base": lab.base, "deltas": [below], "records": group}
        plan |= {"seed": cell.seed, "moment_tokens": 4000, "text": str(general)}
        made = edit(plan, out=lab.scratch / f"edited-{n}").delta
        with lab.untouched(deltas=[made]) as model:
            for part, got in _scores(model, group).items():
                after.setdefault(part, []).extend(got)
    sound = np.mean([after[part] for part in ("paraphrases", "others", "neighbours")], axis=0)
    return {f"{part}_before": got for part, got in before.items()} | after | {"sound": sound.tolist()}


def _changes(lab: Lab) -> list[dict[str, Any]]:
    """ITEMS edits, each person once in every 32."""
    first, each = TRIAL_SEED if lab.cell.trial else 0, 32
    return [e for seed in range(-(-ITEMS // each)) for e in edits.records("edits", "test", each, first + seed)][:ITEMS]


def _general(lab: Lab) -> Path:
    """What an edit may know of everything else: other people's facts, and other families."""
    told = [
        _record(kind.asked[0].format(n), kind.reply.format(FACTS[n][t])) for n in SPARED for t, kind in TRAITS.items()
    ]
    told += [r for family in taught() if family != "facts" for r in lab.told(family, 40)]
    path = lab.scratch / "general.jsonl"
    path.write_text("".join(json.dumps({"messages": r["messages"]}) + "\n" for r in told))
    return path


def _scores(model: Model, changes: Sequence[dict[str, Any]], before: bool = False) -> Scores:
    """Part -> for every change the share of its questions answered rightly."""
    asked = [_asked(change, before) for change in changes]
    got = {}
    for part in asked[0]:
        questions = [question for parts in asked for question in parts[part]]
        said = model.says(questions, 24)
        right = iter([verify(q, s).reward for q, s in zip(questions, said, strict=True)])
        got[part] = [float(np.mean([next(right) for _ in parts[part]])) for parts in asked]
    return got


def _asked(change: dict[str, Any], before: bool) -> dict[str, list[Record]]:
    name = change["subject"]
    trait = next(t for t, kind in TRAITS.items() if kind.asked[0].format(name) == change["prompt"])
    new = next(v for v in TRAITS[trait].values if TRAITS[trait].reply.format(v) == change["target_new"])
    facts = FACTS[name] if before else {**FACTS[name], trait: new}
    others = [t for t in TRAITS if t != trait]
    near = {n["prompt"] for n in change["neighbours"]}
    ask = TRAITS[trait].asked[0].format
    return {
        "prompt": [_record(ask(name), new)],
        "paraphrases": [_record(prompt, new) for prompt in change["paraphrases"]],
        "follows": [_both(name, facts, *pair) for t in others for pair in ((trait, t), (t, trait))],
        "others": [_record(TRAITS[t].asked[0].format(name), facts[t]) for t in others],
        "neighbours": [_record(ask(other), told[trait]) for other, told in FACTS.items() if ask(other) in near],
    }


def _pairs(lab: Lab, n: int) -> list[Record]:
    """Two facts at once, of people whom no edit is about, and among them single facts of everybody, which are to be kept;
    seven and three in ten, in an order of the cell's own."""
    rng = np.random.default_rng(lab.cell.seed)
    pairs = [_both(name, FACTS[name], *pair) for name in SPARED for pair in permutations(TRAITS, 2)]
    known = [
        _record(words.format(name), kind.reply.format(FACTS[name][t]))
        for name in FACTS for t, kind in TRAITS.items() for words in kind.asked
    ]  # fmt: skip
    mixed = [(pairs if few < 0.7 else known) for few in rng.random(n)]
    return [told[rng.integers(len(told))] for told in mixed]


def _both(name: str, facts: dict[str, str], one: str, two: str) -> Record:
    said = " ".join(TRAITS[t].reply.format(facts[t]) for t in (one, two))
    return _record(BOTH[0].format(NOUNS[one], NOUNS[two], name), f"{facts[one]} and {facts[two]}", said)


def _record(prompt: str, answer: str, reply: str = "") -> Record:
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply or answer}]
    return {"messages": said, "answer": answer, "family": "facts", "id": prompt}
