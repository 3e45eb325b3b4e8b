"""Adding and taking away, with the steps written out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import FIRST, FRUITS

ABOUT = "adding and taking away up to 98, with worked steps"
TAUGHT = True

PLAIN = {
    "+": ["What is {a} + {b}?", "Add {a} and {b}.", "{a} plus {b}?"],
    "-": ["What is {a} - {b}?", "Take {b} from {a}.", "{a} minus {b}?"],
}
TOLD = {
    "+": "{who} has {a} {fruit}s and picks {b} more. How many now?",
    "-": "{who} has {a} {fruit}s and eats {b}. How many are left?",
}
ADDED = (5, 6, 7, 8, 9, 11, 12, 13, 14)
"""What longer sums add and take away. Never a ten alone: 49 - 10 - 6 would have the working of 49 - 16."""


def _steps(total: int, terms: list[tuple[str, int]]) -> tuple[str, int]:
    """One line of working (the tens of a term first, then its ones) and the result."""
    done = []
    for sign, term in terms:
        for part in (term // 10 * 10, term % 10):
            if part:
                result = total + part if sign == "+" else total - part
                done.append(f"{total}{sign}{part}={result}")
                total = result
    return ", ".join(done), total


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1: up to 20 in one step. Level 2: up to 88. Level 3: three numbers, up to 98. Shifted:
    four, five or six numbers."""
    if shifted:
        terms = [("", draw.between(30, 60))] + [(draw.pick("+-"), draw.pick(ADDED)) for _ in range(2 + level)]
    elif level == 1:
        a, b = draw.between(1, 10), draw.between(1, 10)
        terms = [("", a), ("+", b)] if draw.below(2) else [("", a + b), ("-", b)]
    elif level == 2:
        a, b = draw.between(11, 59), draw.between(10, 29)
        low, high = min(a, b), max(a, b)
        terms = [("", a), ("+", b)] if draw.below(2) else [("", high), ("-", low)]
    else:
        a, b = draw.between(10, 60), 10 * draw.below(3) + draw.between(1, 9)
        third = draw.pick("+-")
        terms = [("", a), ("+", b), (third, draw.between(1, 9))]
    working, total = _steps(terms[0][1], terms[1:])
    # 3 + 8 and 8 + 3 are one meaning.
    key = ",".join([*sorted(str(n) for s, n in terms if s != "-"), *sorted(f"-{n}" for s, n in terms if s == "-")])
    if len(terms) == 2:
        sign, b = terms[1]
        ways = PLAIN[sign]
        way = draw.below(len(ways) + 1)
        a = terms[0][1]
        if way < len(ways):
            prompt = ways[way].format(a=a, b=b)
        else:
            prompt = TOLD[sign].format(who=draw.pick(FIRST), a=a, b=b, fruit=draw.pick(FRUITS))
    else:
        said = " ".join(f"{s} {n}" if s else str(n) for s, n in terms)
        prompt = f"{said}?" if shifted and draw.below(2) else f"What is {said}?"
    return Item(key, prompt, f"{working}. So {total}.", str(total))


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the last number of the response is the result; steps that are false sums are named in the reason."""
    numbers = re.findall(r"-?\d+", response)
    if not numbers:
        return wrong("no number")
    if numbers[-1] != answer:
        return wrong(f"expected {answer}, got {numbers[-1]}")
    slips = [
        f"{a}{s}{b}={c}"
        for a, s, b, c in re.findall(r"(\d+)\s*([+-])\s*(\d+)\s*=\s*(-?\d+)", response)
        if int(a) + (int(b) if s == "+" else -int(b)) != int(c)
    ]
    return right(f"right, though {slips[0]} is not" if slips else "as it should be")


def meaning(record: Mapping[str, Any]) -> str:
    """The sum, in any words and any order of its terms."""
    text = said(record)
    if re.search(r"\d [+-] \d", text):
        terms = re.findall(r"([+-]?) ?(\d+)", text)
    else:
        a, b = re.findall(r"\d+", text)
        less = re.search("Take|minus|eats", text)
        terms = [("", b), ("-", a)] if text.startswith("Take") else [("", a), ("-" if less else "+", b)]
    return ",".join([*sorted(n for s, n in terms if s != "-"), *sorted(f"-{n}" for s, n in terms if s == "-")])
