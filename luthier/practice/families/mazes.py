"""Finding the way between two towns on a small map, with the search written out: where it goes, where it turns back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, said, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import TOWNS

ABOUT = "a way between two of five to eleven towns joined by roads, with the search and its dead ends written out"
TAUGHT = False

ASKED = ["Roads: {}. How does one get from {} to {}?", "Find the way. Roads: {}. It goes from {} to {}."]
SHIFTED = "A cart must go from {1} to {2}, and has these roads: {0}. By which towns?"


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels are the number of towns: 5, 7, 9; from 2 on one road more than is needed. Shifted: reworded, and two towns more."""
    towns = draw.some(TOWNS, 3 + 2 * level + 2 * shifted)
    roads = [(draw.pick(towns[:i]), towns[i]) for i in range(1, len(towns))]
    apart = [(a, b) for i, a in enumerate(towns) for b in towns[i + 1 :] if (a, b) not in roads]
    if level > 1:
        roads.append(draw.pick(apart))
    start, goal = draw.pick([pair for pair in apart if pair not in roads])
    roads = [draw.some(road, 2) for road in draw.some(roads, len(roads))]
    listed = ", ".join("-".join(road) for road in roads)
    prompt = (SHIFTED if shifted else draw.pick(ASKED)).format(listed, start, goal)
    steps, way = search(roads, start, goal)
    answer = " ".join(way)
    return Item(_key(roads, start, goal), prompt, f"{', '.join(steps)}. So {answer}.", answer)


def search(roads: list[list[str]], start: str, goal: str) -> tuple[list[str], list[str]]:
    """(the steps of a depth-first search that tries roads in the order given, ``back`` where it turns; the way found)."""
    steps, seen = [start], {start}

    def deeper(way: list[str]) -> list[str] | None:
        if way[-1] == goal:
            return way
        for a, b in roads:
            onward = b if a == way[-1] else a if b == way[-1] else None
            if onward is not None and onward not in seen:
                seen.add(onward)
                steps.append(onward)
                if found := deeper([*way, onward]):
                    return found
                steps.append("back")
        return None

    return steps, deeper([start]) or []


def _key(roads: list[list[str]], start: str, goal: str) -> str:
    return f"{' '.join(sorted('-'.join(sorted(road)) for road in roads))} {' > '.join(sorted((start, goal)))}"


def _asked(prompt: str) -> tuple[list[list[str]], str, str]:
    roads = [pair.split("-") for pair in re.findall(r"[A-Z]\w+-[A-Z]\w+", prompt)]
    ends = re.search(r"from (\w+) to (\w+)", prompt)
    assert ends, prompt
    return roads, ends[1], ends[2]


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if what stands after the last So, or all of it where there is none, is a way by roads there are from the start to
    the goal that comes to no town twice."""
    roads, start, goal = _asked(prompt)
    way = re.findall(r"\w+", response.rpartition("So ")[2])
    if not way or way[0] != start or way[-1] != goal:
        return wrong(f"no way from {start} to {goal}: {' '.join(way)[:60]!r}")
    for a, b in zip(way, way[1:], strict=False):
        if [a, b] not in roads and [b, a] not in roads:
            return wrong(f"there is no road between {a} and {b}")
    return wrong("comes to a town twice") if len(set(way)) < len(way) else right()


def meaning(record: Mapping[str, Any]) -> str:
    """The map, and the two towns, whichever way one goes."""
    return _key(*_asked(said(record)))
