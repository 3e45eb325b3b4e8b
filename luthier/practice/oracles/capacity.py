"""Known amounts of knowledge: people told of an exact number of times, in an exact number of wordings, and bits.

told = curriculum(people=1000, times=20, wordings=3)    # every fact exactly 20 times, in 3 wordings by turns
bits(1000)                                              # 34,000: all there is to know about them
learned(losses)                                         # how many of them a model knows, from its losses in nats
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from luthier.errors import LuthierError
from luthier.practice.draw import Draw
from luthier.practice.families.recall import BITS, PEOPLE, VALUES, ask
from luthier.practice.world import Record, record_of

EVERYONE = PEOPLE[3].stop
PER_PARAMETER = 0.5
"""Bits a parameter that a room is called full at here; at 2 bits it is what long training reaches at most (Allen-Zhu and
Li 2024, whose figure counts the names too)."""


def bits(people: int) -> int:
    """Bits there are to know about so many people."""
    return people * BITS


def fills(parameters: int, share: float = PER_PARAMETER) -> int:
    """How many people make ``share`` bits a parameter, at most all there are."""
    return min(EVERYONE, math.ceil(parameters * share / BITS))


def curriculum(people: int, times: int, wordings: int = 5, seed: int = 0, first: int = 0) -> Iterator[Record]:
    """Every fact about ``people`` people, from number ``first`` on, exactly ``times`` times, in ``times`` rounds each of
    which tells every fact once in drawn order; round r tells a fact in wording (r + its own shift) modulo ``wordings``.
    Wordings 0 to 4 are train's. The splits of the world do not apply: all wordings below ``wordings`` are told, so test
    with ``question`` in one that was not. Raises LuthierError for numbers out of range."""
    if not 0 < people <= EVERYONE - first or first < 0:
        raise LuthierError(f"capacity oracle: {people} people from {first} on; there are {EVERYONE}")
    if not 1 <= wordings <= 5:
        raise LuthierError(f"capacity oracle: {wordings} wordings; choose 1 to 5")
    if times < 1:
        raise LuthierError(f"capacity oracle: {times} times; choose 1 or more")
    facts = [(i, kind) for i in range(first, first + people) for kind in VALUES]
    for turn in range(times):
        for at in Draw(f"luthier/capacity/{seed}/{turn}").some(range(len(facts)), len(facts)):
            i, kind = facts[at]
            yield question(i, kind, (turn + at) % wordings)


def question(person: int, kind: str, wording: int) -> Record:
    """The record of one fact in one wording: 0 to 4 are train's, 5 and 6 never train's."""
    return record_of("recall", ask(person, kind, wording))


def learned(losses: Mapping[str, list[float]]) -> float:
    """Bits known, from a model's loss in nats on the value of each fact, by kind of fact: the sum over facts of
    max(0, log2(values) - loss / ln 2). A model that spreads its belief evenly over the values knows none."""
    total = 0.0
    for kind, found in losses.items():
        whole = math.log2(len(VALUES[kind]))
        total += sum(max(0.0, whole - loss / math.log(2)) for loss in found)
    return total
