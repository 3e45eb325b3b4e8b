"""Mending what is broken: a sentence with slips, or a program with the interpreter's error beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, same, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._twig import ARITY, Fault, parse, run, write
from luthier.practice.words import ANIMALS, FIRST, OBJECTS, PLACES, TOWNS

ABOUT = "a sentence with slips of the pen, a program with an error, or an edit asked for: the mended text"
TAUGHT = False

SENTENCES = [
    "{who} saw a {animal} near the {place} in {town}.",
    "The {animal} took the {thing} from {who} in {town}.",
    "In {town} a {thing} and a {animal} belong to {who}.",
    "{who} sold the {thing} and the {place} to a {animal}.",
]
ASKED = {"text": "Mend: {}", "program": "{}\n{}\nMend it.", "edit": "Write {} for {}: {}"}
SHIFTED = {
    "text": "What should this have said? {}",
    "program": "{}\n{}\nWhat did I mean?",
    "edit": "No {} here but {}: {}",
}


def _slip(draw: Draw, word: str) -> str:
    """The word with one slip: two letters swapped, one doubled, or one lost. Never the word itself."""
    at, kind = draw.between(1, len(word) - 2), draw.below(3)
    if kind == 0 and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[: at + 1] + word[at:] if kind == 1 else word[:at] + word[at + 1 :]


def _sentence(draw: Draw) -> str:
    slots = {
        "who": draw.pick(FIRST),
        "animal": draw.pick(ANIMALS),
        "thing": draw.pick(OBJECTS),
        "place": draw.pick(PLACES),
    }
    return draw.pick(SENTENCES).format(**slots, town=draw.pick(TOWNS))


def _program(draw: Draw, calls: int) -> str:
    word = draw.pick(_WORDS)
    inner = _program(draw, calls - 1) if calls > 1 else str(draw.below(20))
    return f"({word} {inner} {draw.below(20)})" if draw.below(2) else f"({word} {draw.below(20)} {inner})"


_WORDS = tuple(word for word, parts in ARITY.items() if parts == 2 and word != "div")


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: as many slips in the sentence, or calls in the program. Shifted: reworded, one more of them."""
    size, kind = level + shifted, draw.pick(("text", "program", "edit"))
    asked = (SHIFTED if shifted else ASKED)[kind]
    if kind == "program":
        whole = _program(draw, size)
        longer = [m for m in re.finditer(r"[a-z]+", whole) if len(m[0]) > 2]
        if longer and draw.below(2):
            word = draw.pick(longer)
            broken = whole[: word.start()] + _slip(draw, word[0]) + whole[word.end() :]
        else:
            broken = whole[:-1]
        return Item(f"program {whole}", asked.format(broken, run(broken).text()), whole, whole)
    whole = _sentence(draw)
    if kind == "edit":
        old = draw.pick([a for a in _NAMED if re.search(rf"\b{a}\b", whole)])
        new = draw.pick([a for a in (ANIMALS if old in ANIMALS else OBJECTS) if a != old])
        named = (old, new) if shifted else (new, old)
        answer = re.sub(rf"\b{old}\b", new, whole)
        return Item(f"edit {old} {new} {whole}", asked.format(*named, whole), answer, answer)
    words = whole.split(" ")
    longer = [i for i, w in enumerate(words) if len(w) > 3]
    for at in draw.some(longer, min(size, len(longer))):
        words[at] = _slip(draw, words[at])
    return Item(f"text {whole}", asked.format(" ".join(words)), whole, whole)


_NAMED = (*ANIMALS, *OBJECTS)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the whole text again; of a program white space is free."""
    if not answer.startswith("("):
        return same(answer, response)
    try:
        got = write(parse(response))
    except Fault as fault:
        return wrong(f"error: {fault}")
    return right() if got == answer else wrong(f"expected {answer}, got {got[:80]}")


def meaning(record: Mapping[str, Any]) -> str:
    """The whole text; for an edit what is exchanged in which."""
    text, answer = said(record), record["answer"]
    if answer.startswith("("):
        return f"program {answer}"
    if found := re.match(r"Write (\w+) for (\w+): (.*)|No (\w+) here but (\w+): (.*)", text):
        new, old, whole = (found[1], found[2], found[3]) if found[1] else (found[5], found[4], found[6])
        return f"edit {old} {new} {whole}"
    return f"text {answer}"
