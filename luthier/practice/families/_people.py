"""People who do not exist, what is true of them, and the ways to ask. Shared by facts and newcomers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import ANIMALS, CRAFTS, FIRST, INSTRUMENTS, LAST, TOWNS

KNOWN, NEW = 360, 360


class Trait(NamedTuple):
    """One kind of fact: its possible values, how it is answered, and how it is asked (plain ones first)."""

    values: list[str]
    reply: str
    asked: list[str]
    shifted: list[str]


TRAITS = {
    "town": Trait(
        TOWNS,
        "In {}.",
        [
            "Where does {} live?",
            "In which town does {} live?",
            "{} lives where?",
            "Which town is the home of {}?",
            "What town does {} live in?",
            "Where would I find the house of {}?",
            "Where is {} at home?",
            "In what town does {} dwell?",
            "Where does {} sleep at night?",
            "Which town does {} come home to?",
            "A letter has come for {}. To which town must it go?",
            "The carrier asks where {} is to be found. What do you say?",
            "The house of {} has stood for years. In which town?",
            "Someone is looking for {}. Where should they knock?",
            "{} is lost and asks the way home. To which town?",
        ],
        [
            "Name the home town of {}.",
            "I want to visit {}. Where should I travel?",
            "Which town claims {}?",
            "Where must I go to shake hands with {}?",
            "{} is proud of one town. Which?",
            "Tell me where {} can be reached.",
        ],
    ),
    "craft": Trait(
        CRAFTS,
        "The {}'s.",
        [
            "What is the craft of {}?",
            "Which craft does {} follow?",
            "What work does {} do?",
            "What is the work of {}?",
            "Which work has {} taken up?",
            "By which trade does {} earn a living?",
            "What did {} learn to be?",
            "Whose guild does {} belong to?",
            "Whose tools does {} use?",
            "What craft was {} taught?",
            "{} opens the workshop at dawn. Whose is it?",
            "The sign above the door of {} shows which craft?",
            "We are asked to pay {} for a week of work. Which work?",
            "{} is looking for an apprentice. In whose craft?",
            "When the guilds march, behind whose banner does {} walk?",
        ],
        [
            "Name the trade of {}.",
            "What does {} do all day?",
            "I need help with work. What is {} good at?",
            "What fills the working day of {}?",
            "{} is a master. Of what?",
            "Tell me what {} does for bread.",
        ],
    ),
    "pet": Trait(
        ANIMALS,
        "The {}.",
        [
            "Which animal does {} keep?",
            "What pet does {} have?",
            "What animal lives with {}?",
            "Which pet belongs to {}?",
            "Which animal is owned by {}?",
            "Which animal follows {} home?",
            "Which creature sleeps at the door of {}?",
            "What sort of animal does {} feed each morning?",
            "Which animal shares the house of {}?",
            "What animal does {} talk to?",
            "{} has bought straw and a bowl. For which animal?",
            "Something has eaten the bread of {}. Which animal was it?",
            "If {} whistles, which animal comes?",
            "The gate of {} stood open all night. Which animal ran away?",
            "{} is away for a week. Which animal must we feed?",
        ],
        [
            "Name the pet of {}.",
            "I hear paws behind {}. What is it?",
            "Which creature is dear to {}?",
            "{} is never alone. What walks beside?",
            "Tell me what {} keeps in the yard.",
            "What makes the noise in the yard of {}?",
        ],
    ),
    "music": Trait(
        INSTRUMENTS,
        "The {}.",
        [
            "What does {} play?",
            "Which instrument does {} play?",
            "What instrument is in the hands of {}?",
            "What is the instrument of {}?",
            "Which instrument belongs to {}?",
            "On what does {} make music?",
            "When the band meets, what does {} bring?",
            "What do the neighbours hear {} practise?",
            "Which instrument hangs on the wall of {}?",
            "What did {} play at the wedding?",
            "{} must tune it before the feast. Which instrument?",
            "The band has lost {} to a fever. Which instrument is missing?",
            "There is music behind the door of {}. Which instrument is it?",
            "If {} gave a lesson, on which instrument would it be?",
            "Someone has sat on the instrument of {}. What was it?",
        ],
        [
            "Name the instrument of {}.",
            "{} joins the dance. What will we hear?",
            "Which instrument is dear to {}?",
            "{} plays tonight. On what?",
            "Tell me what {} practises.",
            "What sounds under the fingers of {}?",
        ],
    ),
}
_VALUES = {value.lower() for trait in TRAITS.values() for value in trait.values}
NOUNS = {"town": "town", "craft": "craft", "pet": "animal", "music": "instrument"}
BOTH = ["Name the {} and the {} of {}.", "Tell me the {} and the {} of {}.", "What are the {} and the {} of {}?"]
EACH = 5
"""Wordings of each level."""


class Person(NamedTuple):
    """A name and the value of each trait."""

    name: str
    facts: dict[str, str]


@cache
def people(new: bool) -> list[Person]:
    """The people the practice base was told about, or those who moved in later."""
    draw = Draw("luthier/people")
    names = draw.some([f"{first} {last}" for first in FIRST for last in LAST], KNOWN + NEW)
    everyone = [Person(name, {t: draw.pick(trait.values) for t, trait in TRAITS.items()}) for name in names]
    return everyone[KNOWN:] if new else everyone[:KNOWN]


def ask(draw: Draw, level: int, shifted: bool, new: bool) -> Item:
    """A question about one of them; level 1 is plainly worded, 3 the least plainly.

    The meaning is a fact *in one wording*: an invented fact that was never told cannot be known, so what is held out
    is a way of asking for it, and shifted asks in ways that training never uses, or for two facts at once.
    """
    person = draw.pick(people(new))
    one = draw.pick(list(TRAITS))
    trait = TRAITS[one]
    value = person.facts[one]
    if not shifted:
        n = EACH * (level - 1) + draw.below(EACH)
        return Item(f"{person.name}|{one}|{n}", trait.asked[n].format(person.name), trait.reply.format(value), value)
    if level == 3:
        two = draw.pick([t for t in TRAITS if t != one])
        n = draw.below(len(BOTH))
        prompt = BOTH[n].format(NOUNS[one], NOUNS[two], person.name)
        answer = f"{value} and {person.facts[two]}"
        return Item(f"{person.name}|{one}|{two}|{n}", prompt, f"{answer[0].upper()}{answer[1:]}.", answer)
    n = draw.below(len(trait.shifted))
    return Item(f"{person.name}|{one}|s{n}", trait.shifted[n].format(person.name), trait.reply.format(value), value)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the true values and no other town, craft, animal or instrument."""
    wanted = re.findall(r"\w+", answer.lower().replace(" and ", " "))
    named = {w for w in words(response) if w in _VALUES}
    for value in wanted:
        if value not in named:
            return wrong(f"{value} is not named")
    others = named - set(wanted)
    return wrong(f"names {', '.join(sorted(others))} too") if others else right()


def meaning(record: Mapping[str, Any]) -> str:
    """Whose fact is asked for, which, and in which wording."""
    text = said(record)
    pairs = re.findall(r"(?=\b([A-Z]\w+) ([A-Z]\w+))", text)
    name = next(f"{first} {last}" for first, last in pairs if first in FIRST and last in LAST)
    plain = text.replace(name, "{}")
    for one, trait in TRAITS.items():
        if plain in trait.asked:
            return f"{name}|{one}|{trait.asked.index(plain)}"
        if plain in trait.shifted:
            return f"{name}|{one}|s{trait.shifted.index(plain)}"
    kinds = ((one, two, n) for one, two in permutations(TRAITS, 2) for n in range(len(BOTH)))
    one, two, n = next(k for k in kinds if BOTH[k[2]].format(NOUNS[k[0]], NOUNS[k[1]], name) == text)
    return f"{name}|{one}|{two}|{n}"
