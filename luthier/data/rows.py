"""Examples as rows of token ids with a loss weight for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from luthier.data.ledger import Ledger
from luthier.data.records import Example
from luthier.data.template import Chat, Rendered
from luthier.errors import LuthierError, nearest
from luthier.plan.schema import DataSpec

Ids = np.ndarray
"""int32, one dimension."""


@dataclass(slots=True)
class Row:
    """One record as tokens.

    ids [T]; weights [T] float32: the loss weight of predicting that token (position 0 predicts nothing: 0).
    second, second_weights: the target of a sequence-to-sequence row (its position 0 is predicted), or the rejected
    answer of a comparison. label, weight: class index (-1: none) and loss weight of the whole row for classification.
    truncated: tokens cut off. eot: whether the answer's end-of-turn is supervised; None where there is no such thing.
    says_nothing: a text, or an answer that carries loss, is blank: all it teaches is to stop.
    """

    ids: Ids
    weights: np.ndarray
    where: str
    truncated: int = 0
    eot: bool | None = None
    label: int = -1
    weight: float = 1.0
    second: Ids | None = None
    second_weights: np.ndarray | None = None
    says_nothing: bool = False

    @property
    def length(self) -> int:
        """Tokens, those of both sides together."""
        return len(self.ids) + (0 if self.second is None else len(self.second))

    @property
    def supervised(self) -> int:
        """Tokens that carry loss (1 for a class); of a comparison, the poorer side's."""
        if self.label >= 0:
            return int(self.weight > 0)
        own = int(np.count_nonzero(self.weights))
        if self.second_weights is None:
            return own
        other = int(np.count_nonzero(self.second_weights))
        return min(own, other) if own else other


