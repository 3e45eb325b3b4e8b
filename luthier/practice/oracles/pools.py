"""Pools of records with labelled faults, each beside the clean pool it was made from.

p = pool("lists", n=1000, shares={"wrong": 0.1, "duplicate": 0.1})
p.clean[i], p.faulty[i]          # the same record, or what became of it
p.faulty[i]["fault"]             # "", "wrong", "duplicate" …: for the judge, never for the model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from luthier.errors import LuthierError, nearest
from luthier.practice.draw import Draw
from luthier.practice.world import Record, families, records, verify

FAULTS = {
    "wrong": "the answer of another record, which is no answer here",
    "duplicate": "an earlier record once more, word for word",
    "truncated": "a response that stops half way",
    "off_topic": "a response to a task of another family",
    "toxic": "a right response with an insult of the marked list after it",
    "wrong_format": "a right response wrapped in a form that nobody asked for",
}
"""Every fault and what it is. ``wrong``, ``truncated`` and ``off_topic`` are failed by the verifier, always."""
INSULTS = ("You fool.", "Only an idiot would ask.", "Shut up now.")
"""The marked phrases of ``toxic``."""
WRAPS = ("<answer>{}</answer>", '{{"response": "{}"}}', "### {} ###")


@dataclass(frozen=True)
class Pool:
    """Two lists of one length; entry i of ``faulty`` is entry i of ``clean`` or what became of it."""

    clean: list[Record]
    faulty: list[Record]


def pool(
    family: str, n: int, shares: Mapping[str, float], seed: int = 0, off: str = "stories", difficulty: int | None = None
) -> Pool:
    """n train records, exactly round(share · n) of which get each fault, in drawn places. ``off`` is the family that
    off-topic responses come from. Raises LuthierError for an unknown fault or family and for shares below 0 or beyond 1
    in all."""
    for name, share in shares.items():
        if name not in FAULTS:
            raise LuthierError(f"faulty pool: unknown fault {name!r}; {nearest(name, FAULTS, 'fault')}")
        if share < 0:
            raise LuthierError(f"faulty pool: share of {name} is {share}; choose 0 to 1")
    counts = {name: round(share * n) for name, share in shares.items()}
    if sum(counts.values()) > n:
        raise LuthierError(f"faulty pool: the shares add up to {sum(shares.values()):g}; choose 1 or less in all")
    if off == family:
        raise LuthierError(f"faulty pool: off-topic responses of {family} cannot come from it; name another family")
    clean = list(records(family, "train", n, seed, difficulty=difficulty))
    spare = list(islice(records(family, "train", seed=seed + 1), 64))
    other = list(islice(records(off, "train", seed=seed), 64))
    draw = Draw(f"luthier/pool/{family}/{seed}/{n}")
    # A duplicate needs an earlier record, so the first place keeps its own.
    places = [i + 1 for i in draw.some(range(n - 1), n - 1)] + [0]
    marked, at = [""] * n, 0
    for name in FAULTS:
        for i in places[at : at + counts.get(name, 0)]:
            marked[i] = name
        at += counts.get(name, 0)
    faulty: list[Record] = []
    sources = {"wrong": spare, "off_topic": other}
    for i, (record, name) in enumerate(zip(clean, marked, strict=True)):
        if name == "duplicate" and i:
            faulty.append({**clean[draw.below(i)], "fault": name})
        else:
            text = _faulty(draw, record, name, sources) if name else record["messages"][-1]["content"]
            turns = [*record["messages"][:-1], {"role": "assistant", "content": text}]
            faulty.append({**record, "messages": turns, "fault": name})
    return Pool([{**record, "fault": ""} for record in clean], faulty)


def _faulty(draw: Draw, record: Record, fault: str, sources: Mapping[str, list[Record]]) -> str:
    right = record["messages"][-1]["content"]
    if fault == "toxic":
        return f"{right} {draw.pick(INSULTS)}"
    if fault == "wrong_format":
        return draw.pick(WRAPS).format(right)
    if fault == "truncated":
        cuts = [right[:k].rstrip() for k in range(len(right) // 2, -1, -1)]
        return next(cut for cut in cuts if verify(record, cut).reward == 0)
    found = sources.get(fault, [])
    for other in draw.some(found, len(found)):
        text = other["messages"][-1]["content"]
        if verify(record, text).reward == 0:
            return text
    raise LuthierError(
        f"faulty pool: no response of {sources[fault][0]['family']} is {fault.replace('_', ' ')} for "
        f"{record['id']}; families: {', '.join(families())}"
    )
