"""Whether a model is as often right as it is sure: confidences of written answers, calibration error and Brier score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from luthier.measuring import forward, stats
from luthier.measuring.items import Item, Response

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Two models' expected calibration error (Guo et al. 2017; 10 bins of equal width) and Brier score (Brier 1950: mean
    squared distance of confidence from right = 1, wrong = 0), and the change, with 95 % intervals over pairs of items."""

    ece: dict[str, stats.Interval]
    brier: dict[str, stats.Interval]
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sure_answers(
    base: Any,
    items: Sequence[Item],
    max_new_tokens: int,
    batch_size: int,
    confidence: Literal["answer", "token"] = "answer",
) -> list[Response]:
    """Greedy answers with the model's confidence in each, 0 to 1, from the probabilities of its tokens and its ending.

    answer: the product, which is the probability of exactly this answer: right where there is one right wording.
    token: the geometric mean a token, for answers that could be worded in many ways. An answer without any token (no
    room behind the prompt) has confidence 0.
    """
    from luthier.sampling.generate import generate, stop_ids

    model, tokenizer = base.model, base.tokenizer
    with forward.measured(model):
        written = generate(
            model, tokenizer, [list(i.source) for i in items], max_new_tokens, batch_size, keep_stop=True
        )
    stops = stop_ids(model, tokenizer)
    rows = [_row(item, answer, base.kind) for item, answer in zip(items, written, strict=True)]
    asked = [i for i, answer in enumerate(written) if answer]
    found = forward.losses(model, base.kind, [rows[i] for i in asked], batch_size)
    sure = [0.0] * len(items)
    for i, response in zip(asked, found, strict=True):
        loss = response.loss or 0.0
        sure[i] = math.exp(-loss * (response.tokens if confidence == "answer" else 1.0))
    out = []
    for answer, share in zip(written, sure, strict=True):
        ids = answer[:-1] if answer and answer[-1] in stops else answer
        out.append(Response(text=tokenizer.decode(ids, skip_special_tokens=True).strip(), confidence=share))
    return out


def _row(item: Item, answer: Sequence[int], kind: str) -> Item:
    """The item with an answer behind its prompt, of which the answer counts."""
    ones = (1.0,) * len(answer)
    if kind == "seq2seq":
        return replace(item, ids=tuple(answer), weights=ones)
    return replace(item, source=(), ids=(*item.source, *answer), weights=(*(0.0,) * len(item.source), *ones))


def calibration(
    old: Sequence[float], old_right: Sequence[float], new: Sequence[float], new_right: Sequence[float],
    *, resamples: int = 1000, seed: int = 0,
) -> Calibration:  # fmt: skip
    """Confidences and rewards (0 to 1) of two models on the same items."""
    sides = [(np.asarray(c, dtype=float), np.asarray(r, dtype=float)) for c, r in ((old, old_right), (new, new_right))]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    gaps = [_binned(c, r) for c, r in sides]
    squares = [(c - r) ** 2 for c, r in sides]

    def error(means: np.ndarray) -> np.ndarray:
        return np.abs(means[..., :BINS]).sum(-1)

    def grown(means: np.ndarray) -> np.ndarray:
        return np.abs(means[..., BINS:]).sum(-1) - error(means)

    ece = {
        "old": stats.bootstrap(gaps[0], error, **options),
        "new": stats.bootstrap(gaps[1], error, **options),
        "change": _apart(gaps, stats.bootstrap(np.hstack(gaps), grown, **options)),
    }
    brier = {
        "old": stats.bootstrap(squares[0], **options),
        "new": stats.bootstrap(squares[1], **options),
        "change": _apart(squares, stats.bootstrap(squares[1] - squares[0], **options)),
    }
    return Calibration(ece, brier, len(squares[0]))


def _binned(sure: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Confidence minus reward in the column of its bin: the error is the sum of the columns' absolute means, so that
    items can be drawn again like those of any mean."""
    slot = np.clip((sure * BINS).astype(int), 0, BINS - 1)
    return np.where(slot[:, None] == np.arange(BINS), (sure - right)[:, None], 0.0)


def _apart(sides: Sequence[np.ndarray], change: stats.Interval) -> stats.Interval:
    """Where no item differs between the models, what n items cannot exclude, instead of a width of zero."""
    if np.array_equal(sides[0], sides[1]):
        return stats.nothing_seen(len(sides[0]))
    return change