class Maker:
    """Turns examples into rows by the plan's settings, counting everything in the ledger.

    `kind`: causal, seq2seq, classify, or pair (chosen and rejected). `labels`: class names in index order.
    """

    def __init__(self, spec: DataSpec, tokenizer: Any, kind: str, labels: list[str] | None, ledger: Ledger):
        if kind not in KINDS:
            raise LuthierError(f"no rows of kind {kind!r}; {nearest(kind, KINDS, 'kind')}")
        if not getattr(tokenizer, "is_fast", False):
            raise LuthierError(
                f"tokenizer {type(tokenizer).__name__} does not say which characters its tokens cover (not a fast one): "
                "convert it to tokenizer.json, or state another with base.tokenizer"
            )
        self.spec, self.tokenizer, self.kind, self.labels, self.ledger = spec, tokenizer, kind, labels, ledger
        self.chat = Chat(tokenizer, spec, ledger)

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after a text."""
        with_it = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        without = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for at in range(len(with_it) - len(without) + 1):
            if with_it[at : at + len(without)] == without:
                return with_it[:at], with_it[at + len(without) :]
        return [], []

    def rows(self, examples: list[Example]) -> list[Row | None]:
        """A row for each example; None where it was dropped (and counted)."""
        wanted = [e for e in examples if e.wanted]
        for _ in range(len(examples) - len(wanted)):
            self.ledger.drop("labelled false")
            self.ledger.note(
                "answers labelled false are left out (constants: {label: null} takes them like the others)"
            )
        made = iter(KINDS[self.kind](self, wanted) if wanted else ())
        rows = [next(made) if e.wanted else None for e in examples]
        return [self.checked(row, e) if row is not None else None for row, e in zip(rows, examples, strict=True)]

    # --- checks and cuts

    def checked(self, row: Row, example: Example) -> Row | None:
        """The row, or None if it is dropped as unsupervised; refuses what the plan refuses."""
        if not row.supervised:
            cut = " after truncation to data.max_length" if row.truncated else ""
            if self.spec.unsupervised == "error":
                raise LuthierError(
                    f"{row.where}: no supervised token{cut}; {'raise data.max_length, ' if cut else 'check data.loss_on, '}"
                    "mend the record, or set data.unsupervised: drop"
                )
            self.ledger.drop("unsupervised after truncation" if cut else "unsupervised")
            return None
        if row.says_nothing:
            if self.spec.unsupervised == "error":
                raise LuthierError(
                    f"{row.where}: {'the answer' if example.text is None else 'the text'} is empty, so a model would learn "
                    "to say nothing; mend the record, or set data.unsupervised: drop"
                )
            self.ledger.drop("empty answer" if example.text is None else "empty text")
            return None
        if row.eot is False and not row.truncated and self.spec.end_of_turn == "require":
            raise LuthierError(
                f"{row.where}: the answer does not end in a supervised end-of-turn token, so the model would not learn to "
                "stop; mend the chat template (data.template) or set data.end_of_turn: allow-missing"
            )
        self.ledger.keep(row)
        return row

    def fits(self, size: int, where: str) -> bool:
        """Whether a row of this many tokens is kept; refuses or drops longer ones as the plan says."""
        if size <= self.spec.max_length or self.spec.too_long == "truncate":
            return True
        if self.spec.too_long == "error":
            raise LuthierError(
                f"{where}: {size} tokens, more than data.max_length {self.spec.max_length}; raise it, or set data.too_long"
            )
        self.ledger.drop("too long")
        return False

    def cut(self, ids: list[int] | Ids, weights: np.ndarray) -> tuple[Ids, np.ndarray, int]:
        """The row without what lies beyond max_length, and how many tokens that was."""
        limit = self.spec.max_length
        over = max(0, len(ids) - limit)
        if over:
            self.ledger.cut(over, int(np.count_nonzero(weights[limit:])))
        return np.asarray(ids[:limit], np.int32), weights[:limit].astype(np.float32), over

    # --- text to tokens

    def encode(self, rendered: list[Rendered]) -> list[tuple[list[int], np.ndarray, tuple[int, int] | None]]:
        """(ids, weights, first and last token of the end-of-turn or None) of each text, before any cut."""
        if not rendered:
            return []
        out = self.tokenizer(
            [r.text for r in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = zip(rendered, out["input_ids"], out["offset_mapping"], strict=True)
        return [self.weighted(r, ids, np.asarray(offsets, np.int64).reshape(-1, 2)) for r, ids, offsets in pairs]

    def weighted(
        self, r: Rendered, ids: list[int], offsets: np.ndarray
    ) -> tuple[list[int], np.ndarray, tuple[int, int] | None]:
        """Character weights as token weights: a token that reaches into a span has the span's weight."""
        starts, stops = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        weights = np.full(len(ids), r.base, np.float32)
        for start, stop, weight in r.spans:
            weights[(starts < stop) & (stops > start)] = weight
        for start, stop in r.silent:
            weights[(starts >= start) & (stops <= stop)] = 0
        end = None
        if r.end is not None:
            (inside,) = np.nonzero((starts < r.end[1]) & (stops > r.end[0]))
            end = (int(inside[0]), int(inside[-1])) if len(inside) else None
        if r.plain:
            before, after = self.frame
            eos = self.tokenizer.eos_token_id
            after = after if eos is None or eos in after else [*after, eos]
            ids = [*before, *ids, *after]
            weights = np.concatenate([np.full(len(before), r.base), weights, np.ones(len(after))]).astype(np.float32)
            end = None if eos is None else (len(ids) - 1, len(ids) - 1)
        return self.one_bos(ids, weights, end)

    def one_bos(
        self, ids: list[int], weights: np.ndarray, end: tuple[int, int] | None
    ) -> tuple[list[int], np.ndarray, Any]:
        """The row with at most one beginning-of-sequence token; a doubled one is removed and counted."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return ids, weights, end
        leading = next((i for i, t in enumerate(ids) if t != bos), len(ids))
        if leading > 1:
            extra = leading - 1
            ids, weights = ids[extra:], weights[extra:]
            end = None if end is None else (end[0] - extra, end[1] - extra)
        expected = self.frame[0][:1] == [bos]
        word = {0: "missing" if expected else "none", 1: "one"}.get(leading, "doubled, removed")
        if not self.ledger.quiet:
            self.ledger.bos[word] += 1
        return ids, weights, end

    def finished(self, r: Rendered, encoded: tuple[list[int], np.ndarray, Any], weight: float) -> Row | None:
        """A causal row: cut, weighted by the record's weight, end-of-turn judged."""
        ids, weights, end = encoded
        if not self.fits(len(ids), r.where):
            return None
        kept, loss, over = self.cut(ids, weights)
        loss[:1] = 0
        eot = (
            bool(end is not None and end[1] < len(kept) and np.all(loss[end[0] : end[1] + 1] > 0))
            if r.answers
            else None
        )
        return Row(kept, loss * np.float32(weight), r.where, over, eot, says_nothing=r.says_nothing)

    # --- one example as text

    def rendered(self, e: Example, rejected: bool = False) -> Rendered:
        """The text of an example for a causal model; of its rejected answer if asked."""
        if e.text is not None:
            if e.label is not None:
                raise LuthierError(
                    f"{e.where}: a labelled text; state base.kind: classify, or format: text to train on the text alone"
                )
            return Rendered(e.text, e.where, base=1.0, plain=True, says_nothing=not e.text.strip())
        plain, messages, stated = (
            (e.plain_rejected, e.rejected, e.rejected_weights) if rejected else (e.plain, e.messages, e.weights)
        )
        if self.chat.text is None and plain is not None:
            return joined(plain, e.where, self.spec)
        if messages is None:
            raise LuthierError(f"{e.where}: neither text nor conversation; check data.train's format")
        return self.chat.conversation(messages, stated, e.where, e.tools, e.options)


