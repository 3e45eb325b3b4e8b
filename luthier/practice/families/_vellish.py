"""Vellish, a small invented language: its words and its one rule of order."""

from __future__ import annotations

from luthier.practice.draw import Draw
from luthier.practice.words import ANIMALS, invented, listed

NOUNS = [*ANIMALS, "girl", "boy", "miller", "moon", "tree", "boat"]
ADJECTIVES = listed("red old small wise lost brave quiet young")
VERBS = {"sees": "see", "finds": "find", "calls": "call", "follows": "follow", "helps": "help", "hears": "hear"}
ALONE = {"sleeps": "sleep", "sings": "sing", "waits": "wait", "dreams": "dream"}
COUNTS = {"two": 2, "three": 3}


def _lexicon() -> dict[str, str]:
    draw = Draw("luthier/vellish")
    meanings = [*NOUNS, *ADJECTIVES, *VERBS, *ALONE, *COUNTS, "and"]
    found: dict[str, str] = {}
    while len(found) < len(meanings):
        word = invented(draw)
        if word not in found.values() and not word.endswith("en"):
            found[meanings[len(found)]] = word
    return found


LEXICON = _lexicon()
"""English word -> Vellish word."""
WORDS = frozenset(LEXICON.values())
PLURAL = "en"


def phrase(noun: str, adjective: str = "", count: str = "") -> tuple[str, str]:
    """A noun phrase in English and in Vellish, where qualities follow the noun and several take an ending."""
    plural = noun + "s" if noun != "fox" else "foxes"
    english = " ".join(w for w in (count or "the", adjective, plural if count else noun) if w)
    own = LEXICON[noun] + (PLURAL if count else "")
    return english, " ".join([own, *(LEXICON[w] for w in (adjective, count) if w)])
