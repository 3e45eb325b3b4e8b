"""What an edit or an unlearning did: one scorecard for every method, each line paired, with its interval and n."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from luthier.algebra.edit_records import Asked, Record, Task, Writer
from luthier.editing.engine import Text
from luthier.measuring.forward import batches, measured, predict, vocabulary_of
from luthier.measuring.items import Item
from luthier.measuring.stats import Interval, bootstrap, mean
from luthier.sampling.generate import Sampling, generate

ANSWER = 24
"""Most tokens of an answer that must stay as it was."""
FLOW = 48
"""Tokens generated, past any end, to see whether speech still flows."""


Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Line:
    """One measurement: before and after, and their paired difference, over n records."""

    name: str
    before: float
    after: Interval
    gap: Interval
    n: int
    unit: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class Scorecard:
    """All lines; those that the records give nothing for are named in `missing`."""

    task: Task
    lines: list[Line] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def __contains__(self, name: str) -> bool:
        return any(line.name == name for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {"task": self.task, "lines": [line.to_dict() for line in self.lines], "missing": self.missing}


@dataclass(frozen=True)
class Read:
    """What a model says at one text's target."""

    right: bool
    """Every target token is the likeliest."""
    logprob: float
    """Mean over the target's tokens."""


def look(model: Any, texts: Sequence[Text]) -> list[Read]:
    """One Read for each text, in order."""
    items = [Item(str(n), "", ids=t.ids, weights=_counted(t)) for n, t in enumerate(texts)]
    out: list[Read | None] = [None] * len(items)
    with measured(model):
        for at in batches(items, 32, vocabulary_of(model)):
            for n, found in zip(at, predict(model, "causal", [items[n] for n in at]), strict=True):
                logs = found.logits.log_softmax(-1)
                right = bool((logs.argmax(-1) == found.targets).all())
                out[n] = Read(right, float(logs.gather(1, found.targets[:, None]).mean()))
    return [r for r in out if r is not None]


def _counted(text: Text) -> tuple[float, ...]:
    return tuple(1.0 if text.start <= n < text.end else 0.0 for n in range(len(text.ids)))


