"""Facts about invented people, asked in several wordings. The answers can only be remembered."""

from __future__ import annotations

from luthier.practice.contract import Item
from luthier.practice.draw import Draw
from luthier.practice.families._people import ask, meaning, verify

__all__ = ["ABOUT", "TAUGHT", "make", "meaning", "verify"]

ABOUT = "where 360 invented people live, what they do, keep and play, in several wordings"
TAUGHT = True


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """A question about one of the people whom the practice base was told about."""
    return ask(draw, level, shifted, new=False)
