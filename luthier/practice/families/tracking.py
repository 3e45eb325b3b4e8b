"""Things are put away and moved; where is one of them now?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import FIRST, OBJECTS, PLACES

ABOUT = "where a thing is after people have moved things about"
TAUGHT = True

MOVES = ["{} puts the {} in the {}.", "{} moves the {} to the {}."]
SHIFTED = ["Then {} hides the {} in the {}.", "Now {} carries the {} to the {}."]
SIZES = {1: (1, 2), 2: (2, 3), 3: (3, 4)}


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: one, two, three things in two, three, four moves. Shifted: reworded, and up to four more
    moves."""
    things, moves = SIZES[level]
    objects = draw.some(OBJECTS, things)
    moves += (1 + level) if shifted else 0
    at: dict[str, str] = {}
    told, key = [], []
    for i in range(moves):
        thing = objects[i] if i < things else draw.pick(objects)
        place = draw.pick(PLACES)
        while at.get(thing) == place:
            place = draw.pick(PLACES)
        ways = SHIFTED if shifted and i else MOVES
        told.append(ways[thing in at].format(draw.pick(FIRST), thing, place))
        key.append(f"{thing}>{place}")
        at[thing] = place
    asked = draw.pick(objects)
    question = f"Where has the {asked} ended up?" if shifted else f"Where is the {asked}?"
    key.append(asked)
    return Item("|".join(key), f"{' '.join(told)} {question}", f"In the {at[asked]}.", at[asked])


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the place and no other."""
    named = {w for w in words(response) if w in PLACES}
    if named == {answer}:
        return right()
    return wrong(f"expected {answer}, got {', '.join(sorted(named)) or 'no place'}")


def meaning(record: Mapping[str, Any]) -> str:
    """What went where, in order, whoever did it, and what is asked for."""
    moves = re.findall(r"(?:puts|moves|hides|carries) the (\w+) (?:in|to) the (\w+)", said(record))
    return "|".join([*(f"{thing}>{place}" for thing, place in moves), re.findall(r"the (\w+)", said(record))[-1]])


def further(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions about the other things of the same text, with their answers: what the base's training asks besides."""
    at = dict(re.findall(r"(?:puts|moves) the (\w+) (?:in|to) the (\w+)", said(record)))
    asked = re.findall(r"the (\w+)", said(record))[-1]
    return [(f"Where is the {thing}?", f"In the {place}.") for thing, place in at.items() if thing != asked]