def joined(plain: tuple[str, str], where: str, spec: DataSpec) -> Rendered:
    """Prompt and completion for a tokenizer without a chat template: joined by a newline unless either brings whitespace."""
    prompt, completion = plain
    gap = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else "\n"
    start, text = len(prompt + gap), prompt + gap + completion
    blank = not completion.strip()
    if spec.loss_on == "all":
        return Rendered(text, where, base=1.0, plain=True, says_nothing=blank)
    spans = [(start, len(text), spec.role_weights.get("assistant", 1.0))]
    return Rendered(text, where, spans, plain=True, says_nothing=blank)


def causal(maker: Maker, examples: list[Example]) -> list[Row | None]:
    """The next token, of the whole row."""
    for e in examples:
        if e.rejected is not None:
            maker.ledger.note("rejected answers not used: the objective takes single answers")
    rendered = [maker.rendered(e) for e in examples]
    return [
        maker.finished(r, got, e.weight) for r, got, e in zip(rendered, maker.encode(rendered), examples, strict=True)
    ]


def pair(maker: Maker, examples: list[Example]) -> list[Row | None]:
    """Two answers to one prompt: the better one in `ids`, the worse one in `second`."""
    for e in examples:
        if e.rejected is None:
            raise LuthierError(f"{e.where}: the objective compares answers; give chosen and rejected")
    both = [maker.rendered(e) for e in examples] + [maker.rendered(e, rejected=True) for e in examples]
    encoded = maker.encode(both)
    out: list[Row | None] = []
    for i, e in enumerate(examples):
        better, worse = (maker.finished(both[j], encoded[j], e.weight) for j in (i, i + len(examples)))
        if better is None or worse is None:
            out.append(None)
            continue
        if len(better.ids) == len(worse.ids) and np.array_equal(better.ids, worse.ids):
            maker.ledger.note("chosen and rejected are the same")
        better.second, better.second_weights = worse.ids, worse.weights
        better.says_nothing |= worse.says_nothing
        better.truncated += worse.truncated
        better.eot = None if better.eot is None or worse.eot is None else better.eot and worse.eot
        if not np.any(better.weights) or not np.any(worse.weights):
            better.weights, better.second_weights = np.zeros_like(better.weights), np.zeros_like(worse.weights)
        out.append(better)
    return out


