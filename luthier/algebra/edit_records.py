"""Records of edits and of what is to be forgotten: read, understood, and made into token ids with their targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any, Literal

from luthier.bridge.target import Target
from luthier.data.read import read
from luthier.data.template import rendered
from luthier.editing.engine import Request, Text
from luthier.errors import LuthierError, nearest
from luthier.plan.schema import SourceSpec

Task = Literal["edit", "forget"]
EDIT = ("prompt", "subject", "target_new", "target_true", "paraphrases", "neighbours", "portability")
FORGET = ("text", "prompt", "completion", "messages", "retain", "generic")


@dataclass(frozen=True)
class Asked:
    """A prompt, and what should follow it where that is known."""

    prompt: str
    target: str | None = None


@dataclass(frozen=True)
class Record:
    """One record, whatever names its file uses."""

    where: str
    prompt: str
    """'' for plain text."""
    target: str
    """The new target, or what is to be forgotten."""
    subject: str | None = None
    true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Asked, ...] = ()
    """Other prompts, which must be answered as before; `retain` of records to forget."""
    portability: tuple[Asked, ...] = ()
    """What follows from the new fact."""
    generic: str | None = None


def read_records(source: SourceSpec | Sequence[Mapping[str, Any]], task: Task) -> list[Record]:
    """The records of a source, or of a list of dictionaries. An incomplete one is an error that names its line."""
    rows: Iterable[tuple[Mapping[str, Any], str]]
    if isinstance(source, SourceSpec):
        rows = ((r.fields, r.where) for r in read(source))
    else:
        rows = ((fields, f"records[{n}]") for n, fields in enumerate(source))
    found = [(_edit if task == "edit" else _forget)(fields, where) for fields, where in rows]
    if not found:
        raise LuthierError("records: there are none: give a file with a record a line")
    return found


def _edit(raw: Mapping[str, Any], where: str) -> Record:
    """Ours, CounterFact's (requested_rewrite …) and EasyEdit's (rephrase_prompt, ground_truth, locality …) fields."""
    f = dict(raw)
    if isinstance(rewrite := f.pop("requested_rewrite", None), Mapping):
        subject = str(rewrite.get("subject", ""))
        f = {**f, **rewrite, "prompt": str(rewrite.get("prompt", "")).replace("{}", subject)}
    f = {_OTHERS.get(k, k): v for k, v in f.items()}
    words = {
        "prompt": f.get("prompt") if isinstance(f.get("prompt"), str) else None,
        "target_new": _word(f.get("target_new")),
    }
    if lacks := [k for k, word in words.items() if not word]:
        told = "it is there, and empty or no text" if lacks[0] in f else nearest(lacks[0], raw, "field")
        raise LuthierError(
            f"{where}: no '{lacks[0]}' in this edit record; {told}: an edit states prompt and target_new"
        )
    prompt, subject = str(words["prompt"]), _word(f.get("subject"))
    if subject and "{}" in prompt:
        prompt = prompt.replace("{}", subject)
    true = _word(f.get("target_true"))
    return Record(
        where, prompt, str(words["target_new"]), subject, true,
        tuple(str(p) for p in _listed(f.get("paraphrases"), where)),
        tuple(_asked(v, where, true if "neighborhood_prompts" in raw else None) for v in _grouped(f.get("neighbours"), where)),
        tuple(_asked(v, where) for v in _grouped(f.get("portability"), where)),
    )  # fmt: skip


_OTHERS = {
    "paraphrase_prompts": "paraphrases",
    "rephrase_prompt": "paraphrases",
    "rephrase": "paraphrases",
    "neighborhood_prompts": "neighbours",
    "neighbors": "neighbours",
    "locality": "neighbours",
    "ground_truth": "target_true",
}


def _forget(raw: Mapping[str, Any], where: str) -> Record:
    """{text}, {prompt, completion} (or response, answer), or {messages} whose last turn is the assistant's."""
    f = dict(raw)
    prompt, target = "", _word(f.get("text"))
    completion = next((_word(f[k]) for k in ("completion", "response", "answer", "target") if _word(f.get(k))), None)
    if isinstance(turns := f.get("messages"), list) and turns:
        asked = [str(m.get("content") or "") for m in turns if m.get("role") == "user"]
        if (
            len(turns) - sum(m.get("role") == "system" for m in turns) != 2
            or turns[-1].get("role") != "assistant"
            or not asked
        ):
            raise LuthierError(
                f"{where}: messages must be one question and one answer: split longer talks into records"
            )
        prompt, target = asked[0], _word(turns[-1].get("content"))
    elif target is None and _word(f.get("prompt")) and completion:
        prompt, target = str(f["prompt"]), completion
    if target is None:
        raise LuthierError(f"{where}: nothing to forget here: a record states text, prompt and completion, or messages")
    kept = tuple(_asked(v, where) for v in _grouped(f.get("retain", f.get("neighbours")), where))
    return Record(where, prompt, target, neighbours=kept, generic=_word(f.get("generic")))


