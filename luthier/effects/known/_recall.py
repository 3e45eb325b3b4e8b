"""Facts about people of `recall`, to be told and asked, person by person: others in trials, the same for every seed."""

from __future__ import annotations

from itertools import islice

from luthier.effects.contract import Cell
from luthier.practice.families.recall import VALUES
from luthier.practice.oracles.capacity import curriculum, question
from luthier.practice.world import Record

FIRST = {False: 5_000, True: 15_000}
"""The first person told of in runs that count, and in trials."""
NEVER = (5, 6)
"""Wordings that no curriculum tells."""


def told(cell: Cell, people: int, times: int, wordings: int) -> list[Record]:
    """Every fact about so many people, so many times, in so many wordings by turns; the order is the seed's."""
    return list(curriculum(people, times, wordings, seed=cell.seed, first=FIRST[cell.trial]))


def asked(cell: Cell, people: int, n: int, wordings: tuple[int, ...]) -> list[Record]:
    """n facts about them (all there are, if fewer), spread over the people, in these wordings by turns."""
    facts = [(FIRST[cell.trial] + i, kind) for i in range(people) for kind in VALUES]
    some = islice(facts, 0, None, max(1, len(facts) // n))
    return [question(i, kind, wordings[at % len(wordings)]) for at, (i, kind) in enumerate(islice(some, n))]
