"""A house with places and things in it, and the four calls by which one acts in it. Its state follows from the request.

House("Order 3121: bring the key to the drawer. …").call('{"name": "look", "arguments": {"place": "box"}}')
"""

from __future__ import annotations

import json
import re
from hashlib import blake2b
from typing import Any

CALLS = {"look": ("place",), "open": ("place",), "take": ("thing", "place"), "put": ("thing", "place")}
DONE = "Done."


def call(name: str, **arguments: str) -> str:
    """The text of a call."""
    return json.dumps({"name": name, "arguments": arguments})


class House:
    """The house as the request describes it: where the things to be brought are is drawn from the request's text, and
    with ``locks`` one of the places is locked. What has been seen is kept, so that what may be done next is known."""

    def __init__(self, request: str) -> None:
        """``request`` is the user's message of a record of ``errands``."""
        seed = blake2b(f"luthier/errands/{request}".encode(), digest_size=8).digest()
        self.places = re.split(", | or ", re.search(r"look in (?:the )?([\w, ]+)\.", request)[1])  # pyright: ignore[reportOptionalSubscript]
        self.goal = dict(re.findall(r"the (\w+) to the (\w+)", request))
        known = dict(re.findall(r"The (\w+) is in the (\w+)\.", request))
        self.at = {t: known.get(t) or self.places[seed[i] % len(self.places)] for i, t in enumerate(self.goal)}
        self.locked = {self.places[seed[7] % len(self.places)]} if "locked" in request else set()
        self.seen: dict[str, str] = dict(known)
        self.searched: set[str] = set()
        self.refused: set[str] = set()

    def next(self) -> list[str]:
        """Every call that brings the errand forward, in the order of the request; ``DONE`` if nothing is left."""
        held = next((t for t, place in self.at.items() if place == "hands"), None)
        wanted = [(t, to) for t, to in self.goal.items() if self.at[t] != to]
        if held:
            return [self._reach(self.goal[held], call("put", thing=held, place=self.goal[held]))]
        if not wanted:
            return [DONE]
        known = [t for t, _ in wanted if t in self.seen]
        if known:
            return [self._reach(self.seen[t], call("take", thing=t, place=self.seen[t])) for t in known]
        return [self._reach(p, call("look", place=p)) for p in self.places if p not in self.searched]

    def _reach(self, place: str, act: str) -> str:
        return call("open", place=place) if place in self.refused else act

    def call(self, text: str) -> str:
        """Do what a call says and tell what came of it; a call that cannot be done changes nothing and says why."""
        try:
            told = json.loads(text)
            name, arguments = told["name"], told["arguments"]
            place, thing = arguments.get("place"), arguments.get("thing")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "error: not a call"
        plain = isinstance(name, str) and all(isinstance(a, str) for a in arguments.values())
        if not plain or name not in CALLS or set(arguments) != set(CALLS[name]):
            return "error: calls are look(place), open(place), take(thing, place), put(thing, place)"
        if place not in self.places and place not in self.goal.values():
            return f"error: there is no {place}"
        if name == "open":
            self.locked.discard(place)
            self.refused.discard(place)
            return "open"
        if place in self.locked:
            self.refused.add(place)
            return f"error: the {place} is locked; open it"
        return self._act(name, place, thing)

    def _act(self, name: str, place: str, thing: Any) -> str:
        here = [t for t, p in self.at.items() if p == place]
        if name == "look":
            self.searched.add(place)
            self.seen |= dict.fromkeys(here, place)
            return f"{', '.join(here) or 'nothing'} in the {place}"
        if name == "take":
            if thing not in here:
                return f"error: no {thing} in the {place}"
            if "hands" in self.at.values():
                return "error: hands are full"
            self.at[thing] = "hands"
            return f"took the {thing}"
        if self.at.get(thing) != "hands":
            return f"error: no {thing} in hands"
        self.at[thing] = self.seen[thing] = place
        return f"put the {thing} in the {place}"

    def done(self) -> bool:
        """Whether everything is where it was to be brought."""
        return all(self.at[t] == to for t, to in self.goal.items())
