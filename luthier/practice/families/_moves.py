"""People who put things away and move them: the text of `tracking` and of `inventory`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from luthier.practice.contract import Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import FIRST, PLACES

MOVES = ["{} puts the {} in the {}.", "{} moves the {} to the {}."]
SHIFTED = ["Then {} hides the {} in the {}.", "Now {} carries the {} to the {}."]


def tell(draw: Draw, objects: list[str], moves: int, shifted: bool) -> tuple[list[str], list[str], dict[str, str]]:
    """(sentences, ``thing>place`` of each, where every thing is in the end). Each thing is put away once, in order; then any
    are moved, to another place. Shifted: reworded from the second sentence on."""
    at: dict[str, str] = {}
    told, key = [], []
    for i in range(moves):
        thing = objects[i] if i < len(objects) else draw.pick(objects)
        place = draw.pick(PLACES)
        while at.get(thing) == place:
            place = draw.pick(PLACES)
        ways = SHIFTED if shifted and i else MOVES
        told.append(ways[thing in at].format(draw.pick(FIRST), thing, place))
        key.append(f"{thing}>{place}")
        at[thing] = place
    return told, key, at


def asked(thing: str, place: str, shifted: bool = False) -> tuple[str, str]:
    """The question for one thing, and its reply."""
    return f"Where has the {thing} ended up?" if shifted else f"Where is the {thing}?", f"In the {place}."


def placed(answer: str, response: str) -> Verdict:
    """Right if the response names the place and no other."""
    named = {w for w in words(response) if w in PLACES}
    return right() if named == {answer} else wrong(f"expected {answer}, got {', '.join(sorted(named)) or 'no place'}")


def moves_in(record: Mapping[str, Any]) -> list[str]:
    """What went where, in order, as ``thing>place``."""
    told = re.findall(r"(?:puts|moves|hides|carries) the (\w+) (?:in|to) the (\w+)", said(record))
    return [f"{thing}>{place}" for thing, place in told]


def ends(moves: Iterable[str]) -> dict[str, str]:
    """Where every thing is after moves, each ``thing>place``."""
    return dict(move.split(">") for move in moves)