def scorecard(
    model: Any,
    before: Context,
    after: Context,
    records: Sequence[Record],
    writer: Writer,
    task: Task,
    general: Sequence[Text],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Scorecard:
    """Measures the model inside `after()` against the same model inside `before()`.

    To edit: efficacy (the new target follows the prompt), preference (it is likelier than the true one), generalisation
    (it follows the paraphrases), locality (neighbours are answered word for word as before), neighbours right,
    portability. To forget: recall and probability of what is to be forgotten, retained (kept prompts answered as
    before). Both: fluency (n-gram entropy of generated text, bits) and general loss (nats a token on held-out text).
    Several prompts of one record count as one item, their mean.
    """
    card = Scorecard(task)
    made = _Maker(model, before, after, writer, card, resamples, seed)
    ask = [(r, writer.text(r.prompt, r.target, where=r.where)) for r in records]
    if task == "edit":
        made.share("efficacy", [[t] for _, t in ask])
        made.preference([(t, writer.text(r.prompt, r.true, where=r.where)) for r, t in ask if r.true])
        made.share(
            "generalisation", [[writer.text(p, r.target, where=r.where) for p in r.paraphrases] for r in records]
        )
        made.unchanged("locality", [[a.prompt for a in r.neighbours] for r in records])
        made.share("neighbours right", [_known(writer, r.neighbours, r.where) for r in records])
        made.share("portability", [_known(writer, r.portability, r.where) for r in records])
    else:
        made.share("recall", [[t] for _, t in ask])
        made.probability("probability", [t for _, t in ask])
        made.unchanged("retained", [[a.prompt for a in r.neighbours] for r in records])
        made.share("retained right", [_known(writer, r.neighbours, r.where) for r in records])
    made.fluency([writer.ask(r.prompt) if r.prompt else t.ids[: max(1, len(t.ids) // 2)] for r, t in ask])
    made.loss(general)
    return card


def _known(writer: Writer, asked: Sequence[Asked], where: str) -> list[Text]:
    return [writer.text(a.prompt, a.target, where=where) for a in asked if a.target]


@dataclass
class _Maker:
    model: Any
    before: Context
    after: Context
    writer: Writer
    card: Scorecard
    resamples: int
    seed: int

    def both(self, texts: Sequence[Text]) -> tuple[list[Read], list[Read]]:
        """(before, after)"""
        with self.before():
            was = look(self.model, texts)
        with self.after():
            return was, look(self.model, texts)

    def line(
        self, name: str, before: Sequence[float], after: Sequence[float], unit: str = "", note: str = "", **bounds: Any
    ) -> None:
        if not len(after):
            self.card.missing.append(name)
            return
        settings: dict[str, Any] = {"resamples": self.resamples, "seed": self.seed, **bounds}
        gap = bootstrap(np.column_stack([before, after]), lambda m: m[..., 1] - m[..., 0], **settings)
        line = Line(
            name,
            float(np.average(before, weights=bounds.get("weights"))),
            bootstrap(np.asarray(after), mean, **settings),
            gap,
            len(after),
            unit,
            note,
        )
        self.card.lines.append(line)

    def share(self, name: str, groups: Sequence[Sequence[Text]]) -> None:
        """Share of targets that are the model's own greedy answer."""
        groups = [g for g in groups if g]
        before, after = self.both([t for g in groups for t in g])
        prompts = sum(map(len, groups))
        note = f"{prompts} prompts" if prompts != len(groups) else ""
        rows = [_means([float(r.right) for r in reads], groups) for reads in (before, after)]
        self.line(name, rows[0], rows[1], note=note, bounds=(0.0, 1.0))

    def preference(self, pairs: Sequence[tuple[Text, Text]]) -> None:
        """Share of records whose new target is likelier than the true one."""
        new, true = self.both([a for a, _ in pairs]), self.both([b for _, b in pairs])
        rows = [[float(a.logprob > b.logprob) for a, b in zip(new[k], true[k], strict=True)] for k in (0, 1)]
        self.line("preference", rows[0], rows[1], bounds=(0.0, 1.0))

    def unchanged(self, name: str, groups: Sequence[Sequence[str]]) -> None:
        """Share of prompts whose greedy answer is word for word what it was."""
        groups = [g for g in groups if g]
        asked = [self.writer.ask(p) for g in groups for p in g]
        words = self.writer.words
        with self.before(), measured(self.model):
            told = generate(self.model, words, asked, max_new_tokens=ANSWER, keep_stop=True)
        texts = [Text((*q, *a), len(q)) for q, a in zip(asked, told, strict=True) if a]
        with self.after():
            now = iter(look(self.model, texts))
        rows = _means([float(next(now).right) if a else 1.0 for a in told], groups)
        self.line(name, [1.0] * len(rows), rows, note=f"{len(asked)} prompts", bounds=(0.0, 1.0))

    def probability(self, name: str, texts: Sequence[Text]) -> None:
        """Geometric mean of a token's probability in what is to be forgotten."""
        before, after = self.both(texts)
        rows = [[math.exp(r.logprob) for r in reads] for reads in (before, after)]
        self.line(name, rows[0], rows[1], note="of a token", bounds=(0.0, 1.0))

    def fluency(self, prompts: Sequence[Sequence[int]]) -> None:
        """n-gram entropy of what is generated past the prompts, top 5, past any end: ⅔ H₂ + 4⁄3 H₃, halved (Meng et al. 2022)."""
        how = Sampling(temperature=1.0, top_k=5, seed=self.seed)
        rows: list[list[float]] = []
        for context in (self.before, self.after):
            with context(), measured(self.model):
                found = generate(self.model, self.writer.words, prompts, max_new_tokens=FLOW, stop=(), sampling=how)
                rows.append([flow(ids) for ids in found])
        self.line("fluency", rows[0], rows[1], "bits", f"{FLOW} tokens each")

    def loss(self, general: Sequence[Text]) -> None:
        before, after = self.both(general)
        sizes = [float(t.end - t.start) for t in general]
        self.line(
            "general loss",
            [-r.logprob for r in before],
            [-r.logprob for r in after],
            "nats a token",
            f"{int(sum(sizes))} tokens",
            weights=sizes,
        )


def _means(values: Sequence[float], groups: Sequence[Sequence[Any]]) -> list[float]:
    at, out = 0, []
    for group in groups:
        out.append(float(np.mean(values[at : at + len(group)])))
        at += len(group)
    return out


def flow(ids: Sequence[int]) -> float:
    """(⅔ H₂ + 4⁄3 H₃) / 2 in bits, H_n the entropy of the n-grams of ids: low where a text repeats itself."""
    return (2 / 3 * _entropy(ids, 2) + 4 / 3 * _entropy(ids, 3)) / 2


def _entropy(ids: Sequence[int], n: int) -> float:
    counts = Counter(tuple(ids[k : k + n]) for k in range(len(ids) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0
