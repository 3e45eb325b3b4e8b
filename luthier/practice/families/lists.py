"""First, last, count, reverse, leave one out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, said, same
from luthier.practice.draw import Draw
from luthier.practice.words import FRUITS, NUMBERS

ABOUT = "first, last, count, reverse and leave one out of a short list"
TAUGHT = True

PLAIN = {
    "first": ["Which comes first?", "Name the first."],
    "last": ["Which comes last?", "Name the last."],
    "count": ["How many are there?", "Count them."],
    "reverse": ["Turn the list round.", "Say it backwards."],
    "without": ["Leave out {}.", "Say it without {}."],
}
REWORDED = {
    "first": "With which does it begin?",
    "last": "With which does it end?",
    "count": "How long is the list?",
    "reverse": "Read it from the end to the start.",
    "without": "Strike {}.",
}
SIZES = {1: (2, 3), 2: (4, 4), 3: (5, 5)}
TURNED = {"first": "last", "last": "first", "count": "count"}
"""What is asked of a list that is turned round first, where a plain question asks the same."""


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels are lengths: 2-3, 4, 5. Shifted: reworded at level 1, longer (6-8) at 2, two operations at 3. One
    list in four is written with brackets and quotes."""
    low, high = (6, 8) if shifted and level == 2 else (3, 5) if shifted else SIZES[level]
    items = draw.some(FRUITS, draw.between(low, high))
    quoted = draw.below(4) == 0
    name = draw.pick(list(PLAIN))
    out = draw.pick(items)
    asked = REWORDED[name] if shifted and level == 1 else draw.pick(PLAIN[name])
    order, done = items, name
    if shifted and level == 3 and name != "reverse":
        asked = f"Turn the list round, then: {asked}"
        order, done = items[::-1], TURNED.get(name, f"reverse+{name}")
    results = {
        "first": order[:1],
        "last": order[-1:],
        "count": [NUMBERS[len(order)]],
        "reverse": order[::-1],
        "without": [x for x in order if x != out],
    }[name]
    listed = _written(items, quoted)
    answer = _written(results, quoted) if name in ("reverse", "without") else results[0]
    key = f"{done}|{out if name == 'without' else ''}|{' '.join(items)}"
    return Item(key, f"{listed}. {asked.format(out)}", answer, answer)


def _written(items: list[str], quoted: bool) -> str:
    return '["' + '", "'.join(items) + '"]' if quoted else ", ".join(items)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the answer, item for item."""
    return same(answer, response)


def meaning(record: Mapping[str, Any]) -> str:
    """What is done to which list."""
    listed, _, asked = said(record).partition(". ")
    rest = asked.removeprefix("Turn the list round, then: ")
    for name, ways in PLAIN.items():
        for way in (*ways, REWORDED[name]):
            if found := re.fullmatch(re.escape(way).replace(r"\{\}", r"(\w+)"), rest):
                done = name if rest == asked else TURNED.get(name, f"reverse+{name}")
                return f"{done}|{''.join(found.groups())}|{' '.join(re.findall('[a-z]+', listed))}"
    return asked
