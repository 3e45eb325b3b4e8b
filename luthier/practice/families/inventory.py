"""Many things are put away and moved; what is where now?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._moves import moves_in, tell
from luthier.practice.words import OBJECTS, PLACES

ABOUT = "what is where after people have moved many things about, each thing with its place"
TAUGHT = False

SIZES = {1: (2, 2), 2: (4, 5), 3: (7, 8)}


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: two, four, seven things in two, five, eight moves; shifted: reworded, and two more moves. The
    response names the things in any order: where one is can then be read off nothing but its own moves.

    Things and moves are never as many as in `tracking`, so that no text of one is a text of the other."""
    things, moves = SIZES[level]
    told, key, at = tell(draw, draw.some(OBJECTS, things), moves + 2 * shifted, shifted)
    question = "Where has everything ended up?" if shifted else "What is where?"
    response = " ".join(f"{thing} {at[thing]}" for thing in draw.some(list(at), things))
    answer = " ".join(f"{thing} {place}" for thing, place in sorted(at.items()))
    return Item("|".join(key), f"{' '.join(told)} {question}", response, answer)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if every thing is named once with its place after it, in any order, and nothing else is."""
    got, due = words(response), answer.split()
    pairs, expected = (sorted(zip(w[::2], w[1::2], strict=False)) for w in (got, due))
    known = all(word in OBJECTS or word in PLACES for word in got)
    return right() if known and len(got) == len(due) and pairs == expected else wrong(f"expected {answer}")


def meaning(record: Mapping[str, Any]) -> str:
    """What went where, in order, whoever did it."""
    return "|".join(moves_in(record))
