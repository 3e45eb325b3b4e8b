"""Into Vellish: the doer first, the verb last, qualities after their noun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, said, same
from luthier.practice.draw import Draw
from luthier.practice.families._vellish import ADJECTIVES, ALONE, COUNTS, LEXICON, NOUNS, VERBS, phrase

ABOUT = "simple sentences into Vellish, an invented language with its own words and order"
TAUGHT = False

ASKED = ["Say in Vellish: {}.", "Translate into Vellish: {}."]


def _sentence(draw: Draw, level: int) -> tuple[str, str]:
    adjective = draw.pick(ADJECTIVES) if level != 2 else ""
    doer, own_doer = phrase(draw.pick(NOUNS), adjective)
    if level == 1:
        verb = draw.pick(list(ALONE))
        return f"{doer} {verb}", f"{own_doer} {LEXICON[verb]}"
    other = draw.pick(ADJECTIVES) if level == 3 and draw.below(2) else ""
    done, own_done = phrase(draw.pick(NOUNS), other, draw.pick(["", *COUNTS]))
    verb = draw.pick(list(VERBS))
    return f"{doer} {verb} {done}", f"{own_doer} {own_done} {LEXICON[verb]}"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1: someone of some quality does something. 2: someone does something to someone or several. 3: with
    qualities too. Shifted: two sentences joined, asked in other words at level 1."""
    english, own = _sentence(draw, level)
    asked = draw.pick(ASKED)
    if shifted:
        second, own_second = _sentence(draw, 1 if level < 3 else 2)
        english, own = f"{english} and {second}", f"{own} {LEXICON['and']} {own_second}"
        asked = "How would a Vell say: {}?" if level == 1 else asked
    return Item(english, asked.format(english), own, own)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the Vellish sentence, word for word."""
    return same(answer, response)


def meaning(record: Mapping[str, Any]) -> str:
    """The sentence."""
    return said(record).partition(": ")[2][:-1]
