"""A conversation as text, and which characters of it carry how much loss.

Three ways to find a turn in the rendered text, each checked against the turn's own words:

1. `marks`: the template says it itself with {% generation %} … {% endgeneration %};
2. `prefix`: text(turns before, with the header that asks for an answer) to text(turns up to this one), if both really
   are prefixes of the whole text;
3. `swap`: the whole conversation rendered again with other words in this turn; what differs is the turn. This holds
   for templates that rewrite earlier turns (dropping their thinking, say), where prefixes do not.

A turn that none of them finds is an error that names the record.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from luthier.data.ledger import Ledger
from luthier.data.records import MESSAGE_ROLES, ROLES, THINK, TURN_KEYS, Message
from luthier.errors import LuthierError, nearest
from luthier.plan.schema import DataSpec

Span = tuple[int, int, float]
"""Characters from, to (exclusive), and the loss weight of the tokens among them."""

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
BLOCK = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
SWAPS = ("Qx7Zk", "Jv3Ww")
"""Two strings that differ in their first and last letters, so that one of them differs from any answer there."""
BROKEN = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError)
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(slots=True)
class Rendered:
    """Text with its loss: `base` weight everywhere, then `spans`, then `silent` characters (weight 0) in that order.

    end: characters of the last supervised answer's end-of-turn, None where the template gives none.
    plain: the tokenizer's own special tokens frame the text and its end token, supervised, closes it.
    says_nothing: a text, or an answer that carries loss, is blank.
    """

    text: str
    where: str
    spans: list[Span] = field(default_factory=list)
    base: float = 0.0
    silent: list[tuple[int, int]] = field(default_factory=list)
    end: tuple[int, int] | None = None
    plain: bool = False
    answers: bool = True
    says_nothing: bool = False


def rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
    """The conversation as the tokenizer's own template writes it; a template that fails on it is an error."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except BROKEN as e:
        raise LuthierError(f"the base's chat template fails: {_why(e)}; mend it in the base's folder") from e


