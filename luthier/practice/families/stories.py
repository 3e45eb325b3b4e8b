"""Very short stories from a grammar, with three things that must occur and a mood that must end them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import ANIMALS, FIRST, OBJECTS, listed

ABOUT = "a story of four sentences about a named person, an animal and a thing, with a happy or a sad end"
TAUGHT = True

OPENINGS = [
    "One morning {who} went to the {place}.",
    "Last winter {who} lived by the {place}.",
    "{who} was walking to the {place}.",
    "Once {who} slept beside the {place}.",
]
THINGS = (*OBJECTS, "kite", "ladle", "sickle")
SETTINGS = listed("river forest mill harbour hill market bridge garden")
TROUBLES = [
    "There the {thing} was lost in the {trap}.",
    "The wind blew the {thing} into the {trap}.",
    "The {thing} fell down into the {trap}.",
]
TRAPS = listed("reeds snow well grass fog mud")
MEETINGS = [
    "A {animal} had seen it all and began to dig.",
    "A {animal} came by and offered to look.",
    "A {animal} heard the cry and ran to help.",
]
ENDS = {
    "happy": [
        "They found it before dark, and {who} laughed.",
        "It was found, and {who} danced all the way home.",
        "Soon it was back, and {who} sang with joy.",
    ],
    "sad": [
        "They never found it, and {who} wept.",
        "It was gone, and {who} went home in silence.",
        "Night came too soon, and {who} sighed.",
    ],
}
ASKED = [
    "Tell a {mood} story about {who}, a {animal} and a {thing}.",
    "I would like a {mood} story with {who}, a {thing} and a {animal}.",
    "{who}, a {animal}, a {thing}: make it {mood}.",
]
REWORDED = [
    "A {thing}, a {animal} and {who}. Let it end {mood}.",
    "Can you make up something {mood}? It needs a {animal}, a {thing} and {who}.",
]


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1 asks in the plainest words, 3 in the shortest. Shifted: reworded, and at level 3 with two animals."""
    who, animal, thing = draw.pick(FIRST), draw.pick(ANIMALS), draw.pick(THINGS)
    mood = draw.pick(("happy", "sad"))
    second = draw.pick([a for a in ANIMALS if a != animal]) if shifted and level == 3 else None
    slots = {"who": who, "thing": thing, "mood": mood, "place": draw.pick(SETTINGS), "trap": draw.pick(TRAPS)}
    asked = REWORDED[level == 2] if shifted else ASKED[level - 1]
    prompt = asked.format(**slots, animal=f"{animal}, a {second}" if second else animal)
    told = [draw.pick(OPENINGS), draw.pick(TROUBLES), *[draw.pick(MEETINGS)] * (2 if second else 1)]
    told.append(draw.pick(ENDS[mood]))
    animals = iter([animal, second or animal])
    story = " ".join(
        line.format(**slots, animal=next(animals)) if "{animal}" in line else line.format(**slots) for line in told
    )
    return Item(f"{who}|{animal}|{second}|{thing}|{mood}", prompt, story, story)


def _pattern(line: str) -> str:
    kinds = {"who": FIRST, "place": SETTINGS, "thing": THINGS, "trap": TRAPS, "animal": ANIMALS}
    text = re.escape(line).replace(r"\{", "{").replace(r"\}", "}")
    return re.sub(r"{(\w+)}", lambda m: "(?:" + "|".join(kinds[m[1]]) + ")", text)


_LINES = {
    part: re.compile("|".join(f"(?:{_pattern(line)})" for line in lines))
    for part, lines in {"opening": OPENINGS, "trouble": TROUBLES, "meeting": MEETINGS, **ENDS}.items()
}


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if every sentence is one of the grammar's in its place, the person, the animals and the thing are those
    asked for and no others, and the end has the mood. The answer is one story of many."""
    sentences = re.findall(r"[^.]+\.", response)
    if not sentences or squeezed(response) != squeezed("".join(sentences)):
        return wrong("not made of whole sentences")
    asked, said = set(words(prompt)), set(words(response))
    for kind in (FIRST, ANIMALS, THINGS):
        wanted, told = ({w.lower() for w in kind} & found for found in (asked, said))
        if wanted != told:
            return wrong(f"asked for {', '.join(sorted(wanted))}, told of {', '.join(sorted(told)) or 'none'}")
    mood = "sad" if "sad" in asked else "happy"
    parts = ["opening", "trouble", *["meeting"] * (len(asked & set(ANIMALS))), mood]
    if len(sentences) != len(parts):
        return wrong(f"{len(sentences)} sentences where {len(parts)} were due")
    for part, sentence in zip(parts, sentences, strict=True):
        if not _LINES[part].fullmatch(sentence.strip()):
            return wrong(f"not a {part} line: {sentence.strip()!r}")
    return right()


def squeezed(text: str) -> str:
    """The text without any white space."""
    return "".join(text.split())


def meaning(record: Mapping[str, Any]) -> str:
    """Who and what it is to tell of, and how it is to end."""
    asked = re.findall(r"\w+", said(record))
    (who,), (thing,) = ([w for w in asked if w in kind] for kind in (FIRST, THINGS))
    first, second = ([w for w in asked if w in ANIMALS] + ["None"])[:2]
    return f"{who}|{first}|{second}|{thing}|{'sad' if 'sad' in asked else 'happy'}"
