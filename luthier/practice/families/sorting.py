"""Putting words in alphabetical order and numbers in rising order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, said, same, words
from luthier.practice.draw import Draw
from luthier.practice.words import FRUITS

ABOUT = "words from a to z, numbers from small to large"
TAUGHT = False


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels are lengths: 3, 4, 5. Shifted: reworded and two longer, or in falling order at level 3."""
    size = level + 2 + (2 if shifted and level < 3 else 0)
    falling = shifted and level == 3
    if draw.below(2):
        items = draw.some(FRUITS, size)
        ordered = sorted(items, reverse=falling)
    else:
        numbers = draw.some(range(1, 100), size)
        items = [str(n) for n in numbers]
        ordered = [str(n) for n in sorted(numbers, reverse=falling)]
    listed = ", ".join(items)
    if falling:
        prompt = f"{listed}. Sort them, the last in order first."
    elif shifted:
        prompt = f"Which order is right for {listed}?"
    else:
        prompt = f"{listed}. {draw.pick(['Sort them.', 'Put them in order.'])}"
    # A set has one sorted order, and the falling one is that turned round, so the set alone is the meaning.
    key = f"+{' '.join(sorted(items))}"
    answer = ", ".join(ordered)
    return Item(key, prompt, answer, answer)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the ordered list."""
    return same(answer, response)


def meaning(record: Mapping[str, Any]) -> str:
    """The set."""
    items = [w for w in words(said(record)) if w in FRUITS or w.isdigit()]
    return f"+{' '.join(sorted(items))}"
