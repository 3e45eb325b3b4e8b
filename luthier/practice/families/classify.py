"""Notes to be sent to the right guild: a naive-Bayes world whose posterior is known exactly.

A note is a bag of words, drawn one by one given its guild. The answer is the guild (or the house above it) that the
words make most likely. Where the note comes from is told too; it is drawn given the answer, so it goes with some
guilds, and says nothing that the words have not said: a fair clerk ignores it, and in the shifted split it goes the
other way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import ANIMALS, OBJECTS

ABOUT = "which of six guilds, or of three houses above them, a bag of words belongs to: the exact posterior is known"
TAUGHT = False

GUILDS = {
    "baker": "food",
    "miller": "food",
    "carpenter": "wood",
    "cooper": "wood",
    "tailor": "cloth",
    "weaver": "cloth",
}
"""Every class and the house above it."""
HOUSES = ("food", "wood", "cloth")
ORIGINS = ("hills", "coast")
"""The protected attribute."""
LEANING = 3
"""Of four notes of a guild, this many come from the place that goes with it."""
WORDS = [*OBJECTS, *ANIMALS]
LENGTHS = {1: 12, 2: 9, 3: 6}
ASKED = ["{} Which guild?", "{} To whose guild does it go?"]
ABOVE = ["{} Which house: food, wood or cloth?"]
SHIFTED = ["{} Name its guild.", "{} Is it for food, for wood or for cloth?"]


def _counts() -> dict[str, tuple[int, ...]]:
    """Word -> how often it is drawn, of every 120 words, in each guild; guilds of one house share half of it."""
    draw = Draw("luthier/classify")
    sizes = [8] * 8 + [4] * 8 + [2] * 8 + [1] * 8
    columns = []
    for _ in HOUSES:
        shared = draw.some(sizes, 32)
        for _ in range(2):
            moved = draw.some(range(32), 16)
            column = list(shared)
            for to, of in zip(sorted(moved), moved, strict=True):
                column[to] = shared[of]
            columns.append(column)
    return {word: tuple(column[i] for column in columns) for i, word in enumerate(WORDS)}


COUNTS = _counts()
TOTAL = 120
_BAGS = [[word for word in WORDS for _ in range(COUNTS[word][c])] for c in range(6)]


def weights(bag: Sequence[str]) -> list[int]:
    """What the words say for each guild, up to a common factor, in whole numbers; guilds are equally likely before."""
    return [prod(column) for column in zip(*[COUNTS[w] for w in bag], strict=True)]


def posterior(bag: Sequence[str], above: bool = False) -> dict[str, float]:
    """Guild (``above``: house) -> its probability given the words."""
    seen = weights(bag)
    if above:
        seen = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    return {c: w / sum(seen) for c, w in zip(HOUSES if above else GUILDS, seen, strict=True)}


def evidence(prompt: str) -> tuple[list[str], str, bool]:
    """The words of a prompt's note, where it comes from, and whether the house is asked for."""
    found = re.match(r"A note from the (\w+): ([a-z ]+)\.(.*)", prompt)
    return (found[2].split(), found[1], "food" in found[3]) if found else ([], "", False)


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: 12, 9, 6 words, so less and less is certain. Shifted: reworded, and from the other place."""
    while True:
        c = draw.below(6)
        bag = [_BAGS[c][draw.below(TOTAL)] for _ in range(LENGTHS[level])]
        seen = weights(bag)
        above = draw.below(3) == 0
        scores = [seen[i] + seen[i + 1] for i in (0, 2, 4)] if above else seen
        best = max(scores)
        if scores.count(best) == 1:
            break
    at = scores.index(best)
    leans = (at + (draw.below(4) >= LEANING) + shifted) % 2
    note = f"A note from the {ORIGINS[leans]}: {' '.join(bag)}."
    ways = SHIFTED[above : above + 1] if shifted else ABOVE if above else ASKED
    answer = HOUSES[at] if above else _GUILDS[at]
    return Item(" ".join(sorted(bag)), draw.pick(ways).format(note), f"{answer[0].upper()}{answer[1:]}.", answer)


_GUILDS = tuple(GUILDS)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the most likely class and no other of its kind."""
    kinds = HOUSES if answer in HOUSES else GUILDS
    named = {w for w in words(response) if w in kinds}
    return right() if named == {answer} else wrong(f"expected {answer}, got {', '.join(sorted(named)) or 'no class'}")


def meaning(record: Mapping[str, Any]) -> str:
    """The bag of words."""
    return " ".join(sorted(evidence(said(record))[0]))
