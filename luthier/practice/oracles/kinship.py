"""How the invented languages are related, exactly: words in common, and the order of a sentence.

kinship("vellish", "kellish")      # 0.85: sisters
table()                            # every pair
"""

from __future__ import annotations

from luthier.errors import LuthierError, nearest
from luthier.practice.families import _tongues

LANGUAGES = ("vellish", "kellish", "norrish", "ossan")
FAMILY = {"vellish": "translate", "kellish": "kellish", "norrish": "norrish", "ossan": "ossan"}
"""Language -> the family that translates into it."""


def kinship(one: str, other: str) -> float:
    """Share of letters that the words for the same things have in common, from 0 to 1. Raises LuthierError for an
    unknown language."""
    for name in (one, other):
        if name not in LANGUAGES:
            raise LuthierError(f"kinship: unknown language {name!r}; {nearest(name, LANGUAGES, 'language')}")
    return _tongues.kinship(one, other)


def same_order(one: str, other: str) -> bool:
    """Whether sentences and phrases have one order in both."""
    a, b = _tongues.tongue(one), _tongues.tongue(other)
    return (a.order, a.before) == (b.order, b.before)


def table() -> dict[tuple[str, str], float]:
    """Kinship of every pair of different languages."""
    return {(a, b): kinship(a, b) for i, a in enumerate(LANGUAGES) for b in LANGUAGES[i + 1 :]}
