"""Questions in plain words, to be answered by a query, which SQLite runs on databases that nobody sees."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from luthier.practice.contract import Item, Verdict, right, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import FRUITS, TOWNS

ABOUT = "an SQL query for a question in plain words; SQLite runs it"
TAUGHT = False

SYSTEM = "Table stall(item, town, price, stock). Answer with one SQLite query."
COLUMNS = ("price", "stock")
SIGNS = {"<": "below", ">": "above"}
ROWS, STEPS = 99, 200_000
"""Rows of a whole hidden database, and how many instructions of SQLite a query may take."""


def _condition(draw: Draw) -> tuple[str, str]:
    if draw.below(2):
        town = draw.pick(TOWNS[:6])
        return f"in {town}", f"town = '{town}'"
    column, sign, n = draw.pick(COLUMNS), draw.pick("<>"), draw.between(20, 80)
    return f"with a {column} {SIGNS[sign]} {n}", f"{column} {sign} {n}"


def _key(query: str) -> str:
    head, _, rest = query.partition(" WHERE ")
    where, *tail = re.split(r"(?= ORDER| GROUP|;)", rest, maxsplit=1)
    return f"{head} WHERE {' AND '.join(sorted(where.split(' AND ')))}{''.join(tail)}"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1: rows under one condition. 2: a count, a sum, the least or the most. 3: ordered, cut or grouped. Shifted:
    reworded, with a second condition."""
    told, where = _condition(draw)
    if shifted or (level == 3 and draw.below(2)):
        while True:
            more, second = _condition(draw)
            if second.split()[0] != where.split()[0]:
                break
        told, where = f"{told} and {more}", f"{where} AND {second}"
    column = draw.pick(COLUMNS)
    if level == 1:
        asked, select, tail = "Which items are {}?", "item", ""
    elif level == 2:
        kind = draw.below(4)
        name = ("COUNT(*)", f"SUM({column})", f"MIN({column})", f"MAX({column})")[kind]
        asked = (
            "How many rows are {{}}?",
            "What is the total {} of those {{}}?",
            "What is the least {} {{}}?",
            "What is the most {} {{}}?",
        )[kind].format(column)
        select, tail = name, ""
    elif draw.below(2):
        falls, n = draw.below(2), draw.between(2, 5)
        asked = f"Name the items {{}}, {'most' if falls else 'least'} {column} first, {n} of them."
        select, tail = "item", f" ORDER BY {column}{' DESC' if falls else ''} LIMIT {n}"
    else:
        asked, select, tail = (
            f"For each town, give its name and the total {column} of rows {{}}.",
            f"town, SUM({column})",
            " GROUP BY town",
        )
    query = f"SELECT {select} FROM stall WHERE {where}{tail};"
    prompt = asked.format(told)
    if shifted:
        prompt = f"I want a query. {prompt}"
    return Item(_key(query), prompt, query, query, SYSTEM)


_CONDITION = re.compile(r"(town|price|stock) (=|<|>) (?:'(\w+)'|(\d+))")


def _rows(answer: str, world: int) -> tuple[list[list[Any]], list[list[list[Any]]]]:
    """The rows of a hidden database, made for one true query, and for every threshold those just below it, on it and
    just above it, all of which the other conditions let through, so that a query with < for <= gives others. Prices and
    stocks are all different, so orders are unique."""
    draw = Draw(f"luthier/queries/{world}")
    prices, stocks = draw.some(range(1, ROWS + 1), ROWS), draw.some(range(1, ROWS + 1), ROWS)
    rows = [[draw.pick(FRUITS), draw.pick(TOWNS[:6]), p, s] for p, s in zip(prices, stocks, strict=True)]
    found = _CONDITION.findall(answer)
    town = next((t for _, _, t, _ in found if t), None)
    limits = {(2 if c == "price" else 3): (sign, int(n)) for c, sign, t, n in found if not t}
    near: list[list[list[Any]]] = []
    for at, (_, n) in limits.items():
        other = limits.get(5 - at)
        near.append([next(r for r in rows if r[at] == value) for value in (n - 1, n, n + 1)])
        for row in near[-1]:
            row[1] = town or row[1]
            if other and (row[5 - at] <= other[1] + 1 if other[0] == ">" else row[5 - at] >= other[1] - 1):
                fits = 90 if other[0] == ">" else 10
                free = (r for r in rows if not any(r is kept for group in near for kept in group))
                swap = min(free, key=lambda r: abs(r[5 - at] - fits))
                row[5 - at], swap[5 - at] = swap[5 - at], row[5 - at]
    return rows, near


@lru_cache(maxsize=64)
def _databases(answer: str) -> tuple[sqlite3.Connection, ...]:
    """The databases of a true query, in memory, to be read and not written: two whole ones, and small ones in
    which an extreme or a cut hides nothing: the rows about every threshold, and rows that only one condition keeps out."""
    whole = [_rows(answer, world) for world in (0, 1)]
    found = _CONDITION.findall(answer)
    town = next((t for _, _, t, _ in found if t), None)
    small = list(whole[0][1])
    for group, sign in zip(whole[0][1], [sign for _, sign, t, _ in found if not t], strict=True):
        small.append(group[:2] if sign == ">" else group[1:])
    if town:
        away = next(t for t in TOWNS if t != town)
        small.append([[item, away, *numbers] for item, _, *numbers in (small or [whole[0][0][:3]])[0]])
    return tuple(_opened(rows) for rows in [*(rows for rows, _ in whole), *small])


def _opened(rows: list[list[Any]]) -> sqlite3.Connection:
    held = sqlite3.connect(":memory:", check_same_thread=False)
    held.execute("CREATE TABLE stall(item TEXT, town TEXT, price INTEGER, stock INTEGER)")
    held.executemany("INSERT INTO stall VALUES (?, ?, ?, ?)", rows)
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    held.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
    held.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
    return held


def rows_of(query: str, held: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """What a query gives on one database. Raises sqlite3.Error; a query that runs on is stopped."""
    left = [STEPS // 1000]

    def tick() -> int:
        left[0] -= 1
        return left[0] < 0

    held.set_progress_handler(tick, 1000)
    return held.execute(query).fetchmany(1000)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response gives the same rows as the true query on every database: in the same order where one
    is asked for, in any order where none is."""
    if not re.match(r"\s*(select|with)\b", response, re.IGNORECASE):
        return wrong("not a query")
    ordered = "ORDER BY" in answer
    for held in _databases(answer):
        try:
            got = rows_of(response, held)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return wrong(f"SQLite: {error}")
        want = rows_of(answer, held)
        if got != want and (ordered or sorted(got, key=repr) != sorted(want, key=repr)):
            return wrong(f"{len(got)} rows where {len(want)} were due, or others")
    return right()


def meaning(record: Mapping[str, Any]) -> str:
    """The query, its conditions in order of the alphabet."""
    return _key(record["answer"])