def _word(value: Any) -> str | None:
    """A text, {"str": text} as CounterFact has it, or the first of a list; None where there is none."""
    value = value.get("str") if isinstance(value, Mapping) else value[0] if isinstance(value, list) and value else value
    return str(value) if isinstance(value, (str, int, float)) and str(value) else None


def _listed(value: Any, where: str) -> list[Any]:
    if value is None or isinstance(value, (str, Mapping)):
        return [] if value is None else [value]
    if isinstance(value, list):
        return value
    raise LuthierError(f'{where}: {value!r} should be a list of prompts: write it as ["…", "…"]')


def _grouped(value: Any, where: str) -> list[Any]:
    """A list, or lists by the name of a relation: {"neighborhood": [{prompt, ground_truth}]}."""
    if isinstance(value, Mapping) and not {"prompt", "target"} & set(value):
        return [v for group in value.values() for v in _listed(group, where)]
    return _listed(value, where)


def _asked(value: Any, where: str, target: str | None = None) -> Asked:
    if isinstance(value, str):
        return Asked(value, target)
    if not isinstance(value, Mapping) or not _word(value.get("prompt")):
        raise LuthierError(f"{where}: {value!r} should be a prompt, or {{prompt, target}}: correct the record")
    answer = next(
        (_word(value[k]) for k in ("target", "completion", "answer", "ground_truth") if _word(value.get(k))), target
    )
    prompt = value["prompt"][0] if isinstance(value["prompt"], list) else value["prompt"]
    return Asked(str(prompt), answer)


