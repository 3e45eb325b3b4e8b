"""Facts about 44,352 invented people, told seldom or often: knowledge that competes for room.

Every person has seven facts, 34 bits in all, so the whole family holds 1.5 million bits: half a bit for each parameter
of the practice base. Levels are rarity: the 256 people of level 1 are each told of 16 times as often as the 4,096 of
level 2, and those nearly 10 times as often as the 40,000 of level 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import CRAFTS, FIRST, FRUITS, INSTRUMENTS, LAST, OBJECTS, TOWNS

ABOUT = "seven facts about each of 44,352 people, told often or seldom, in seven wordings"
TAUGHT = False

VALUES: dict[str, list[str]] = {
    "town": TOWNS,
    "craft": CRAFTS,
    "music": INSTRUMENTS,
    "keepsake": OBJECTS[:16],
    "fruit": FRUITS[:16],
    "door": [str(n) for n in range(1, 65)],
    "year": [str(n) for n in range(700, 956)],
}
"""Every kind of fact and its values, all equally likely: 4 bits each of the first five, then 6 and 8."""
BITS = 34
"""What there is to know about one person."""
PEOPLE = {1: range(256), 2: range(256, 4_352), 3: range(4_352, 44_352)}
"""Who is asked about at each level."""
ASKED = {
    "town": ["{} was born in which town?", "Where was {} born?", "What is the birthplace of {}?"],
    "craft": ["What does {} make a living by?", "Which craft has {} learnt?", "Whose bench is it that {} works at?"],
    "music": ["What does {} play on feast days?", "Which instrument has {} mastered?", "On what did {} win the prize?"],
    "keepsake": ["What does {} carry everywhere?", "Which keepsake has {}?", "What is it that {} would never sell?"],
    "fruit": ["What grows in the garden of {}?", "Which harvest does {} bring?", "What does {} like to eat best?"],
    "door": [
        "At which door does one knock for {}?",
        "What is the house number of {}?",
        "Behind which number lives {}?",
    ],
    "year": ["In which year was {} born?", "When did {} come into the world?", "What is the birth year of {}?"],
}
NOUNS = {"town": "birthplace", "craft": "craft", "music": "instrument", "keepsake": "keepsake", "fruit": "harvest"}
NOUNS |= {"door": "door", "year": "birth year"}
ANY = ["Tell me the {1} of {0}.", "{0}: what of the {1}?", "As for {0}, the {1} is what?", "The {1} of {0}, please."]
"""Wordings that fit every kind of fact; the last two are the shifted split's."""
_KNOWN = {value.lower() for values in VALUES.values() for value in values}
_SPREAD, _SHIFT, _NAMES = 31_337, 11, len(FIRST) ** 2 * len(LAST)


def name(i: int) -> str:
    """Person i's name: three words, the first two given names."""
    j = (i * _SPREAD + _SHIFT) % _NAMES
    return f"{FIRST[j % 40]} {FIRST[j // 40 % 40]} {LAST[j // 1600]}"


def number(named: str) -> int:
    """The person of this name, undoing ``name``."""
    first, second, last = named.split()
    j = FIRST.index(first) + 40 * FIRST.index(second) + 1600 * LAST.index(last)
    return (j - _SHIFT) * pow(_SPREAD, -1, _NAMES) % _NAMES


def facts(i: int) -> dict[str, str]:
    """What is true of person i."""
    n = int.from_bytes(blake2b(f"luthier/recall/{i}".encode(), digest_size=8).digest(), "big")
    found = {}
    for kind, values in VALUES.items():
        n, at = divmod(n, len(values))
        found[kind] = values[at]
    return found


def ask(i: int, kind: str, way: int) -> Item:
    """The question for one fact in one wording: 0 to 4 are those of train and test, 5 and 6 the shifted ones."""
    text = ASKED[kind][way] if way < 3 else ANY[way - 3]
    value = facts(i)[kind]
    return Item(f"{i}|{kind}|{way}", text.format(name(i), NOUNS[kind]), f"{value[0].upper()}{value[1:]}.", value)


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels are rarity. Shifted: in wordings that training never uses. As in ``facts`` the meaning is a fact in one
    wording, for an invented fact that was never told cannot be known."""
    people = PEOPLE[level]
    who = people[draw.below(len(people))]
    return ask(who, draw.pick(_KINDS), 5 + draw.below(2) if shifted else draw.below(5))


_KINDS = tuple(VALUES)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the true value and no other value of any kind."""
    named = {w for w in words(response) if w in _KNOWN or w.isdigit()}
    if named == {answer.lower()}:
        return right()
    return wrong(f"expected {answer}, got {', '.join(sorted(named)) or 'no value'}")


def meaning(record: Mapping[str, Any]) -> str:
    """Whose fact is asked for, which, and in which wording."""
    text = said(record)
    found = re.search(r"[A-Z]\w+ [A-Z]\w+ [A-Z]\w+", text)
    assert found, text
    asked = text.replace(found[0], "{}")
    ways = {way.format("{}", NOUNS[k]): (k, n) for k in VALUES for n, way in enumerate((*ASKED[k], *ANY))}
    kind, way = ways[asked]
    return f"{number(found[0])}|{kind}|{way}"
