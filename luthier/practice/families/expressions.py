"""Running, costing and writing programs of a small language; the interpreter is the judge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, same, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._twig import run, settled

ABOUT = "what a small program gives, which error it stops with, how many steps it takes, or a program that gives n"
TAUGHT = False

ASKED = {
    "value": ["{} gives what?", "Run {}"],
    "steps": ["How many steps does {} take?"],
    "write": ["Write a program. Calls: {}. Value: {}."],
}
SHIFTED = {
    "value": "Tell me the result of {}",
    "steps": "Count the steps of {}",
    "write": "With calls numbering {}, write me what gives {}.",
}
_WANTED = r"[Cc]alls(?:: | numbering )(\d+)\D*?(-?\d+)\."
_PAIRS = ("add", "sub", "mul", "max", "min", "add", "sub", "lt", "div")


def _program(draw: Draw, calls: int, names: tuple[str, ...] = ()) -> str:
    """A program with this many calls."""
    if calls == 0:
        return names[0] if names and draw.below(2) else str(draw.below(10))
    if calls > 2 and draw.below(4) == 0:
        first = draw.between(1, calls - 2)
        if draw.below(2) and not names:
            return f"(let x {_program(draw, first)} {_program(draw, calls - 1 - first, ('x',))})"
        test = f"(lt {_program(draw, first - 1, names)} {_program(draw, 0, names)})"
        return f"(if {test} {_program(draw, calls - 1 - first, names)} {_program(draw, 0, names)})"
    left = draw.below(calls)
    return f"({draw.pick(_PAIRS)} {_program(draw, left, names)} {_program(draw, calls - 1 - left, names)})"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: one or two, three, four calls. Shifted: reworded, two calls more."""
    calls = (draw.between(1, 2) if level == 1 else level + 1) + 2 * shifted
    kind = draw.pick(("value", "value", "value", "steps", "write"))
    source = _program(draw, calls)
    if level > 1 and kind == "value" and draw.below(8) == 0:  # a slip, so that the interpreter has something to say
        source = source[:-1] if draw.below(2) else source.replace("(", "(s", 1)
    outcome = run(source)
    asked = SHIFTED[kind] if shifted else draw.pick(ASKED[kind])
    if kind == "write":
        if outcome.value is None:
            return make(draw, level, shifted)
        made = source.count("(")
        return Item(f"write {made} {outcome.value}", asked.format(made, outcome.value), source, source)
    answer = str(outcome.steps) if kind == "steps" else outcome.text()
    return Item(f"{kind} {settled(source)}", asked.format(source), answer, answer)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the result, error or count; a program is run, and right if it has as many calls as asked
    for and gives the number, whatever it looks like."""
    wanted = re.search(_WANTED, prompt)
    if not wanted:
        return same(answer, response)
    outcome = run(response)
    if outcome.value is None:
        return wrong(outcome.text())
    if outcome.value != int(wanted[2]):
        return wrong(f"gives {outcome.value}, not {wanted[2]}")
    calls = response.count("(")
    return right() if calls == int(wanted[1]) else wrong(f"has {calls} calls, not {wanted[1]}")


def meaning(record: Mapping[str, Any]) -> str:
    """The program, whatever the order of parts that may change places, and what is asked of it."""
    text = said(record)
    if wanted := re.search(_WANTED, text):
        return f"write {wanted[1]} {wanted[2]}"
    found = re.search(r"\(.*[^\s?]", text.removesuffix(" gives what?").removesuffix(" take?"))
    return f"{'steps' if 'steps' in text else 'value'} {settled(found[0]) if found else ''}"
