"""Requests that one JSON tool call fulfils."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from luthier.practice.contract import Item, Verdict, right, wrong
from luthier.practice.draw import Draw
from luthier.practice.words import FIRST, FRUITS, INSTRUMENTS, OBJECTS, TOWNS

ABOUT = "a request, and the JSON call of one of seven tools that fulfils it"
TAUGHT = False

SYSTEM = "Call a tool: timer(minutes), weather(town), find(thing), buy(item, count), send(to, thing), play(who, music), meet(who, town, day)"


ARGUMENTS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "timer": lambda draw: {"minutes": draw.between(1, 240)},
    "weather": lambda draw: {"town": draw.pick(TOWNS)},
    "find": lambda draw: {"thing": draw.pick(OBJECTS)},
    "buy": lambda draw: {"item": draw.pick(FRUITS), "count": draw.between(2, 499)},
    "send": lambda draw: {"to": draw.pick(FIRST), "thing": draw.pick(OBJECTS)},
    "play": lambda draw: {"who": draw.pick(FIRST), "music": draw.pick(INSTRUMENTS)},
    "meet": lambda draw: {"who": draw.pick(FIRST), "town": draw.pick(TOWNS), "day": draw.between(1, 31)},
}
"""A drawn value for every argument of every tool."""

ASKED = {
    "timer": ["Ring the bell in {minutes} minutes.", "Wake me after {minutes} minutes."],
    "weather": ["What is the sky like in {town}?", "Will it rain in {town}?"],
    "find": ["I have lost my {thing}.", "Where did I leave the {thing}?"],
    "buy": ["Get me {count} {item}s.", "We need {item}s, {count} of them."],
    "send": ["Let {to} have the {thing}.", "Post the {thing} to {to}."],
    "play": ["Ask {who} to play the {music}.", "Some {music} by {who}, please."],
    "meet": ["Day {day}: I meet {who} in {town}.", "{who} and I will be in {town} on day {day}."],
}
REWORDED = {
    "timer": "I must rest, but for no more than {minutes} minutes.",
    "weather": "Do I want a coat in {town}?",
    "find": "The {thing} has gone missing.",
    "buy": "The shop has every {item}; {count} would do.",
    "send": "{to} is waiting for the {thing}.",
    "play": "I long to hear {who} on the {music}.",
    "meet": "{who} expects me in {town} when it is day {day}.",
}
BY_LEVEL = {1: ("find", "weather", "timer"), 2: ("buy", "send"), 3: ("play", "send", "buy", "timer", "meet")}


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Level 1: one argument. 2: two. 3: any, and a courtesy before the request. Shifted: reworded, and at level 3 two
    requests, to be answered by a list of two calls."""
    names = draw.some(BY_LEVEL[level], 2 if shifted and level == 3 else 1)
    values = {name: ARGUMENTS[name](draw) for name in names}
    ways = [REWORDED[n] if shifted else draw.pick(ASKED[n]) for n in names]
    asked = " ".join(way.format(**values[n]) for n, way in zip(names, ways, strict=True))
    prompt = f"{draw.pick(('Good day.', 'If you can:', 'When you have time:'))} {asked}" if level == 3 else asked
    calls = [{"name": n, "arguments": values[n]} for n in names]
    answer = json.dumps(calls[0] if len(calls) == 1 else calls)
    key = json.dumps(sorted(json.dumps(call, sort_keys=True) for call in calls))
    return Item(key, prompt, answer, answer, SYSTEM)


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if the response is JSON and means the same call: key order and white space are free."""
    try:
        got = json.loads(response)
    except json.JSONDecodeError as error:
        return wrong(f"not JSON: {error.msg} at character {error.pos}")
    want = json.loads(answer)
    return right() if got == want else wrong(f"expected {answer}, got {response.strip()[:120]}")


def meaning(record: Mapping[str, Any]) -> str:
    """The calls, in any order."""
    calls = json.loads(record["answer"])
    return json.dumps(sorted(json.dumps(c, sort_keys=True) for c in (calls if isinstance(calls, list) else [calls])))
