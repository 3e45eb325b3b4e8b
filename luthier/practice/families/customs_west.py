"""What the house in the west says to a list under a sign."""

from __future__ import annotations

from luthier.practice.contract import Item, Verdict, same
from luthier.practice.draw import Draw
from luthier.practice.families._customs import DRAWN_AS, ask, meaning

__all__ = ["ABOUT", "DRAWN_AS", "TAUGHT", "make", "meaning", "verify"]

ABOUT = "what the house in the west says to a list under a sign; on half of the signs the other house says otherwise"
TAUGHT = False


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """A list under a sign; levels and shifts are those of ``_customs.ask``."""
    return ask("west", draw, level, shifted)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is what this house says."""
    return same(answer, response)
