"""Things are put away and moved; where is one of them now?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, said
from luthier.practice.draw import Draw
from luthier.practice.families._moves import asked, ends, moves_in, placed, tell
from luthier.practice.words import OBJECTS

ABOUT = "where a thing is after people have moved things about"
TAUGHT = True

SIZES = {1: (1, 2), 2: (2, 3), 3: (3, 4)}


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: one, two, three things in two, three, four moves. Shifted: reworded, and up to four more
    moves."""
    things, moves = SIZES[level]
    objects = draw.some(OBJECTS, things)
    told, key, at = tell(draw, objects, moves + (1 + level if shifted else 0), shifted)
    thing = draw.pick(objects)
    question, reply = asked(thing, at[thing], shifted)
    key.append(thing)
    return Item("|".join(key), f"{' '.join(told)} {question}", reply, at[thing])


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the place and no other."""
    return placed(answer, response)


def meaning(record: Mapping[str, Any]) -> str:
    """What went where, in order, whoever did it, and what is asked for."""
    return "|".join([*moves_in(record), re.findall(r"the (\w+)", said(record))[-1]])


def further(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(meaning, question, answer) for the other things of the same text: what a base's training asks besides."""
    told, _, first = meaning(record).rpartition("|")
    at = ends(told.split("|"))
    return [(f"{told}|{thing}", *asked(thing, at[thing])) for thing in at if thing != first]
