"""Three more invented languages beside Vellish, of known kinship to it and to each other, and their one way to ask.

Kellish is a close sister of Vellish: every word is the Vellish word with b and p, d and t, g and k exchanged, in the
same order. Norrish is a cousin: half of its words are Vellish ones with their vowels moved on (a to e, e to i, …), the
other half its own, and the verb comes first. Ossan is no kin: all its words are its own, and it has the order of
English.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from luthier.practice.contract import Item, said
from luthier.practice.draw import Draw
from luthier.practice.families._vellish import ADJECTIVES, ALONE, COUNTS, LEXICON, NOUNS, PLURAL, VERBS
from luthier.practice.words import invented

DRAWN_AS = "tongues"
"""The three families translate the same sentences, record by record, so that they are parallel texts."""

_SISTER = str.maketrans("bpdtgk", "pbtdkg")
_COUSIN = str.maketrans("aeiou", "eioua")


class Tongue(NamedTuple):
    """A language: its words, its ending for several, and its order (v: verb, d: doer, o: what it is done to; and
    whether qualities stand before their noun)."""

    name: str
    lexicon: dict[str, str]
    plural: str
    order: str
    before: bool


@cache
def tongue(name: str) -> Tongue:
    """vellish, kellish, norrish or ossan."""
    if name == "vellish":
        return Tongue(name, LEXICON, PLURAL, "dov", False)
    if name == "kellish":
        return Tongue(name, {m: w.translate(_SISTER) for m, w in LEXICON.items()}, PLURAL, "dov", False)
    cousin = name == "norrish"
    draw = Draw(f"luthier/{name}")
    kept = set(draw.some(list(LEXICON), len(LEXICON) // 2)) if cousin else set()
    found: dict[str, str] = {m: LEXICON[m].translate(_COUSIN) for m in LEXICON if m in kept}
    taken = {*LEXICON.values(), *found.values()}
    for meant in LEXICON:
        while meant not in found:
            word = invented(draw)
            if word not in taken and not word.endswith(("in", "ul")):
                found[meant] = word
                taken.add(word)
    return Tongue(name, found, "in" if cousin else "ul", "vdo" if cousin else "dvo", not cousin)


def kinship(one: str, other: str) -> float:
    """Share of letters that two languages' words for the same thing have in common: 1 minus the edit distance over the
    longer length, averaged over the lexicon. From 0 to 1."""
    a, b = tongue(one).lexicon, tongue(other).lexicon
    return sum(1 - _distance(a[m], b[m]) / max(len(a[m]), len(b[m])) for m in LEXICON) / len(LEXICON)


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (x != y))
    return row[-1]


class Clause(NamedTuple):
    """Who does what to whom: nouns as (noun, quality, count), the last empty where nothing is done to anyone."""

    doer: tuple[str, str, str]
    verb: str
    done: tuple[str, str, str] | None


def _english_noun(noun: str, quality: str, count: str) -> str:
    several = "foxes" if noun == "fox" else f"{noun}s"
    return " ".join(w for w in (count or "the", quality, several if count else noun) if w)


def english(clause: Clause) -> str:
    """The sentence in English."""
    return " ".join([_english_noun(*clause.doer), clause.verb, *([_english_noun(*clause.done)] if clause.done else [])])


def spoken(clause: Clause, own: Tongue) -> str:
    """The sentence in one of the languages."""
    parts = {"d": clause.doer, "o": clause.done}
    return " ".join(
        own.lexicon[clause.verb] if slot == "v" else _noun(own, *parts[slot])
        for slot in own.order
        if slot == "v" or parts[slot]
    )


def _noun(own: Tongue, noun: str, quality: str, count: str) -> str:
    word = own.lexicon[noun] + (own.plural if count else "")
    rest = [own.lexicon[w] for w in (quality, count) if w]
    return " ".join([*reversed(rest), word] if own.before else [word, *rest])


_ALONE, _VERBS, _COUNTS = list(ALONE), list(VERBS), ["", *COUNTS]


def clause(draw: Draw, level: int) -> Clause:
    """Level 1: someone of some quality does something. 2: to someone or several. 3: with qualities too."""
    doer = (draw.pick(NOUNS), draw.pick(ADJECTIVES) if level != 2 else "", "")
    if level == 1:
        return Clause(doer, draw.pick(_ALONE), None)
    done = (draw.pick(NOUNS), draw.pick(ADJECTIVES) if level == 3 and draw.below(2) else "", draw.pick(_COUNTS))
    return Clause(doer, draw.pick(_VERBS), done)


def ask(name: str, draw: Draw, level: int, shifted: bool) -> Item:
    """A sentence to be put into a language. Shifted: two sentences joined, and at level 1 in other words."""
    own = tongue(name)
    clauses = [clause(draw, level), *([clause(draw, 1 if level < 3 else 2)] if shifted else [])]
    title = name.capitalize()
    way = draw.below(2)
    asked = f"How is this in {title}" if shifted and level == 1 else (f"Into {title}", f"{title} for this")[way]
    told = " and ".join(map(english, clauses))
    answer = f" {own.lexicon['and']} ".join(spoken(c, own) for c in clauses)
    return Item(told, f"{asked}: {told}.", answer, answer)


def meaning(record: Mapping[str, Any]) -> str:
    """The sentence in English."""
    return re.sub(r"^[^:]*: |\.$", "", said(record))
