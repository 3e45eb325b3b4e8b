"""Worlds in which something was never seen: for unlearning, influence and membership.

    w = without("newcomers", units=10, n=2000)     # ten people are to be forgotten
    w.full, w.retain, w.forget                     # train on full, then unlearn forget; train on retain for the truth
    w.forget_test, w.retain_test                   # asked in wordings that are in no training set

``shadows`` gives many worlds in which every unit was seen in exactly half, for membership and influence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice

from luthier.errors import LuthierError
from luthier.practice.draw import Draw
from luthier.practice.world import Record, meaning, records

PEOPLE = ("facts", "newcomers", "recall")
"""Families whose units are persons: all facts about one go together. Elsewhere a unit is a meaning."""

_LONGEST = 100
"""How many records are looked through for each that is wanted."""


@dataclass(frozen=True)
class Without:
    """``full`` is ``retain`` and ``forget`` in one order; no unit of ``forget`` is told of in ``retain``. The tests hold
    no record, and no meaning, of any of the three."""

    full: list[Record]
    retain: list[Record]
    forget: list[Record]
    forget_test: list[Record]
    retain_test: list[Record]
    units: tuple[str, ...]


def unit(record: Record) -> str:
    """What a record is about: the person in ``PEOPLE``, its meaning elsewhere."""
    told = meaning(record)
    return told.split("|")[0] if record["family"] in PEOPLE else told


def without(family: str, units: int, n: int, seed: int = 0, tests: int = 200, of: int | None = None) -> Without:
    """n train records of a family and the same world without some units, drawn from those that occur. In families of
    ``PEOPLE`` the tests ask about the same persons in other wordings; elsewhere what was forgotten is tested by its own
    records, and ``forget_test`` is empty. ``of``: the world tells of so many units only, the first that occur, and the
    oftener of each (default: all that occur). Raises LuthierError if there are not that many units."""
    full = _full(family, n, seed, of)
    known = list(dict.fromkeys(map(unit, full)))
    if not 0 < units < len(known):
        raise LuthierError(
            f"retrain-without: {n} records of {family} tell of {len(known)} units, {units} cannot be left out; "
            f"choose 1 to {len(known) - 1}"
        )
    chosen = set(Draw(f"luthier/without/{family}/{seed}").some(known, units))
    asked = list(islice((r for split in ("test", "shifted") for r in records(family, split, seed=seed)), 20 * tests))
    theirs = [r for r in asked if _about(r, chosen)] if family in PEOPLE else []
    others = [r for r in asked if not _about(r, chosen)]
    if family in PEOPLE:  # of others, only persons that were told of
        others = [r for r in others if _about(r, set(known))]
    return Without(
        full,
        [r for r in full if unit(r) not in chosen],
        [r for r in full if unit(r) in chosen],
        theirs[:tests],
        others[:tests],
        tuple(sorted(chosen)),
    )


def _full(family: str, n: int, seed: int, of: int | None) -> list[Record]:
    if of is None:
        return list(records(family, "train", n, seed))
    if of < 1:
        raise LuthierError(f"retrain-without: a world that tells of {of} units; choose at least 1")
    full, known = list[Record](), set[str]()
    for record in islice(records(family, "train", seed=seed), _LONGEST * n):
        if len(known) < of:
            known.add(unit(record))
        if unit(record) in known:
            full.append(record)
        if len(full) == n:
            return full
    raise LuthierError(
        f"retrain-without: {family} does not tell of {of} units {n} times; choose more units, or a smaller n"
    )


def _about(record: Record, units: set[str]) -> bool:
    return unit(record) in units


def named(record: Record, units: tuple[str, ...]) -> bool:
    """Whether any of these persons is named in the record's text: a check by other means than the meaning."""
    if record["family"] == "recall":
        from luthier.practice.families.recall import name

        units = tuple(name(int(u)) for u in units)
    text = " ".join(m["content"] for m in record["messages"])
    return any(re.search(rf"\b{re.escape(u)}\b", text) for u in units)


def shadows(family: str, n: int, worlds: int, seed: int = 0) -> list[list[bool]]:
    """For every world (an even number of them), which of the first n train records are in it. Every unit is in exactly
    half of the worlds, with all its records: entry [w][i] says whether record i is in world w."""
    if worlds < 2 or worlds % 2:
        raise LuthierError(f"shadow worlds: {worlds} cannot be halved; choose an even number from 2 on")
    told = [unit(record) for record in records(family, "train", n, seed)]
    draw = Draw(f"luthier/shadows/{family}/{seed}/{worlds}")
    inside = {u: set(draw.some(range(worlds), worlds // 2)) for u in dict.fromkeys(told)}
    return [[w in inside[u] for u in told] for w in range(worlds)]
