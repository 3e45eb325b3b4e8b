"""Long lists of who brought what, with one line to be found, lines to be counted, or amounts to be added up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, words, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import FIRST, FRUITS

ABOUT = "a document of 8 to 96 lines: find one line, count some, or add them up"
TAUGHT = False

SIZES = {1: 8, 2: 16, 3: 48}
ASKED = {
    "find": ["What did {} bring on day {}?", "Day {1}, {0}: what was it?"],
    "count": ["How many times did {} come?", "How often is {} named?"],
    "add": ["How many did {} bring in all?", "What is the sum for {}?"],
}
SHIFTED = {
    "find": "On day {1}, which goods came from {0}?",
    "count": "{} came how often?",
    "add": "Add up all of {}'s.",
}


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: 8, 16, 48 lines. Shifted: reworded, and twice as long."""
    size = SIZES[level] * (2 if shifted else 1)
    people = draw.some(FIRST, max(4, size // 4))
    lines = [(draw.pick(people), draw.between(1, 9), draw.pick(FRUITS)) for _ in range(size)]
    kind = draw.pick(("find", "count", "add"))
    day = draw.below(size)
    who = lines[day][0]
    text = "\n".join(f"Day {i + 1}: {w}, {n} {f}." for i, (w, n, f) in enumerate(lines))
    asked = (SHIFTED[kind] if shifted else draw.pick(ASKED[kind])).format(who, day + 1)
    theirs = [n for w, n, _ in lines if w == who]
    answer = lines[day][2] if kind == "find" else str(len(theirs) if kind == "count" else sum(theirs))
    point = day + 1 if kind == "find" else who
    return Item(f"{kind} {point} {_digest(text)}", f"{text}\n{asked}", f"{answer[0].upper()}{answer[1:]}.", answer)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response names the number, or the goods, and no other."""
    named = {w for w in words(response) if w.isdigit() or w in FRUITS}
    return right() if named == {answer} else wrong(f"expected {answer}, got {', '.join(sorted(named)) or 'nothing'}")


def meaning(record: Mapping[str, Any]) -> str:
    """The document, and the line or the name that is asked for."""
    text, _, asked = said(record).rpartition("\n")
    who, day = (
        re.search(r"[A-Z]\w+(?=$|['\s?,:.])(?<!Day)(?<!What)(?<!How)(?<!On)(?<!Add)", asked),
        re.search(r"\d+", asked),
    )
    if day:
        return f"find {day[0]} {_digest(text)}"
    return f"{'count' if 'often' in asked or 'times' in asked else 'add'} {who[0] if who else ''} {_digest(text)}"
