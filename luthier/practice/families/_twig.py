"""Twig, a language of nested calls on whole numbers, with an interpreter that counts steps and says what is wrong.

(add 3 (mul 2 4))                 11
(if (lt 5 3) 1 (sub 9 2))         7, and the branch not taken costs nothing
(let x (add 1 2) (mul x x))       9
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2, "lt": 2, "max": 2, "min": 2, "if": 3, "let": 3}
"""Every word of the language and how many parts it takes."""
EITHER_WAY = ("add", "mul", "max", "min")
"""Calls whose two parts may change places."""
LIMIT = 200
"""Steps after which a run is stopped."""
DEEPEST = 40


class Outcome(NamedTuple):
    """A run: its value (None if it failed), how many calls were made, and the error's text."""

    value: int | None
    steps: int
    error: str = ""

    def text(self) -> str:
        """What the interpreter prints."""
        return f"error: {self.error}" if self.value is None else str(self.value)


class Fault(Exception):
    """What is wrong with a program; its text is the error's."""


def parse(source: str) -> str | list:
    """The program as nested lists of words. Raises Fault."""
    parts = re.findall(r"[()]|[^\s()]+", source)
    stack: list[list] = [[]]
    for part in parts:
        if part == "(":
            if len(stack) > DEEPEST:
                raise Fault("too deep")
            stack.append([])
        elif part == ")":
            if len(stack) == 1:
                raise Fault("a ) too many")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(part)
    if len(stack) > 1:
        raise Fault("a ) is missing")
    if len(stack[0]) != 1:
        raise Fault("nothing to run" if not stack[0] else "more than one expression")
    return stack[0][0]


def write(tree: str | list) -> str:
    """The text of a parsed program."""
    return tree if isinstance(tree, str) else f"({' '.join(write(part) for part in tree)})"


def settled(source: str) -> str:
    """The program with the parts of every call whose parts may change places in one order, also where its last bracket is
    missing or its first word has an s too many: programs that differ in nothing else are written alike."""

    def sort(tree: str | list) -> str | list:
        if isinstance(tree, str):
            return tree
        word, *parts = (sort(part) for part in tree)
        return [word, *(sorted(parts, key=str) if str(word).removeprefix("s") in EITHER_WAY else parts)]

    try:
        return write(sort(parse(source)))
    except Fault:
        return f"broken {write(sort(parse(source + ')')))}"


def run(source: str) -> Outcome:
    """Run a program. Never raises: what is wrong is in the outcome."""
    steps = 0

    def value(tree: str | list, names: Mapping[str, int]) -> int:
        nonlocal steps
        if isinstance(tree, str):
            if re.fullmatch(r"-?\d{1,6}", tree):
                return int(tree)
            if tree in names:
                return names[tree]
            raise Fault(f"unknown name {tree}")
        if not tree or not isinstance(tree[0], str):
            raise Fault("a call must begin with a word")
        word, *rest = tree
        if word not in ARITY:
            raise Fault(f"unknown word {word}")
        if len(rest) != ARITY[word]:
            raise Fault(f"{word} takes {ARITY[word]}, got {len(rest)}")
        steps += 1
        if steps > LIMIT:
            raise Fault("out of steps")
        if word == "if":
            return value(rest[1] if value(rest[0], names) else rest[2], names)
        if word == "let":
            if not isinstance(rest[0], str) or not rest[0].isalpha():
                raise Fault("let needs a name")
            return value(rest[2], {**names, rest[0]: value(rest[1], names)})
        a, b = value(rest[0], names), value(rest[1], names)
        if word == "div" and b == 0:
            raise Fault("div by 0")
        result = {"add": a + b, "sub": a - b, "mul": a * b, "lt": int(a < b), "max": max(a, b), "min": min(a, b)}
        return result[word] if word != "div" else a // b

    try:
        return Outcome(value(parse(source), {}), steps)
    except Fault as fault:
        return Outcome(None, steps, str(fault))
