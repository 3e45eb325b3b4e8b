"""What a family's file provides, and the words of a verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from luthier.practice.draw import Draw

LEVELS = (1, 2, 3)
"""Grades of difficulty every family has, easiest first."""


class Item(NamedTuple):
    """One task before it becomes a record.

    ``key`` states what the task means whatever its wording; splits are drawn on it, so that no meaning is in two.
    """

    key: str
    prompt: str
    response: str
    answer: str
    system: str | None = None
    after: tuple[tuple[str, str], ...] = ()
    """(role, content) of the turns between the prompt and the response, in families of several turns."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of a response: a reward from 0 to 1, the reason, and whether it could decide at all."""

    reward: float
    reason: str
    decided: bool = True


class Family(Protocol):
    """The surface of a file in ``families/``."""

    ABOUT: str
    """One line for people."""
    TAUGHT: bool
    """Whether the practice base was trained on it."""

    def make(self, draw: Draw, level: int, shifted: bool) -> Item:
        """Draw a task of this difficulty; ``shifted`` makes it longer, reworded or recombined."""
        ...

    def verify(self, prompt: str, answer: str, response: str) -> Verdict:
        """Judge a response to the prompt by the known answer. A family of several turns has
        ``judge(record, response)`` beside it, which is asked instead and sees every turn."""
        ...

    def meaning(self, record: Mapping[str, Any]) -> str:
        """The ``Item.key`` of a record, worked out anew from its messages and its answer."""
        ...


def right(reason: str = "as it should be") -> Verdict:
    """Full reward."""
    return Verdict(1.0, reason)


def wrong(reason: str) -> Verdict:
    """No reward, for a stated reason."""
    return Verdict(0.0, reason)


def squeeze(text: str) -> str:
    """The text with every run of white space made one space, and none at the ends."""
    return " ".join(text.split())


def same(answer: str, response: str) -> Verdict:
    """Right if response and answer are the same text but for white space and a final full stop."""
    got, want = squeeze(response).removesuffix("."), squeeze(answer).removesuffix(".")
    return right() if got == want else wrong(f"expected {want!r}, got {got[:80]!r}")


def words(text: str) -> list[str]:
    """The words and numbers of a text, in order, in lower case."""
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


def said(record: Mapping[str, Any], role: str = "user") -> str:
    """The last message of a role; an empty text if there is none."""
    return next((m["content"] for m in reversed(record["messages"]) if m["role"] == role), "")
