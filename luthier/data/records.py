"""What a record is: its shape recognised by its columns, and one normal form for all shapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from luthier.data.files import separated_by
from luthier.data.read import Record
from luthier.errors import LuthierError, nearest

Message = dict[str, Any]


@dataclass(slots=True)
class Example:
    """One record in the normal form: a conversation, a text, a labelled text, or two conversations to compare.

    messages: the turns, without our own keys; weights: for each turn its stated loss weight, None where the plan decides.
    rejected, rejected_weights: the same for the worse answer of a comparison (messages holds the better one).
    plain: (prompt, completion) as one string each, for tokenizers without a chat template; plain_rejected alike.
    text, text_pair, label: for running text and classification. weight: of the whole record.
    wanted: False for an answer that its record labels as an undesirable one. extra: unused columns.
    """

    where: str
    messages: list[Message] | None = None
    weights: list[float | None] = field(default_factory=list)
    plain: tuple[str, str] | None = None
    rejected: list[Message] | None = None
    rejected_weights: list[float | None] = field(default_factory=list)
    plain_rejected: tuple[str, str] | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | int | None = None
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    answer: str | None = None
    weight: float = 1.0
    wanted: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """A record shape: the columns it must have, those it may have, and how it becomes an Example."""

    needs: frozenset[str]
    may: frozenset[str]
    make: Callable[[Mapping[str, Any], str], Example]


COMMON = frozenset({"answer", "weight", "tools", "chat_template_kwargs"})
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant"},
    **{"model": "assistant", "system": "system", "observation": "tool", "tool": "tool", "ipython": "tool"},
    **{"function_call": "assistant", "function": "tool", "developer": "developer"},
}
"""ShareGPT's speakers -> roles of messages."""
MESSAGE_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles that every record may use; others are known where the template or data.role_weights names them."""
TURN_KEYS = frozenset({"role", "content", "weight", "loss", "name", "tool_calls", "tool_call_id"})
"""Keys of a turn that every record may use; others are for templates that name them."""


def wrong(where: str, column: str, value: Any, expected: str) -> LuthierError:
    shown = "nothing" if value is None else f"{type(value).__name__} ({str(value)[:40]})"
    return LuthierError(
        f"{where}: column {column!r} holds {shown}, expected {expected}; mend the record or map the columns"
    )


def a_string(fields: Mapping[str, Any], column: str, where: str, default: str | None = None) -> str:
    value = fields.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise wrong(where, column, value, "a string")
    return value


def a_list(value: Any, column: str, where: str, expected: str = "a list") -> list[Any]:
    """A list, also when it stands as JSON in a cell of a table."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as e:
            raise LuthierError(
                f"{where}: column {column!r} holds broken JSON, {e.msg.removesuffix(' at')} at column {e.colno}"
            ) from e
    if not isinstance(value, list):
        raise wrong(where, column, value, expected)
    return value


def a_number(value: Any, column: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):  # no number at all, or an integer beyond every float
        number = math.nan
    if not 0 <= number < math.inf:
        raise wrong(where, column, value, "a finite number of at least 0")
    return number


def turns(value: Any, column: str, where: str) -> tuple[list[Message], list[float | None]]:
    """Messages checked and cleaned, with the weight each states (`weight`: a number, or `loss`: true or false)."""
    messages: list[Message] = []
    weights: list[float | None] = []
    single = column not in ("messages", "conversations")  # a prompt or an answer may be one string too
    for number, turn in enumerate(
        a_list(value, column, where, ("a string or " if single else "") + "a list of messages")
    ):
        at = f"{column}[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            hint = f"; for turns with from and value, state columns: {{conversations: {column}}}"
            raise wrong(
                where, at, turn, f"an object with a 'role' and a 'content'{hint if spoken([turn], 'from') else ''}"
            )
        message = {k: v for k, v in turn.items() if v is not None and k not in ("weight", "loss")}
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise wrong(where, f"{at}.content", None, "a string")
        if content is not None and not isinstance(content, str):
            message["content"] = only_text(content, f"{at}.content", where)
        if message.get("tool_calls"):
            message["tool_calls"] = [
                a_call(c, f"{at}.tool_calls", where) for c in a_list(message["tool_calls"], at, where)
            ]
        elif "tool_calls" in message:
            del message["tool_calls"]
        stated = turn.get("weight", turn.get("loss"))
        weights.append(None if stated is None else a_number(stated, f"{at}.weight", where))
        messages.append(message)
    if not messages:
        raise LuthierError(f"{where}: column {column!r} is an empty conversation; remove the record")
    return messages, weights


