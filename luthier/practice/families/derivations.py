"""Chains of small sums over letters, with the steps written out and the result in one of two formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, wrong
from luthier.practice.draw import Draw

ABOUT = "the value of a letter defined through others, in steps; the result after So, or in brackets"
TAUGHT = False

LETTERS = "abcdefghkmnpqrstuvwxyz"
PLAIN, BOXED = "So {}.", "[{}]"
ASKED = {PLAIN: "What is {}?", BOXED: "What is {}? Put it in brackets."}
SHIFTED = {PLAIN: "Find {}.", BOXED: "Find {} and put it in brackets."}
SIZES = {1: 2, 2: 3, 3: 4}


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: two, three, four steps, and from level 2 a letter that does not matter. Shifted: reworded, two
    steps more, lines out of order at level 3. Both formats are asked for equally often."""
    steps = SIZES[level] + 2 * shifted
    names = draw.some(LETTERS, steps + 2)
    total = draw.between(2, 9)
    key, lines, working = [str(total)], [f"{names[0]} = {total}."], [f"{names[0]}={total}"]
    for i in range(1, steps + 1):
        sign = "*" if total < 12 and draw.below(4) == 0 else "-" if total > 9 and draw.below(2) else "+"
        n = draw.between(2, 3) if sign == "*" else draw.between(1, 9)
        result = total * n if sign == "*" else total - n if sign == "-" else total + n
        lines.append(f"{names[i]} = {names[i - 1]} {sign} {n}.")
        working.append(f"{names[i]}={total}{sign}{n}={result}")
        key.append(f"{sign}{n}")
        total = result
    if level > 1:
        lines.insert(draw.between(1, len(lines)), f"{names[-1]} = {names[draw.below(steps)]} + {draw.between(1, 9)}.")
    if shifted and level == 3:
        lines = draw.some(lines, len(lines))
    form = draw.pick((PLAIN, BOXED))
    asked = (SHIFTED if shifted else ASKED)[form].format(names[steps])
    response = f"{', '.join(working)}. {form.format(total)}"
    return Item(" ".join(key), f"{' '.join(lines)} {asked}", response, str(total))


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response ends with the value in the format asked for; false steps are named in the reason."""
    boxed = "brackets" in prompt
    found = re.search(r"\[(-?\d+)\]\s*$" if boxed else r"So (-?\d+)\.?\s*$", response)
    if not found:
        return wrong(f"does not end with the result {'in brackets' if boxed else 'after So'}")
    if found[1] != answer:
        return wrong(f"expected {answer}, got {found[1]}")
    for a, sign, b, c in re.findall(r"(\d+)([-+*])(\d+)=(-?\d+)", response):
        a, b = int(a), int(b)
        if int(c) != (a + b if sign == "+" else a - b if sign == "-" else a * b):
            return right(f"right, though {a}{sign}{b}={c} is not")
    return right()


def meaning(record: Mapping[str, Any]) -> str:
    """The chain, whatever its letters, its order and the lines that do not matter."""
    text = said(record)
    first = dict(re.findall(r"(\w) = (\d+)\.", text))
    later = {to: (of, f"{sign}{n}") for to, of, sign, n in re.findall(r"(\w) = (\w) ([-+*]) (\d+)\.", text)}
    found = re.search(r"(?:What is|Find) (\w)\b", text)
    at, chain = found[1] if found else "", []
    while at in later:
        at, step = later[at]
        chain.append(step)
    return " ".join([first.get(at, ""), *reversed(chain)])
