"""Answering from a note, among notes about others, also where it contradicts what one remembers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._people import TRAITS, people
from luthier.practice.words import FIRST, LAST

ABOUT = "a question answered from a note, with distractors, against memory at level 3, and sometimes not answerable"
TAUGHT = False

TOLD = {"town": "{} lives in {}.", "craft": "{} works as a {}.", "pet": "{} keeps a {}.", "music": "{} plays the {}."}
ASKED = {
    "town": "Where does {} live?",
    "craft": "What work does {} do?",
    "pet": "Which animal does {} keep?",
    "music": "What does {} play?",
}
SHIFTED = {
    "town": "In which town is {} at home?",
    "craft": "What is the trade of {}?",
    "pet": "What animal has {}?",
    "music": "Which instrument is {} heard on?",
}
REPLY = {"town": "In {}.", "craft": "A {}.", "pet": "A {}.", "music": "The {}."}
SILENT = "It does not say."
_VALUES = {value.lower() for trait in TRAITS.values() for value in trait.values}
_KINDS = tuple(TOLD)
_KNOWN = {p.name: p.facts for p in people(new=False)}
_STRANGERS = sorted({f"{f} {n}" for f in FIRST for n in LAST} - set(_KNOWN) - {p.name for p in people(new=True)})
_NAMES = tuple(_KNOWN)


def contradicts(prompt: str) -> bool:
    """Whether the note says of the one asked for what the practice base remembers otherwise."""
    who, kind, told = _read(prompt)
    return who in _KNOWN and (who, kind) in told and told[who, kind] != _KNOWN[who][kind]


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1: two lines about strangers. 2: four. 3: four about people the practice base knows, all false to its
    memory. One question in six has no answer in the note. Shifted: reworded, two lines more."""
    known = level == 3
    names = draw.some(_NAMES if known else _STRANGERS, (2 if level == 1 else 4) - 1 + 2 * shifted)
    facts: list[tuple[str, str]] = [(who, draw.pick(_KINDS)) for who in names]
    other = draw.pick([k for k in _KINDS if k != facts[0][1]])
    facts.append((names[0], other))  # the nearest distractor: another fact about the same person
    told = {}
    for who, kind in draw.some(facts, len(facts)):
        value = draw.pick(TRAITS[kind].values)
        while known and value == _KNOWN[who][kind]:
            value = draw.pick(TRAITS[kind].values)
        told[who, kind] = value
    who, kind = facts[0]
    if draw.below(6) == 0:
        kind = next(k for k in _KINDS if (who, k) not in told)
    answer = told.get((who, kind), "")
    note = " ".join(TOLD[k].format(w, value) for (w, k), value in told.items())
    prompt = f"{note} {(SHIFTED if shifted else ASKED)[kind].format(who)}"
    return Item(_key(who, kind, told), prompt, REPLY[kind].format(answer) if answer else SILENT, answer)


def _key(who: str, kind: str, told: Mapping[tuple[str, str], str]) -> str:
    return "|".join([*sorted(f"{w}:{k}={v}" for (w, k), v in told.items()), f"{who}:{kind}?"])


def _read(prompt: str) -> tuple[str, str, dict[tuple[str, str], str]]:
    told = {}
    for kind, way in TOLD.items():
        for who, value in re.findall(way.replace(".", r"\.").format(r"([A-Z]\w+ [A-Z]\w+)", r"(\w+)"), prompt):
            told[who, kind] = value
    question = re.split(r"(?<=\.) ", prompt)[-1]
    for ways in (ASKED, SHIFTED):
        for kind, way in ways.items():
            if found := re.fullmatch(way.replace("?", r"\?").format(r"([A-Z]\w+ [A-Z]\w+)"), question):
                return found[1], kind, told
    return "", "", told


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the note's value and no other, or says that the note does not say."""
    named = {w for w in words(response) if w in _VALUES}
    if not answer:
        silent = not named and "not say" in response
        return right() if silent else wrong(f"the note does not say; got {response[:60]!r}")
    if named == {answer.lower()}:
        return right()
    return wrong(f"expected {answer}, got {', '.join(sorted(named)) or 'no value'}")


def meaning(record: Mapping[str, Any]) -> str:
    """What the note says, in any order, and what is asked."""
    return _key(*_read(said(record)))