def only_text(content: Any, column: str, where: str) -> str:
    """Content given in parts, all of them text, as one string; images and the like are refused."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(p["text"] for p in content)
    raise wrong(where, column, content, "a string (or a list of text parts)")


def a_call(call: Any, column: str, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what templates expect."""
    if not isinstance(call, dict):
        raise wrong(where, column, call, "an object with a function's name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(where, column, call, "an object with a function's name and arguments")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as e:
            raise LuthierError(
                f"{where}: the arguments of the call to {function['name']!r} are broken JSON, {e.msg}"
            ) from e
    kept = {"id": call["id"]} if call.get("id") else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(fields: Mapping[str, Any], where: str) -> list[Message]:
    text = a_string(fields, "system", where, "")
    return [{"role": "system", "content": text}] if text else []


def from_messages(fields: Mapping[str, Any], where: str) -> Example:
    messages, weights = turns(fields["messages"], "messages", where)
    if messages[0]["role"] != "system" and (said := system(fields, where)):
        messages, weights = said + messages, [None, *weights]
    return Example(where, messages, weights)


def asked(fields: Mapping[str, Any], where: str) -> tuple[list[Message], str]:
    """The turns before the answer and, for plain tokenizers, the same as one string; from prompt or instruction."""
    said = system(fields, where)
    if "prompt" in fields and not isinstance(fields["prompt"], str):
        return said + turns(fields["prompt"], "prompt", where)[0], ""
    if "prompt" in fields:
        prompt = a_string(fields, "prompt", where)
        return [*said, user(prompt)], (f"{said[0]['content']}\n\n" if said else "") + prompt
    instruction, given = a_string(fields, "instruction", where), a_string(fields, "input", where, "")
    earlier: list[Message] = []
    for pair in a_list(fields.get("history") or [], "history", where):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise wrong(where, "history", pair, "a list of [question, answer]")
        earlier += [user(pair[0]), assistant(pair[1])]
    parts = [m["content"] for m in said] + [f"### Earlier {m['role']} turn\n{m['content']}" for m in earlier]
    parts += [f"### Task\n{instruction}"] + ([f"### Input\n{given}"] if given else [])
    question = f"{instruction}\n\n{given}" if given else instruction
    return [*said, *earlier, user(question)], "\n\n".join(parts) + "\n\n### Answer\n"


def answered(
    fields: Mapping[str, Any], column: str, where: str
) -> tuple[list[Message], list[float | None], str | None]:
    """The answer's turns with their weights, and the answer as a string where it is one."""
    if isinstance(fields[column], str) and not fields[column].lstrip().startswith('[{"role"'):
        return [assistant(fields[column])], [None], fields[column]
    return *turns(fields[column], column, where), None


def conversation(fields: Mapping[str, Any], column: str, where: str) -> tuple[list[Message], list[float | None], Any]:
    """Question and answer joined; the question's turns carry no loss, whatever their role."""
    before, plain = asked(fields, where)
    after, weights, text = answered(fields, column, where)
    quiet = [0.0 if m["role"] == "assistant" else None for m in before]
    return before + after, quiet + weights, (plain, text) if text is not None and plain else None


def from_prompt(fields: Mapping[str, Any], where: str) -> Example:
    return Example(where, *conversation(fields, "completion", where))


def from_alpaca(fields: Mapping[str, Any], where: str) -> Example:
    a_string(fields, "output", where)
    messages, _, plain = conversation(fields, "output", where)
    # Alpaca's earlier answers are examples of the wanted behaviour, so they are trained like the last one.
    trained: list[float | None] = [None] * len(messages)
    return Example(where, messages, trained, plain)


def from_sharegpt(fields: Mapping[str, Any], where: str) -> Example:
    messages, weights = system(fields, where), []
    for number, turn in enumerate(a_list(fields["conversations"], "conversations", where)):
        at = f"conversations[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            hint = "; for turns with a role, state columns: {messages: conversations}"
            raise wrong(where, at, turn, f"an object with 'from' and 'value'{hint if spoken([turn], 'role') else ''}")
        speaker, value = turn["from"], a_string(turn, "value", f"{where}: {at}")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise LuthierError(
                f"{where}: {at} has the unknown speaker {speaker!r}; {nearest(str(speaker), ROLES, 'speaker')}"
            )
        message = {"role": ROLES[speaker], "content": value}
        if speaker == "function_call":
            try:
                calls = json.loads(value)
            except json.JSONDecodeError as e:
                raise LuthierError(f"{where}: {at} is a function call of broken JSON, {e.msg}") from e
            calls = calls if isinstance(calls, list) else [calls]
            message = {"role": "assistant", "tool_calls": [a_call(c, at, where) for c in calls]}
        messages.append(message)
        stated = turn.get("weight", turn.get("loss"))
        weights.append(None if stated is None else a_number(stated, f"{at}.weight", where))
    if not weights:
        raise LuthierError(f"{where}: column 'conversations' is an empty conversation; remove the record")
    before: list[float | None] = [None] * (len(messages) - len(weights))
    return Example(where, messages, before + weights)


def from_pair(fields: Mapping[str, Any], where: str) -> Example:
    if "prompt" not in fields and "instruction" not in fields:
        chosen, weights = turns(fields["chosen"], "chosen", where)
        rejected, others = turns(fields["rejected"], "rejected", where)
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        if not shared:
            raise LuthierError(f"{where}: chosen and rejected share no first turn; add a 'prompt' column")
        quiet: list[float | None] = [0.0 if m["role"] == "assistant" else None for m in chosen[:shared]]
        return Example(
            where, chosen, quiet + weights[shared:], rejected=rejected, rejected_weights=quiet + others[shared:]
        )
    chosen, weights, plain = conversation(fields, "chosen", where)
    rejected, others, worse = conversation(fields, "rejected", where)
    return Example(where, chosen, weights, plain, rejected, others, worse)


def from_labelled(fields: Mapping[str, Any], where: str) -> Example:
    label = fields["label"]
    if not isinstance(label, (str, int)):
        raise wrong(where, "label", label, "a class name or index")
    pair = a_string(fields, "text_pair", where) if fields.get("text_pair") is not None else None
    return Example(where, text=a_string(fields, "text", where), text_pair=pair, label=label)


def from_text(fields: Mapping[str, Any], where: str) -> Example:
    return Example(where, text=a_string(fields, "text", where))


def shape(needs: str, may: str, make: Callable[[Mapping[str, Any], str], Example]) -> Shape:
    return Shape(frozenset(needs.split()), frozenset(may.split()) | COMMON, make)


SHAPES: dict[str, Shape] = {
    "chosen-rejected": shape("chosen rejected", "prompt instruction input system history", from_pair),
    "messages": shape("messages", "system", from_messages),
    "sharegpt": shape("conversations", "system", from_sharegpt),
    "prompt-completion": shape("prompt completion", "system", from_prompt),
    "alpaca": shape("instruction output", "input system history", from_alpaca),
    "labelled": shape("text label", "text_pair", from_labelled),
    "text": shape("text", "", from_text),
}
"""Shapes in the order in which they are recognised."""

GUESSES = {
    "prompt": ("question", "query", "input", "problem", "instruction", "source", "text"),
    "completion": ("answer", "response", "output", "target", "solution", "code", "summary"),
}
"""Columns that often mean ours; only proposed in the error, never taken silently."""


def mapping(columns: Mapping[str, Any]) -> str:
    """The mapping that would make a record's columns a known shape, as far as names and values tell; empty where not."""
    for theirs, value in columns.items():
        for key, ours in (("role", "messages"), ("from", "conversations")):
            if theirs != ours and spoken(value, key):
                return f"if it is a conversation, state columns: {{{ours}: {theirs}}}"
    guess = {
        ours: ours if ours in columns else next((t for t in theirs if t in columns), None)
        for ours, theirs in GUESSES.items()
    }
    if not all(guess.values()):
        return ""
    stated = ", ".join(f"{ours}: {theirs}" for ours, theirs in guess.items() if ours != theirs)
    return f"if it is question and answer, state columns: {{{stated}}}"


def spoken(value: Any, key: str) -> bool:
    """Whether a value is a list of turns that have this key, also as JSON in a cell of a table."""
    if isinstance(value, str):
        return re.match(rf'\[\s*{{\s*"{key}"\s*:', value) is not None
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]


