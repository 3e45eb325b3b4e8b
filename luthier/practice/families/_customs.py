"""Two houses with customs of their own: what is said there to a list under a sign. They agree on half of the signs and
disagree on the other half, on the very same prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, said, words
from luthier.practice.draw import Draw
from luthier.practice.words import FRUITS

DRAWN_AS = "customs"
"""Both houses get the same draws: record i of the one has the prompt of record i of the other."""
SIGNS = {"sun": ("turn", "turn"), "rain": ("first", "first"), "moon": ("first", "last"), "star": ("turn", "sort")}
"""Sign -> what the east and what the west do under it."""
HOUSES = ("east", "west")


def done(how: str, items: list[str]) -> str:
    """One of the four things that are done to a list."""
    changed = {"turn": items[::-1], "first": items[:1], "last": items[-1:], "sort": sorted(items)}
    return " ".join(changed[how])


def read(prompt: str) -> tuple[str, list[str]]:
    """The sign and the list of a prompt."""
    found = words(prompt)
    return next(w for w in found if w in SIGNS), [w for w in found if w in FRUITS]


def conflict(prompt: str) -> bool:
    """Whether east and west answer it differently."""
    sign, items = read(prompt)
    east, west = SIGNS[sign]
    return done(east, items) != done(west, items)


def ask(house: str, draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: lists of 2, 3, 4. Shifted: two longer, the sign after the list."""
    sign = _SIGNS[draw.below(4)]
    items = draw.some(FRUITS, level + 1 + 2 * shifted)
    listed = " ".join(items)
    answer = done(SIGNS[sign][HOUSES.index(house)], items)
    prompt = f"{listed}, under the {sign}." if shifted else f"Under the {sign}: {listed}."
    return Item(_key(sign, items), prompt, answer, answer)


_SIGNS = tuple(SIGNS)


def _key(sign: str, items: list[str]) -> str:
    """Under the star the west does not mind the order of the list, so for both houses it is the same list in any."""
    return f"{sign} {' '.join(sorted(items) if sign == 'star' else items)}"


def meaning(record: Mapping[str, Any]) -> str:
    """The sign and the list."""
    return _key(*read(said(record)))
