"""Examples as items: prompts and rows exactly as the data room renders them for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.ledger import Ledger
from luthier.data.records import Example
from luthier.data.rows import Maker, Row, both_sides
from luthier.errors import LuthierError
from luthier.measuring.checks import Metric
from luthier.measuring.items import Item
from luthier.plan.schema import DataSpec


@dataclass(frozen=True)
class Found:
    """A record as it was read and as it was understood."""

    fields: Mapping[str, Any]
    example: Example


def expected(example: Example) -> str | None:
    """The right answer: stated, or what the record's last assistant turn says."""
    if example.answer is not None:
        return str(example.answer)
    turn = _last_answer(example)
    return None if turn is None else str((example.messages or [])[turn].get("content") or "")


class Rendering:
    """A base's tokenizer with the run's data settings."""

    def __init__(self, base: Any, data: DataSpec) -> None:
        settings = {"packing": False, "end_of_turn": "allow-missing", "unsupervised": "drop"}
        self.ledger = Ledger()
        self.maker = Maker(data.model_copy(update=settings), base.tokenizer, base.kind, _labels(base), self.ledger)
        self.kind: str = base.kind

    def items(self, found: Sequence[Found], metric: Metric) -> tuple[list[Item], dict[str, int]]:
        """An item for each record that can be measured, and how many could not, by reason."""
        if metric.needs == "answer":
            right = [f for f in found if f.example.wanted or f.example.answer is not None]
            for _ in range(len(found) - len(right)):
                self.ledger.drop("labelled false")  # what such a record says is an answer that is not to be given
            return [self._asked(f) for f in right], dict(self.ledger.dropped)
        rows = self.maker.rows([f.example for f in found])
        items = [self._row(f, row) for f, row in zip(found, rows, strict=True) if row is not None]
        return items, dict(self.ledger.dropped)

    def _row(self, found: Found, row: Row) -> Item:
        ids, weights = tuple(row.ids.tolist()), tuple(row.weights.tolist())
        if self.kind == "classify":
            parts: dict[str, Any] = {"source": ids, "label": row.label, "expected": str(found.example.label)}
        elif row.second is not None and row.second_weights is not None:
            parts = {"source": ids, "ids": tuple(row.second.tolist()), "weights": tuple(row.second_weights.tolist())}
        else:
            parts = {"ids": ids, "weights": weights}
        return Item(_id(found), _shown(found.example), record=found.fields, **parts)

    def _asked(self, found: Found) -> Item:
        right = expected(found.example)
        record = dict(found.fields) if right is None else {"answer": right, **found.fields}
        source = tuple(self._prompt(found.example))
        if not source:
            raise LuthierError(f"{found.example.where}: nothing to ask the model; give a prompt, or measure the loss")
        return Item(_id(found), _shown(found.example), right, record, source)

    def _prompt(self, e: Example) -> list[int]:
        """Token ids that ask for the last assistant turn, as inference would make them."""
        maker = self.maker
        if self.kind == "seq2seq":
            text = e.text if e.text is not None else both_sides(e)[0]
            return list(maker.tokenizer(text, add_special_tokens=True)["input_ids"])
        if self.kind == "classify":
            raise LuthierError(f"{e.where}: a classifier gives classes, not answers; use the metric accuracy")
        if e.text is not None:
            return [*maker.frame[0], *self._ids(e.text)]
        if maker.chat.text is None and e.plain is not None:
            prompt, completion = e.plain
            gap = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else "\n"
            return [*maker.frame[0], *self._ids(prompt + gap)]
        if maker.chat.text is None:
            raise LuthierError(
                f"{e.where}: a conversation, but the tokenizer has no chat template; state data.template"
            )
        maker.chat.known(e.messages or [], e.where)
        messages = [maker.chat.prepared(m) for m in e.messages or []]
        text = maker.chat.render(messages[: _last_answer(e)], e.where, e.tools, e.options, ask=True)
        bos = maker.tokenizer.bos_token_id
        ids = self._ids(text)
        while bos is not None and ids[:2] == [bos, bos]:  # as rows lose a doubled start token
            ids = ids[1:]
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.maker.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _labels(base: Any) -> list[str] | None:
    if base.kind != "classify":
        return None
    stated = getattr(getattr(base, "spec", None), "labels", None)
    names = getattr(base.model.config, "id2label", None) or {}
    return list(stated) if stated else [str(names[i]) for i in sorted(names)]


def _last_answer(example: Example) -> int | None:
    """Position of the last assistant turn."""
    turns = [i for i, m in enumerate(example.messages or []) if m["role"] == "assistant"]
    return turns[-1] if turns else None


def _id(found: Found) -> str:
    return str(found.fields.get("id") or found.example.where)


def _shown(example: Example) -> str:
    """What a person reads as the question: the text, the one user turn, or the conversation so far."""
    if example.text is not None:
        return example.text if example.text_pair is None else f"{example.text}\n{example.text_pair}"
    turns = (example.messages or [])[: _last_answer(example)]
    if len(turns) == 1:
        return str(turns[0].get("content") or "")
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in turns)