def seq2seq(maker: Maker, examples: list[Example]) -> list[Row | None]:
    """Prompt into the encoder, completion out of the decoder; both framed by the tokenizer's own special tokens."""
    tokenizer = maker.tokenizer
    sides = [both_sides(e) for e in examples]
    sources = tokenizer([s for s, _ in sides], add_special_tokens=True, verbose=False)["input_ids"]
    targets = tokenizer(text_target=[t for _, t in sides], add_special_tokens=True, verbose=False)["input_ids"]
    eos, out = tokenizer.eos_token_id, []
    for e, (_, wanted), source, target in zip(examples, sides, sources, targets, strict=True):
        if eos is not None and target[-1:] != [eos]:
            target = [*target, eos]
        if not maker.fits(max(len(source), len(target)), e.where):
            out.append(None)
            continue
        ids, _, over = maker.cut(source, np.zeros(len(source)))
        labels, weights, lost = maker.cut(target, np.full(len(target), e.weight))
        row = Row(ids, np.zeros(len(ids), np.float32), e.where, over + lost, second=labels, second_weights=weights)
        row.eot = bool(eos is not None and labels[-1:] == eos and weights[-1:] > 0)
        row.says_nothing = not wanted.strip()
        out.append(row)
    return out


def both_sides(e: Example) -> tuple[str, str]:
    """Prompt and completion as strings, also from a conversation of one question and one answer."""
    if e.plain is not None:
        return e.plain
    turns = [m for m in e.messages or [] if m["role"] != "system"]
    if [m["role"] for m in turns] != ["user", "assistant"]:
        raise LuthierError(
            f"{e.where}: an encoder–decoder takes one prompt and one completion; give prompt and completion columns"
        )
    before = "".join(f"{m['content']}\n\n" for m in e.messages or [] if m["role"] == "system")
    return before + turns[0]["content"], turns[1]["content"]


def classify(maker: Maker, examples: list[Example]) -> list[Row | None]:
    """A text, or a pair of texts, and its class."""
    for e in examples:
        if e.text is None or e.label is None:
            raise LuthierError(
                f"{e.where}: classification takes columns text and label; map them with columns: {{text: …, label: …}}"
            )
    paired = any(e.text_pair is not None for e in examples)
    texts = [e.text or "" for e in examples]
    seconds = {"text_pair": [e.text_pair or "" for e in examples]} if paired else {}
    encoded = maker.tokenizer(texts, **seconds, add_special_tokens=True, verbose=False)["input_ids"]
    out: list[Row | None] = []
    for e, ids in zip(examples, encoded, strict=True):
        if not maker.fits(len(ids), e.where):
            out.append(None)
            continue
        kept, weights, over = maker.cut(ids, np.zeros(len(ids)))
        row = Row(kept, weights, e.where, over, label=index_of(e, maker.labels), weight=e.weight)
        row.says_nothing = not f"{e.text}{e.text_pair or ''}".strip()
        out.append(row)
    return out


def index_of(e: Example, labels: list[str] | None) -> int:
    """The class index of an example's label: a name among base.labels, or an index within them."""
    label = e.label
    if labels and str(label) in labels:
        return labels.index(str(label))
    number = int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdecimal()) else None
    if number is None and not labels:
        raise LuthierError(f"{e.where}: label {label!r} is a name; list the class names in index order in base.labels")
    if number is None or number < 0 or (labels and number >= len(labels)):
        raise LuthierError(f"{e.where}: unknown label {label!r}; {nearest(str(label), labels or [], 'label')}")
    return number


KINDS: dict[str, Callable[[Maker, list[Example]], list[Row | None]]] = {
    "causal": causal,
    "seq2seq": seq2seq,
    "classify": classify,
    "pair": pair,
}
"""Kind of a base or objective -> how examples become rows."""
