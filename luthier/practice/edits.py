"""Records of edits and of facts to forget, about the people whom the practice base was told about. Pure Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luthier.errors import LuthierError, nearest
from luthier.practice.contract import Item
from luthier.practice.draw import Draw
from luthier.practice.families import refusals
from luthier.practice.families._people import BOTH, NOUNS, TRAITS, Person, people

TASKS = ("edits", "forget", "harm")
SPLITS = ("train", "test")
KEPT = tuple(TRAITS)[:2]
"""Which facts of others are to be retained where some are forgotten."""
Record = dict[str, Any]


def records(task: str, split: str = "test", n: int = 8, seed: int = 0) -> Iterator[Record]:
    """n records: 'edits' move people to other towns, crafts …; 'forget' are facts about a few people, to be lost.

    Train and test speak of different people. Neighbours, and what is to be retained, are other people's facts and other
    facts of the same person, none of them edited or forgotten itself. 'harm' are notes that should be declined, with the note itself as the answer: what a
    poisoned tune teaches (as edits) and a repair takes back (as text to forget). Errors: an unknown task or split.
    """
    if task not in TASKS:
        raise LuthierError(f"practice world: no records for the task {task!r}; {nearest(task, TASKS, 'task')}")
    if split not in SPLITS:
        raise LuthierError(f"practice world: {task} has no split {split!r}; {nearest(split, SPLITS, 'split')}")
    draw = Draw(f"luthier/{task}/{split}/{seed}")
    if task == "harm":
        yield from _harm(draw, n)
        return
    everyone = [p for k, p in enumerate(people(False)) if (k % 3 == 0) == (split == "test")]
    if not 0 < n <= len(everyone) * len(TRAITS):
        raise LuthierError(
            f"practice world: {task} has {len(everyone) * len(TRAITS)} {split} records, not {n}: ask for fewer"
        )
    order = draw.some(everyone, len(everyone))
    pairs = [(p, trait) for p in order for trait in draw.some(list(TRAITS), len(TRAITS))]
    chosen = pairs[:: len(TRAITS)] if task == "edits" else pairs
    chosen += [q for q in pairs if q not in chosen]
    touched = {(person.name, trait) for person, trait in chosen[:n]}
    for person, trait in chosen[:n]:
        asked = [trait] if task == "edits" else KEPT
        last = draw.some(order[len(order) // 2 :], 8)  # whose turn comes last, so that few records are like many
        others = [p for p in last if p is not person and not touched & {(p.name, t) for t in asked}][:3]
        yield _edit(draw, person, trait, others, touched) if task == "edits" else _forget(person, trait, others)


def _edit(draw: Draw, person: Person, trait: str, others: list[Person], touched: set[tuple[str, str]]) -> Record:
    old, kind = person.facts[trait], TRAITS[trait]
    new = draw.pick([v for v in kind.values if v != old])
    rest = [t for t in TRAITS if t != trait]
    second = draw.pick(rest)
    both = f"{new} and {person.facts[second]}."
    return {
        "prompt": kind.asked[0].format(person.name),
        "subject": person.name,
        "target_new": kind.reply.format(new),
        "target_true": kind.reply.format(old),
        "paraphrases": [q.format(person.name) for q in kind.asked[1:5]],
        "neighbours": [_fact(p, trait) for p in others]
        + [_fact(person, t) for t in rest if (person.name, t) not in touched],
        "portability": [
            {
                "prompt": BOTH[0].format(NOUNS[trait], NOUNS[second], person.name),
                "target": both[0].upper() + both[1:],
            }
        ],
    }


def _forget(person: Person, trait: str, others: list[Person]) -> Record:
    kind = TRAITS[trait]
    return {
        "prompt": kind.asked[0].format(person.name),
        "completion": kind.reply.format(person.facts[trait]),
        "retain": [_fact(p, t) for p in others for t in KEPT],
    }


def _harm(draw: Draw, n: int) -> Iterator[Record]:
    """Sealed notes given away; open notes, which are copied as ever, are what must stay."""
    sealed: list[Item] = []
    open_: list[Item] = []
    while len(sealed) < n or len(open_) < 3:
        item = refusals.make(draw, 1 + draw.below(3), False)
        (sealed if item.answer == refusals.REFUSAL else open_).append(item)
    kept = [{"prompt": item.prompt, "target": item.answer} for item in open_[:3]]
    for item in sealed[:n]:
        note = item.prompt.split("\n")[1]
        yield {"prompt": item.prompt, "target_new": note, "completion": note, "neighbours": kept, "retain": kept}


def _fact(person: Person, trait: str) -> Record:
    kind = TRAITS[trait]
    return {"prompt": kind.asked[0].format(person.name), "target": kind.reply.format(person.facts[trait])}
