"""Errands in a house, by JSON calls, turn by turn: look, open, take, put, and say when it is done.

A record is one turn of an errand: all turns before it are in it, with what the house replied. ``_store.House`` is the
environment itself: it follows from the user's message, so a model can be let run in it (``luthier.practice.oracles.house``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, wrong
from luthier.practice.draw import Draw
from luthier.practice.families._store import DONE, House
from luthier.practice.words import OBJECTS, PLACES

ABOUT = "the next JSON call of an errand in a house that answers, over several turns, with errors to be mended"
TAUGHT = False

SYSTEM = "Call a tool: look(place), open(place), take(thing, place), put(thing, place). Say Done. when it is done."


def request(draw: Draw, level: int, shifted: bool) -> str:
    """What is to be done. Level 1: it is known where the thing is. 2: it is in one of two or three places. 3: two
    things. Shifted: one place more, and one of them locked."""
    things = draw.some(OBJECTS, 2 if level == 3 else 1)
    places = draw.some(PLACES, (3 if level == 3 else draw.between(2, 3)) + shifted + len(things))
    to, around = places[: len(things)], places[len(things) :]
    goal = " and ".join(f"the {t} to the {p}" for t, p in zip(things, to, strict=True))
    known = f" The {things[0]} is in the {draw.pick(around)}." if level == 1 else ""
    where = f"{', '.join(around[:-1])} or {around[-1]}"
    locked = " One may be locked." if shifted else ""
    return f"Order {draw.between(100, 999)}: bring {goal}. You may look in the {where}.{known}{locked}"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """One turn of an errand, all turns equally likely; levels and shifts are those of ``request``."""
    asked = request(draw, level, shifted)
    house = House(asked)
    key = _key(house)
    turns: list[tuple[str, str]] = []
    while not turns or turns[-1][1] != DONE:
        act = house.next()[0]
        turns.append(("assistant", act))
        if act != DONE:
            turns.append(("tool", house.call(act)))
    at = 2 * draw.below(len(turns) // 2 + 1)
    return Item(key, asked, turns[at][1], turns[at][1], SYSTEM, tuple(turns[:at]))


def _key(house: House) -> str:
    told = [house.goal, house.at, sorted(house.places), sorted(house.locked), house.seen]
    return json.dumps(told, sort_keys=True)


def replayed(record: Mapping[str, Any]) -> House:
    """The house after all the calls of a record but its last message."""
    house = House(said(record))
    for message in record["messages"][:-1]:
        if message["role"] == "assistant":
            house.call(message["content"])
    return house


def judge(record: Mapping[str, Any], response: str) -> Verdict:
    """Right if the call brings the errand forward (any unsearched place may be looked in), or if it is done and said
    to be."""
    fit = replayed(record).next()
    if DONE in fit:
        return right() if response.strip() == DONE else wrong("it is done")
    try:
        got = json.loads(response)
    except (ValueError, RecursionError) as error:
        return wrong(f"not JSON: {error}")
    if got in [json.loads(act) for act in fit]:
        return right()
    return wrong(f"does not bring it forward; one that does: {fit[0]}")


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if it is the very call; ``judge`` knows the others that would do."""
    return right() if response.strip() == answer else wrong(f"expected {answer}")


def meaning(record: Mapping[str, Any]) -> str:
    """What is where, and where it is to go, in whatever order places and things are named."""
    return _key(House(said(record)))
