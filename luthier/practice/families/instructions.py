"""Lists to be written under conditions that can each be checked: how many, of what, in which order, case and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from luthier.practice.contract import Item, Verdict, said, squeeze
from luthier.practice.draw import Draw
from luthier.practice.words import ANIMALS, FRUITS, INSTRUMENTS, OBJECTS, TOWNS

ABOUT = "a list under two to five conditions, each of which can be checked; any list that keeps them is right"
TAUGHT = False

KINDS = {
    "animals": ANIMALS,
    "fruits": FRUITS,
    "things": OBJECTS,
    "instruments": INSTRUMENTS,
    "towns": [t.lower() for t in TOWNS],
}
JOINED = {"by commas": ", ", "by semicolons": "; ", "by slashes": " / ", "by the word and": " and "}
ENDS = ("That is all.", "Thank you.")


class Wanted(NamedTuple):
    """The conditions of one task; those not set are empty."""

    kind: str
    count: int
    joined: str
    rising: bool = False
    capital: bool = False
    without: str = ""
    end: str = ""
    having: str = ""


def _ask(want: Wanted, shifted: bool) -> str:
    told = [
        f"Give me {want.count} {want.kind}" if shifted else f"Name {want.count} {want.kind}",
        f"joined {want.joined}",
    ]
    told += ["in order of the alphabet"] if want.rising else []
    told += ["in capital letters"] if want.capital else []
    told += [f"without {want.without}"] if want.without else []
    told += [f"with {want.having} among them"] if want.having else []
    told += [f'ending with "{want.end}"'] if want.end else []
    return ", ".join(told) + ("" if want.end else ".")


def read(prompt: str) -> Wanted:
    """The conditions that a prompt sets."""
    head = re.match(r"(?:Name|Give me) (\d+) (\w+), joined ([a-z ]+)", prompt)
    without, end = re.search(r"without (\w+)", prompt), re.search(r'ending with "([^"]+)"', prompt)
    count, kind, joined = head.groups() if head else ("0", "", "")
    having = re.search(r"with (\w+) among them", prompt)
    flags = "order of the alphabet" in prompt, "capital letters" in prompt
    words = [found[1] if found else "" for found in (without, end, having)]
    return Wanted(kind, int(count), joined, *flags, *words)


def make(draw: Draw, level: int, shifted: bool) -> Item:
    """Levels 1, 2, 3: one, two, three conditions beside the number and the joining. Shifted: reworded, and one more."""
    kind = draw.pick(_KINDS)
    extra = draw.some(range(5), level + shifted)
    without = draw.pick(KINDS[kind]) if 2 in extra else ""
    end = draw.pick(ENDS) if 3 in extra else ""
    allowed = [w for w in KINDS[kind] if w != without]
    having = draw.pick(allowed) if 4 in extra else ""
    want = Wanted(kind, draw.between(2, 6), draw.pick(_JOINED), 0 in extra, 1 in extra, without, end, having)
    chosen = draw.some(allowed, want.count)
    if having and having not in chosen:
        chosen[draw.below(want.count)] = having
    said_ = JOINED[want.joined].join(sorted(chosen) if want.rising else chosen)
    response = " ".join(p for p in (said_.upper() if want.capital else said_, want.end) if p)
    return Item(str(want), _ask(want, shifted), response, response)


_KINDS, _JOINED = tuple(KINDS), tuple(JOINED)


def kept(prompt: str, response: str) -> dict[str, bool]:
    """Condition -> whether the response keeps it, for every condition that the prompt sets."""
    want, text = read(prompt), squeeze(response)
    ended = text.endswith(want.end)
    body = text[: len(text) - len(want.end)].strip() if want.end and ended else text.removesuffix(".")
    between = JOINED.get(want.joined, ", ").strip()
    split = rf"\s{between}\s" if between.isalpha() else rf"\s*{re.escape(between)}\s*"
    parts = re.split(split, body, flags=re.IGNORECASE if want.capital else 0)
    low = [p.lower() for p in parts]
    found = {
        "count": len(set(low)) == len(low) == want.count,
        "kind": all(p in KINDS.get(want.kind, ()) for p in low),
        "joined": len(parts) == want.count,
    }
    if want.rising:
        found["rising"] = low == sorted(low)
    if want.capital:
        found["capital"] = body == body.upper() and body != body.lower()
    if want.without:
        found["without"] = want.without not in low
    if want.having:
        found["having"] = want.having in low
    if want.end:
        found["end"] = ended
    return found


def verify(prompt: str, answer: str, response: str) -> Verdict:
    """Right if every condition is kept; the reason names those that are not. The answer is one list of many."""
    broken = [name for name, fine in kept(prompt, response).items() if not fine]
    return Verdict(float(not broken), f"not kept: {', '.join(broken)}" if broken else "as it should be")


def meaning(record: Mapping[str, Any]) -> str:
    """The conditions."""
    return str(read(said(record)))
