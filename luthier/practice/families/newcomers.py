"""The same questions about people who moved in after the practice base was trained: new knowledge."""

from __future__ import annotations

from luthier.practice.contract import Item
from luthier.practice.draw import Draw
from luthier.practice.families._people import ask, meaning, verify

__all__ = ["ABOUT", "TAUGHT", "make", "meaning", "verify"]

ABOUT = "the same questions about 360 people the practice base has never heard of"
TAUGHT = False


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """A question about one of the people whom the practice base has never met."""
    return ask(draw, level, shifted, new=True)
