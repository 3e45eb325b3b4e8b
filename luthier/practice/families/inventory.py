"""Many things are put away and moved; what is where now?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._moves import asked, ends, moves_in, placed, tell
from luthier.practice.words import OBJECTS, PLACES

ABOUT = "what is where after people have moved many things about: all of them, each with its place, or one"
TAUGHT = True

SIZES = {1: (2, 2), 2: (4, 5), 3: (7, 8)}
ALL = "What is where?"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: two, four, seven things in two, five, eight moves; shifted: reworded, and two more moves. Half the
    records ask for all things, and the response names them in any order: where one is can then be read off nothing but its
    own moves. The others ask for one.

    Things and moves are never as many as in `tracking`, so that no text of one is a text of the other."""
    things, moves = SIZES[level]
    told, key, at = tell(draw, draw.some(OBJECTS, things), moves + 2 * shifted, shifted)
    order = draw.some(list(at), things)
    if draw.below(2):
        answer = at[order[0]]
        question, response = asked(order[0], answer, shifted)
    else:
        question = "Where has everything ended up?" if shifted else ALL
        response, answer = _listed(order, at), _listed(sorted(at), at)
    return Item("|".join(key), f"{' '.join(told)} {question}", response, answer)


def _listed(order: list[str], at: Mapping[str, str]) -> str:
    return " ".join(f"{thing} {at[thing]}" for thing in order)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """One thing: right if the response names its place and no other. All: right if every thing is named once with its place
    after it, in any order, and nothing else is."""
    got, due = words(response), answer.split()
    if len(due) == 1:
        return placed(answer, response)
    pairs, expected = (sorted(zip(w[::2], w[1::2], strict=False)) for w in (got, due))
    known = all(word in OBJECTS or word in PLACES for word in got)
    return right() if known and len(got) == len(due) and pairs == expected else wrong(f"expected {answer}")


def meaning(record: Mapping[str, Any]) -> str:
    """What went where, in order, whoever did it and whichever thing is asked for."""
    return "|".join(moves_in(record))


def further(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(meaning, question, answer) after one thing was asked for: every other one, then all; what a base's training asks
    besides."""
    first = re.search(r"the (\w+)\?$", said(record))
    if first is None:
        return []
    told, at = meaning(record), ends(moves_in(record))
    order = Draw(record["id"]).some(list(at), len(at))
    single = [(told, *asked(thing, at[thing])) for thing in order if thing != first[1]]
    return [*single, (told, ALL, _listed(order[::-1], at))]
