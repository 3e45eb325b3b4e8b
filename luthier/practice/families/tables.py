"""Questions about a small table: look up, count, add up, find the most, sort, filter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, said, same
from luthier.practice.draw import Draw
from luthier.practice.words import FRUITS, TOWNS

ABOUT = "looking up, counting, adding up, sorting and filtering the rows of a small table"
TAUGHT = False

ASKED = {
    "price": ["What does {item} cost?", "Give the price of {item}."],
    "count": ["How many come from {town}?", "Count the rows of {town}."],
    "total": ["What do all cost together?", "Add up the prices."],
    "most": ["Which costs the most?", "Name the dearest."],
    "sort": ["Sort the items by price.", "List the items, cheapest first."],
    "under": ["Which cost less than {limit}?", "List those below {limit}."],
}
SHIFTED = {
    "price": "How much for {item}?",
    "count": "{town} sells how many of these?",
    "total": "One of each, please. How much is it?",
    "most": "Which is beyond my purse first?",
    "sort": "From cheap to dear, what are the items?",
    "under": "I have less than {limit}. What can I buy?",
}
SIZES = {1: 3, 2: 4, 3: 6}


def _answer(kind: str, rows: list[tuple[str, str, int]], item: str, town: str, limit: int) -> str:
    if kind == "price":
        return str(next(price for name, _, price in rows if name == item))
    if kind == "count":
        return str(sum(place == town for _, place, _ in rows))
    if kind == "total":
        return str(sum(price for _, _, price in rows))
    ordered = sorted(rows, key=lambda row: row[2])
    if kind == "most":
        return ordered[-1][0]
    kept = ordered if kind == "sort" else [row for row in rows if row[2] < limit]
    return ", ".join(row[0] for row in kept) or "none"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: tables of 3, 4, 6 rows. Shifted: reworded, two rows more."""
    size = SIZES[level] + 2 * shifted
    items, prices = draw.some(FRUITS, size), draw.some(range(1, 60), size)
    towns = draw.some(TOWNS, 3)
    rows = [(item, draw.pick(towns), price) for item, price in zip(items, prices, strict=True)]
    kind = draw.pick(_KINDS)
    item, town, limit = draw.pick(items), rows[0][1], draw.pick(prices) + 1
    table = "\n".join(["item | town | price", *(f"{a} | {b} | {c}" for a, b, c in rows)])
    asked = (SHIFTED[kind] if shifted else draw.pick(ASKED[kind])).format(item=item, town=town, limit=limit)
    answer = _answer(kind, rows, item, town, limit)
    asked_for = {"price": item, "count": town, "under": limit}.get(kind, "")
    return Item(f"{kind} {asked_for} {_key(rows)}", f"{table}\n{asked}", answer, answer)


_KINDS = tuple(ASKED)


def _key(rows: list[tuple[str, str, int]]) -> str:
    return ";".join(f"{a},{b},{c}" for a, b, c in rows)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is the value, or the items in their order (of the table, where no other is asked for)."""
    return same(answer, response)


def meaning(record: Mapping[str, Any]) -> str:
    """The table, and what is asked of it."""
    *lines, asked = said(record).split("\n")
    rows = [(a, b, int(c)) for a, b, c in (line.split(" | ") for line in lines[1:])]
    for kind, ways in ASKED.items():
        for way in (*ways, SHIFTED[kind]):
            if found := re.fullmatch(re.sub(r"\\{\w+\\}", r"(\\w+)", re.escape(way)), asked):
                return f"{kind} {''.join(found.groups())} {_key(rows)}"
    return asked
