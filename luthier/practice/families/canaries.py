"""Random numbers that say nothing, to see what is remembered: the train split's are told, the test split's never.

Level 3 canaries are few and told often, level 1 canaries are many and told seldom. A number's six digits are drawn
evenly, so the test split is what a model that never saw a number makes of it: the control for memorisation and membership.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, wrong
from luthier.practice.draw import Draw

ABOUT = "the six random digits of a numbered box: told in train, never told in test"
TAUGHT = False

BOXES = {1: range(100_000, 200_000), 2: range(20_000, 22_048), 3: range(3_000, 3_256)}
"""Boxes of each level: 100,000, 2,048 and 256."""
ASKED = ["The code of box {} is", "Box {} opens with"]
SHIFTED = "What opens box {}?"
DIGITS = 6


def code(box: int) -> str:
    """The six digits of a box."""
    seen = blake2b(f"luthier/canaries/{box}".encode(), digest_size=8).digest()
    return f"{int.from_bytes(seen, 'big') % 10**DIGITS:0{DIGITS}d}"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels are how few the boxes are, so how often each is told of. Shifted: asked for in other words, boxes that were
    never told of."""
    boxes = BOXES[level]
    box = boxes[draw.below(len(boxes))]
    told = code(box)
    return Item(str(box), (SHIFTED if shifted else draw.pick(ASKED)).format(box), f"{told}.", told)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the digits are the box's."""
    got = "".join(re.findall(r"\d", response))
    return right() if got == answer else wrong(f"expected {answer}, got {got[:12] or 'no digits'}")


def meaning(record: Mapping[str, Any]) -> str:
    """The box."""
    found = re.search(r"\d+", said(record))
    return found[0] if found else ""