@dataclass
class Writer:
    """Makes texts: through the tokenizer's chat template, or as they stand.

    template: 'auto' takes the template where the tokenizer has one and the prompt as the user's turn; 'none' lets the
    target follow the prompt after a space.
    """

    on: Target
    template: Literal["auto", "none"] = "auto"
    _memo: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on.tokenizer is None or self.on.kind != "causal":
            raise LuthierError(f"editing {self.on.name} needs a causal base with its tokenizer: load it by name")
        self.words = self.on.tokenizer
        self.chat = self.template == "auto" and bool(self.words.chat_template)
        ends = [self.words.eos_token_id] if self.words.eos_token_id is not None else []
        self.ends = tuple(ends)

    def text(self, prompt: str, target: str, subject: str | None = None, where: str = "", before: str = "") -> Text:
        """The text of a prompt and its target. A subject that is named must stand in the prompt."""
        if not prompt:
            ids = self._plain(target)
            if len(ids) < 2:
                raise LuthierError(f"{where}: a text of one token has nothing to predict: correct the record")
            return Text(ids, 1)
        asked, answer, close = self._parts(before + prompt, target)
        head, place = self._located(asked, prompt, subject, where)
        body = self._ids(answer)
        if not body or not head:
            raise LuthierError(f"{where}: prompt or target has no token: correct the record")
        return Text((*head, *body, *close), len(head), len(head) + len(body), place)

    def ask(self, prompt: str) -> tuple[int, ...]:
        """Token ids that ask."""
        return self._located(self._parts(prompt, "")[0], prompt, None, "")[0]

    def after(self, prompt: str, ids: Sequence[int]) -> Text:
        """A prompt with token ids as its target."""
        head = self.ask(prompt)
        return Text((*head, *ids), len(head), None)

    def begins(self, prompt: str, target: str) -> list[int]:
        """Where in the target each of its tokens begins, its leading spaces left out; −9 for a start token."""
        answer = self._parts(prompt, target)[1] if prompt else target
        add = not self.chat and not prompt
        found = self.words(answer, add_special_tokens=add, return_offsets_mapping=True, verbose=False)
        lead = answer.find(target.strip()) - target.find(target.strip())
        spans = found["offset_mapping"][: len(self._start(found["input_ids"]))]
        return [_first(answer, a, b) - lead if b > a else -9 for a, b in spans]

    def _parts(self, prompt: str, target: str) -> tuple[str, str, tuple[int, ...]]:
        """What asks, the target as it follows, and the ids that close it."""
        if not self.chat:
            gap = "" if not target or prompt[-1:].isspace() or target[:1].isspace() else " "
            return prompt, gap + target, self.ends
        turn = [{"role": "user", "content": prompt}]
        asked = rendered(self.words, turn, ask=True)
        whole = rendered(self.words, [*turn, {"role": "assistant", "content": target}])
        rest = whole[len(asked) :] if whole.startswith(asked) else target
        at = rest.find(target.strip())
        before, after = (rest[:at], rest[at + len(target.strip()) :]) if target and at >= 0 else ("", "")
        return asked + before, target.strip(), self._ids(after.strip()) or self.ends

    def _located(self, asked: str, prompt: str, subject: str | None, where: str) -> tuple[tuple[int, ...], int]:
        """Ids of what asks, and the position of the subject's last token."""
        add = not self.chat
        if not subject:
            return self._start(self.words(asked, add_special_tokens=add, verbose=False)["input_ids"]), -1
        at = asked.rfind(prompt) + prompt.rfind(subject) if subject in prompt else -1
        if at < 0:
            raise LuthierError(f"{where}: the subject '{subject}' does not stand in the prompt '{prompt}': correct one")
        if not getattr(self.words, "is_fast", False):
            raise LuthierError(
                f"{self.on.name}: finding a subject needs a fast tokenizer: its folder lacks tokenizer.json"
            )
        found = self.words(asked, add_special_tokens=add, return_offsets_mapping=True, verbose=False)
        last = at + len(subject) - 1
        ids = self._start(found["input_ids"])
        held = [n for n, (a, b) in enumerate(found["offset_mapping"]) if a <= last < b]
        if not held:
            raise LuthierError(f"{where}: no token holds the end of the subject '{subject}': correct it")
        return ids, held[-1]

    def _start(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Without an end that the tokenizer adds."""
        ids = list(ids)
        while len(ids) > 1 and ids[-1] in self.ends and not self.chat:
            ids.pop()
        return tuple(ids)

    def _plain(self, text: str) -> tuple[int, ...]:
        return self._start(self.words(text, add_special_tokens=not self.chat, verbose=False)["input_ids"])

    def _ids(self, text: str) -> tuple[int, ...]:
        if text not in self._memo:
            self._memo[text] = tuple(self.words(text, add_special_tokens=False, verbose=False)["input_ids"])
        return self._memo[text]


def request(
    r: Record, w: Writer, openings: Sequence[str] = (), subjects: bool = False, anchors: Mapping[str, str] | None = None
) -> Request:
    """A record as the request that an edit is handed. subjects: one without a subject is an error."""
    if subjects and not r.subject:
        raise LuthierError(f'{r.where}: this method edits at a subject and the record names none: add "subject"')
    new = w.text(r.prompt, r.target, r.subject, r.where)
    about = f"{r.subject}" if w.chat else f"{r.subject} is a"
    essence = w.text(about, "a", r.subject, r.where) if r.subject else None
    made = Request(
        new,
        r.where,
        tuple(w.text(r.prompt, r.target, r.subject, r.where, f"{before.strip()}. ") for before in openings),
        essence,
        tuple(w.text(p, r.target, where=r.where) for p in r.paraphrases),
        tuple(w.text(a.prompt, a.target, where=r.where) for a in r.neighbours if a.target),
    )
    if not r.generic and not anchors:
        return made
    generic, aligned = _aligned(r, w, new, anchors or {})
    return replace(made, generic=generic, aligned=aligned)


def _aligned(r: Record, w: Writer, new: Text, anchors: Mapping[str, str]) -> tuple[Text, tuple[int, ...]]:
    """The text put generally, and for each token of the text the position of its counterpart there.

    With anchors, what stands outside them is matched character by character, a term's first token with its
    replacement's first; a term's further tokens, and its later occurrences, have no counterpart. In a whole `generic` of
    the record's own, runs of equal tokens are each other's counterparts, and where other tokens stand, the first ones are.
    """
    if r.generic:
        other = w.text(r.prompt, r.generic, where=r.where)
        aligned = [-1] * len(new.ids)
        ours, theirs = new.ids[new.start : new.end], other.ids[other.start : other.end]
        for kind, a, b, c, _ in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
            for n in range({"equal": b - a, "replace": 1}.get(kind, 0)):
                aligned[new.start + a + n] = other.start + c + n
        return other, _closed(aligned, new, other)
    prompt, _ = _replaced(r.prompt, anchors, set())
    met = {a for a in anchors if re.search(rf"(?<!\w){re.escape(a)}(?!\w)", r.prompt)}
    target, table = _replaced(r.target, anchors, met)
    other = w.text(prompt, target, where=r.where)
    ours, theirs = w.begins(r.prompt, r.target), w.begins(prompt, target)
    at = {char: other.end - len(theirs) + n for n, char in enumerate(theirs)}
    aligned = [-1] * len(new.ids)
    table = {-1: -1, -9: -9, **table}  # the space before the target, and a start token
    for n, char in enumerate(ours):
        if char in table:
            aligned[new.end - len(ours) + n] = at.get(table[char], -1)
    return other, _closed(aligned, new, other)


def _closed(aligned: list[int], new: Text, other: Text) -> tuple[int, ...]:
    """`aligned`, with what closes one text matched with what closes the other."""
    for n in range(min(len(new.ids) - new.end, len(other.ids) - other.end)):
        aligned[new.end + n] = other.end + n
    return tuple(aligned)


def _first(text: str, a: int, b: int) -> int:
    """Where text[a:b] begins but for leading spaces; a where it is all space."""
    inside = text[a:b].lstrip()
    return b - len(inside) if inside else a


def _replaced(text: str, anchors: Mapping[str, str], seen: set[str]) -> tuple[str, dict[int, int]]:
    """The text with its terms replaced, and old character -> new character, for all that has a counterpart."""
    out, table, at = "", {}, 0
    words = "|".join(re.escape(a) for a in sorted(anchors, key=len, reverse=True))
    for hit in re.finditer(rf"(?<!\w)(?:{words})(?!\w)", text) if words else ():
        table |= {n: len(out) + n - at for n in range(at, hit.start())}
        out += text[at : hit.start()]
        if hit.group() not in seen:
            table[hit.start()] = len(out)
        seen = seen | {hit.group()}
        out += anchors[hit.group()]
        at = hit.end()
    table |= {n: len(out) + n - at for n in range(at, len(text))}
    return out + text[at:], table
