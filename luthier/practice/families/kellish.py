"""Into Kellish: a close sister of Vellish."""

from __future__ import annotations

from luthier.practice.contract import Item, Verdict, same
from luthier.practice.draw import Draw
from luthier.practice.families._tongues import DRAWN_AS, ask, meaning

__all__ = ["ABOUT", "DRAWN_AS", "TAUGHT", "make", "meaning", "verify"]

ABOUT = "simple sentences into Kellish, a close sister of Vellish"
TAUGHT = False


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """A sentence and its translation; levels and shifts are those of ``_tongues.ask``."""
    return ask("kellish", draw, level, shifted)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the Kellish sentence, word for word."""
    return same(answer, response)
