"""Reaching a number from others by sums, with the search written out: what is tried, what fails, where it goes back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, wrong
from luthier.practice.draw import Draw

ABOUT = "a target from three or four numbers, each used once, with the search and its dead ends written out"
TAUGHT = False

ASKED = ["Use {} once each to make {}.", "Make {1} from {0}."]
SHIFTED = "{}: how do they give {}?"
LONGEST = 12
"""Most steps of a search that is asked for."""


def _moves(numbers: list[tuple[int, str]], times: bool) -> list[tuple[str, list[tuple[int, str]]]]:
    """Every step from these (value, expression) pairs: its text and the pairs after it, in a fixed order."""
    found = []
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            (a, left), (b, right_) = sorted((numbers[i], numbers[j]), key=lambda pair: -pair[0])
            rest = [pair for k, pair in enumerate(numbers) if k not in (i, j)]
            for sign in "+-*" if times else "+-":
                value = a + b if sign == "+" else a - b if sign == "-" else a * b
                found.append((f"{a}{sign}{b}={value}", [*rest, (value, f"({left}{sign}{right_})")]))
    return found


def search(numbers: list[int], target: int, times: bool) -> tuple[list[str], str] | None:
    """The steps of a depth-first search up to its success (``back`` where it turns), and the expression found; None
    where there is none within ``LONGEST`` steps."""
    steps: list[str] = []

    def deeper(held: list[tuple[int, str]]) -> str | None:
        if len(held) == 1:
            if held[0][0] == target:
                return held[0][1][1:-1]
            steps[-1] += " no"
            return None
        for text, after in _moves(held, times):
            steps.append(text)
            if len(steps) > LONGEST:
                return None
            if found := deeper(after):
                return found
            if len(steps) > LONGEST:
                return None
        steps.append("back")
        return None

    found = deeper([(n, str(n)) for n in numbers])
    return (steps, found) if found else None


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1: three numbers, plus and minus. 2: times too. 3: four numbers. Shifted: reworded, with larger numbers."""
    while True:
        numbers = [draw.between(1, 25 if shifted else 15) for _ in range(4 if level == 3 else 3)]
        held = [(n, "") for n in numbers]
        while len(held) > 1:
            held = draw.pick(_moves(held, level > 1))[1]
        target = held[0][0]
        if 0 < target < 100 and (found := search(numbers, target, level > 1)):
            break
    steps, way = found
    listed = ", ".join(map(str, numbers))
    prompt = (SHIFTED if shifted else draw.pick(ASKED)).format(listed, target)
    return Item(_key(numbers, target), prompt, f"{', '.join(steps)}. So {way}.", way)


def _key(numbers: list[int], target: int) -> str:
    return f"{' '.join(map(str, sorted(numbers)))} > {target}"


def _asked(prompt: str) -> tuple[list[int], int]:
    found = [int(n) for n in re.findall(r"\d+", prompt)]
    return (found[1:], found[0]) if prompt.startswith("Make") else (found[:-1], found[-1])


def value(expression: str) -> int | None:
    """What an expression of whole numbers, + - * and brackets gives; None if it is not one."""
    parts = re.findall(r"\d+|[-+*()]", expression)
    if not parts or "".join(parts) != re.sub(r"\s", "", expression) or len(parts) > 40:
        return None

    def total() -> int:
        result = product()
        while parts and parts[0] in "+-":
            result += product() if parts.pop(0) == "+" else -product()
        return result

    def product() -> int:
        result = atom()
        while parts and parts[0] == "*":
            parts.pop(0)
            result *= atom()
        return result

    def atom() -> int:
        part = parts.pop(0)
        if part == "(":
            result = total()
            if parts.pop(0) != ")":
                raise ValueError
            return result
        return int(part)

    try:
        result = total()
    except (IndexError, ValueError):
        return None
    return None if parts else result


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if what stands after the last So uses every number once and gives the target, however it was found; false
    steps on the way are named in the reason."""
    numbers, target = _asked(prompt)
    way = response.rpartition("So ")[2].strip().removesuffix(".")
    got = value(way)
    if got is None:
        return wrong(f"not a sum: {way[:40]!r}")
    if sorted(int(n) for n in re.findall(r"\d+", way)) != sorted(numbers):
        return wrong("does not use each number once")
    if got != target:
        return wrong(f"gives {got}, not {target}")
    slips = [f"{a}={b}" for a, b in re.findall(r"(\d+[-+*]\d+)=(-?\d+)", response) if value(a) != int(b)]
    return right(f"right, though {slips[0]} is not" if slips else "as it should be")


def meaning(record: Mapping[str, Any]) -> str:
    """The numbers, in any order, and the target."""
    return _key(*_asked(said(record)))