def _why(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def template_text(spec: DataSpec, tokenizer: Any) -> str | None:
    """The chat template a run uses: the plan's (a file, or the text itself), else the tokenizer's, else none."""
    given = spec.template
    if given is None:
        held = tokenizer.chat_template
        return held.get("default") if isinstance(held, dict) else held
    if "{" in given:
        return given
    path = Path(os.path.expanduser(given))
    if not path.is_file():
        raise LuthierError(
            f"data.template: {given} is neither a file nor a template's text; give the path of a .jinja file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise LuthierError(f"data.template: {given} cannot be read ({e})") from e
    if "{" not in text:
        raise LuthierError(f"data.template: {given} holds no template; a chat template loops over 'messages'")
    return text


def unknown_role(role: str, template: str | None, stated: Iterable[str] = ()) -> str | None:
    """What to say of a role that is not one of everybody's, not stated, and not written out in the template; else None."""
    known = MESSAGE_ROLES.union(stated)
    if role in known or any(f"{q}{role}{q}" in (template or "") for q in "'\""):
        return None
    return f"unknown role {role!r}; {f'write {ROLES[role]!r}' if role in ROLES else nearest(role, known, 'role')}"


class Chat:
    """A tokenizer's chat format with the plan's settings on which turns carry loss."""

    def __init__(self, tokenizer: Any, spec: DataSpec, ledger: Ledger):
        self.tokenizer, self.spec, self.ledger = tokenizer, spec, ledger
        self.text = template_text(spec, tokenizer)
        for role in spec.role_weights:
            if role not in MESSAGE_ROLES and get_close_matches(role, MESSAGE_ROLES, 1, 0.7):
                raise LuthierError(f"data.role_weights: unknown role {role!r}; {nearest(role, MESSAGE_ROLES, 'role')}")
        self._check_options()
        self.marked = bool(self.text and MARK.search(self.text))
        self.special = sorted({str(t) for t in tokenizer.all_special_tokens}, key=len, reverse=True)
        self.inside = re.compile("|".join(map(re.escape, self.special)) or "(?!)")

    def _check_options(self) -> None:
        """A variable that the template never reads is misspelt; one without a template has nothing to reach."""
        if not self.spec.template_options:
            return
        try:
            parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(BLOCK.sub("", self.text or ""))
        except jinja2.TemplateError:
            return  # of unknown tags, or broken: rendering will tell
        read = jinja2.meta.find_undeclared_variables(parsed)
        for name in self.spec.template_options:
            if name not in read:
                told = nearest(name, read, "variable")
                raise LuthierError(f"data.template_options: the chat template reads no {name!r}; {told}")

    # --- rendering

    def render(
        self, messages: list[Message], where: str, tools: Any, options: dict[str, Any], ask: bool = False
    ) -> str:
        """The conversation as text; a template that fails on it is an error naming the record."""
        return self._render(messages, where, tools, options, ask, False)[0]

    def _render(
        self, messages: Any, where: str, tools: Any, options: dict[str, Any], ask: bool, marks: bool
    ) -> tuple[str, Any]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=ask,
                **{**self.tokenizer.special_tokens_map, **self.spec.template_options, **options},
            )
        except BROKEN as e:
            raise LuthierError(
                f"{where}: the chat template fails on this record: {_why(e)}; mend it or state data.template"
            ) from e
        return texts[0], found[0] if found else []

    @cached_property
    def end_text(self) -> str | None:
        """What the template writes after an answer to end it: a special token there, else any other text, else None."""
        word = SWAPS[0]
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": word}]
        try:
            after = self.render(probe, "probe", None, {}).rpartition(word)[2]
        except LuthierError:
            return self.tokenizer.eos_token
        found = self.inside.search(after)
        return found.group() if found else after.strip() or None

    # --- one conversation

    def conversation(
        self,
        messages: list[Message],
        stated: list[float | None],
        where: str,
        tools: list[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Rendered:
        """Text and loss weights of a conversation. `stated` holds each turn's own weight, None where the plan decides."""
        if self.text is None:
            raise LuthierError(f"{where}: a conversation, but the tokenizer has no chat template; state data.template")
        options = options or {}
        self.known(messages, where)
        messages = [self.prepared(m) for m in messages]
        if tools and "tools" not in self.text:
            self.ledger.note("tools are not shown: the template has no place for them")
        if any(self.inside.search(m.get("content") or "") for m in messages):
            self.ledger.note("special tokens inside a record's own words")
        base = 1.0 if self.spec.loss_on == "all" else 0.0
        weights = self.turn_weights(messages, stated)
        wanted: set[int] = {i for i, w in enumerate(weights) if w != base}
        text, marks = self._render(messages, where, tools, options, False, self.marked)
        out = Rendered(text, where, base=base)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        by_mark = dict(zip(answers, marks, strict=True)) if len(marks) == len(answers) else {}
        last: int | None = max((i for i in answers if weights[i] > 0), default=None)
        for i in sorted(wanted if last is None else wanted | {last}):
            if messages[i]["role"] == "assistant":
                start, stop, end = self.answer(text, messages, i, where, tools, options, by_mark.get(i))
                out.end = end if i == last else out.end
            else:
                start, stop = self.swapped(text, messages, i, where, tools, options)
            if weights[i] != base:
                out.spans.append((start, stop, weights[i]))
            if self.spec.thinking == "mask" and messages[i]["role"] == "assistant":
                out.silent += [m.span() for m in THINK.finditer(text, start, stop)]
        out.answers = last is not None
        out.says_nothing = any(weights[i] > 0 and not self.says(messages[i]) for i in answers)
        if any(m["role"] == "user" and not (m.get("content") or "").strip() for m in messages):
            self.ledger.note("a user turn without words")
        return out

    def known(self, messages: list[Message], where: str) -> None:
        """Refuses a role that neither every template, this one, nor the plan knows; counts keys of turns that nothing reads."""
        for i, message in enumerate(messages):
            if wrong := unknown_role(message["role"], self.text, self.spec.role_weights):
                raise LuthierError(
                    f"{where}: turn {i} has the {wrong}; a role of your own must stand in the template or in "
                    "data.role_weights"
                )
            for key in message.keys() - TURN_KEYS:
                if key not in REASONING and key not in (self.text or ""):
                    close = get_close_matches(key, TURN_KEYS, 1, 0.8)
                    meant = f" (did you mean {close[0]!r}?)" if close else ""
                    self.ledger.note(f"key {key!r} of a turn is not read{meant}")

    def says(self, message: Message) -> bool:
        """Whether an answer holds anything to learn: words outside of a thinking block that carries no loss, or a call."""
        words = message.get("content") or ""
        if self.spec.thinking != "keep":
            words = THINK.sub("", words)
        thought = self.spec.thinking == "keep" and any(message.get(k) for k in REASONING)
        return bool(words.strip() or message.get("tool_calls") or thought)

    def prepared(self, message: Message) -> Message:
        """The turn as the template shall see it: thinking as the plan says, and nothing that the template would drop."""
        if message["role"] != "assistant":
            return message
        out = dict(message)
        thought = next((out[k] for k in REASONING if isinstance(out.get(k), str)), None)
        knows = any(k in (self.text or "") for k in REASONING)
        if self.spec.thinking == "strip" or (thought is not None and not knows):
            out = {k: v for k, v in out.items() if k not in REASONING}
        if self.spec.thinking == "strip" and out.get("content"):
            out["content"] = THINK.sub("", out["content"])
        elif thought is not None and not knows and self.spec.thinking != "strip":
            out["content"] = f"<think>\n{thought}\n</think>\n\n{out.get('content') or ''}"
            self.ledger.note("thinking written into the answer: the template has no place for it")
        if out.get("tool_calls") and "tool_calls" not in (self.text or ""):
            calls = "\n".join(json.dumps(c["function"], ensure_ascii=False) for c in out.pop("tool_calls"))
            out["content"] = "\n".join(filter(None, [out.get("content"), calls]))
            self.ledger.note("tool calls written into the answer: the template has no place for them")
        return out if out.get("content") is not None else {**out, "content": ""}

    def turn_weights(self, messages: list[Message], stated: list[float | None]) -> list[float]:
        """Each turn's loss weight: its own where it states one, else its role's, else what loss_on says."""
        spec = self.spec
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        taught = {"assistant": answers, "last": answers[-1:], "all": range(len(messages))}[spec.loss_on]
        out = []
        for i, message in enumerate(messages):
            own, role = stated[i], message["role"]
            # A role's weight scales what loss_on lets through; for other roles than the assistant's it lets through itself.
            by_role = spec.role_weights.get(role, 1.0) if i in taught or role != "assistant" else 0.0
            by_plan = by_role if i in taught or role in spec.role_weights else 0.0
            out.append(by_plan if own is None else own)
        return out

    # --- where a turn stands in the text

    def answer(
        self, text: str, messages: list[Message], i: int, where: str, tools: Any, options: dict[str, Any], mark: Any
    ) -> tuple[int, int, tuple[int, int] | None]:
        """(start, stop, end-of-turn) of an assistant turn: from after the header to the end of its end-of-turn token."""
        found = None
        if mark is not None and self.holds(text[mark[0] : mark[1]], messages[i]):
            found = self.closed(text, mark[0], mark[1], self.spec.end_of_turn == "require")
            if found[1] > mark[1]:
                self.ledger.note("end-of-turn added to the template's generation marks")
            return found
        before = messages[:i]
        asked = self.tried(before, tools, options, True) if before else None
        whole = text if i + 1 == len(messages) else self.tried(messages[: i + 1], tools, options, False)
        if asked is not None and whole is not None and text.startswith(asked) and text.startswith(whole):
            start, stop = len(asked), len(whole)
            if self.holds(text[start:stop], messages[i]):
                return self.closed(text, start, start + len(text[start:stop].rstrip()), True)
        start, stop = self.swapped(text, messages, i, where, tools, options)
        return self.closed(text, self.after_header(text, start, before, tools, options), stop, True)

    def tried(self, messages: list[Message], tools: Any, options: dict[str, Any], ask: bool) -> str | None:
        """The rendered prefix, or None where the template refuses a conversation cut there."""
        try:
            return self.render(messages, "prefix", tools, options, ask)
        except LuthierError:
            return None

    def closed(self, text: str, start: int, stop: int, extend: bool) -> tuple[int, int, tuple[int, int] | None]:
        """The span with its end-of-turn: found at its tail, or, with `extend`, right behind it."""
        mark = self.end_text
        if not mark:
            return start, stop, None
        tail = start + len(text[start:stop].rstrip())
        if text.endswith(mark, start, tail):
            return start, stop, (tail - len(mark), tail)
        behind = stop + len(text[stop:]) - len(text[stop:].lstrip())
        if extend and text.startswith(mark, behind):
            return start, behind + len(mark), (behind, behind + len(mark))
        return start, stop, None

    def holds(self, span: str, message: Message) -> bool:
        """Whether these characters hold the turn's words and the names of the functions it calls."""
        words = THINK.sub("", message.get("content") or "").rpartition("</think>")[2].strip()
        names = [c["function"]["name"] for c in message.get("tool_calls") or []]
        return words in span and all(name in span for name in names)

    def swapped(
        self, text: str, messages: list[Message], i: int, where: str, tools: Any, options: dict[str, Any]
    ) -> tuple[int, int]:
        """(start, stop) of a turn's own words, as what changes when other words stand there."""
        start, rest = len(text), len(text)
        for word in SWAPS:
            other = [*messages[:i], {"role": messages[i]["role"], "content": word}, *messages[i + 1 :]]
            if "tool_call_id" in messages[i]:
                other[i]["tool_call_id"] = messages[i]["tool_call_id"]
            changed = self.render(other, where, tools, options)
            if word not in changed:
                raise LuthierError(
                    f"{where}: the template does not show turn {i} ({messages[i]['role']}); state data.template"
                )
            start = min(start, len(os.path.commonprefix([text, changed])))
            rest = min(rest, len(os.path.commonprefix([text[::-1], changed[::-1]])))
        stop = max(start, len(text) - rest)
        if not self.holds(text[start:stop], messages[i]):
            raise LuthierError(
                f"{where}: turn {i} ({messages[i]['role']}) cannot be found in what the template makes of it, so its loss "
                "cannot be placed; put {% generation %} marks into the template (data.template)"
            )
        return start, stop

    def after_header(self, text: str, start: int, before: list[Message], tools: Any, options: dict[str, Any]) -> int:
        """Back to where the header ends, over an opening thinking tag that every answer of this template begins with."""
        asked, bare = self.tried(before, tools, options, True), self.tried(before, tools, options, False)
        if asked is None or bare is None or not asked.startswith(bare):
            return start
        header = asked[len(bare) :].partition("<think>")[0]
        at = text.rfind(header, 0, start) + len(header) if header else -1
        return (
            at if header and text.rfind(header, 0, start) >= 0 and text[at:start].strip() in ("", "<think>") else start
        )