def recognise(columns: Mapping[str, Any], where: str) -> str:
    """The shape of a record by its columns; an error that proposes a mapping when there is none."""
    for name, known in SHAPES.items():
        if known.needs <= columns.keys():
            return name
    hint = separated_by(columns) or mapping(columns) or "map them with columns: {ours: theirs}"
    looked = "; ".join(" + ".join(sorted(s.needs)) for s in SHAPES.values())
    raise LuthierError(f"{where}: columns {', '.join(columns) or 'none'} are no known record shape ({looked}); {hint}")


def example(record: Record, form: str) -> Example:
    """A record as an Example. `form` is a shape's name; a record that lacks its columns is an error naming both."""
    fields, where = record.fields, record.where
    known = SHAPES[form]
    if not all(fields.get(c) is not None for c in known.needs):
        missing = sorted(c for c in known.needs if fields.get(c) is None)
        raise LuthierError(
            f"{where}: no {' and no '.join(map(repr, missing))} for a {form} record; "
            f"it has {', '.join(k for k, v in fields.items() if v is not None) or 'no columns'}"
        )
    made = known.make(fields, where)
    if fields.get("tools") not in (None, "", "[]", []):
        made.tools = a_list(fields["tools"], "tools", where)
    if (options := fields.get("chat_template_kwargs")) not in (None, ""):
        if not isinstance(options, dict):
            raise wrong(where, "chat_template_kwargs", options, "an object of variables for the template")
        made.options = dict(options)
    if fields.get("weight") is not None:
        made.weight = a_number(fields["weight"], "weight", where)
    made.answer = None if fields.get("answer") is None else str(fields["answer"])
    made.extra = {k: v for k, v in fields.items() if k not in known.needs and k not in known.may}
    if form == "prompt-completion" and isinstance(fields.get("label"), bool):  # as unpaired preferences have it
        made.wanted = made.extra.pop("label")
    return made


def mark(label: Any) -> bool | None:
    """What a label says of an answer, where it can mean wanted or not: true or false, 1 or 0, also as a table's cell."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(label).lower())


@lru_cache(maxsize=1024)
def meant(column: str, form: str) -> str | None:
    """The column that an unused one of a record in this shape is a misspelling of, as far as letters tell."""
    return next(iter(get_close_matches(column, SHAPES[form].may, 1, 0.75)), None)


THINK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
"""A thinking block inside an assistant turn's content."""
