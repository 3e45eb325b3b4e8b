"""The house of ``errands`` to act in: turn by turn, with its own replies, until it is done.

end = act(record, lambda messages: model_says(messages))
end.done, end.calls, end.errors, end.needed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.errors import LuthierError
from luthier.practice.contract import said
from luthier.practice.families._store import DONE, House
from luthier.practice.world import Record

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class End:
    """How an errand went: whether everything is in its place and it was said so, calls made, calls that failed, the
    calls that looking in the request's order takes, and all turns."""

    done: bool
    calls: int
    errors: int
    needed: int
    messages: Messages


def needed(request: str) -> int:
    """Calls that the errand takes if one looks in the order of the request."""
    house, calls = House(request), 0
    while (act := house.next()[0]) != DONE:
        house.call(act)
        calls += 1
    return calls


def act(record: Record, policy: Callable[[Messages], str], most: int = 40) -> End:
    """Let a policy (messages so far -> the next text of the assistant) do a record's errand from its start, at most
    ``most`` turns. Raises LuthierError for records of other families."""
    if record["family"] != "errands":
        raise LuthierError(f"house: family {record['family']} has no house to act in; take errands")
    house = House(said(record))
    messages: Messages = [m for m in record["messages"] if m["role"] in ("system", "user")]
    calls = errors = 0
    for _ in range(most):
        text = policy(list(messages))
        messages.append({"role": "assistant", "content": text})
        if text.strip() == DONE:
            return End(house.done(), calls, errors, needed(said(record)), messages)
        reply = house.call(text)
        calls, errors = calls + 1, errors + reply.startswith("error")
        messages.append({"role": "tool", "content": reply})
    return End(False, calls, errors, needed(said(record)), messages)
