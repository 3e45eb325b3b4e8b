"""One check of an audit: the same items before and after, scored, paired, with intervals, flips and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from luthier.errors import LuthierError
from luthier.measuring import stats
from luthier.measuring.items import Item, Response
from luthier.parts.verdict import Verdict

Kind = Literal["target", "guard", "shifted"]
Verify = Callable[[dict[str, Any], str], Any]
"""From the record's fields and the answer to a Verdict, a truth value or a reward from 0 to 1."""

_SHOWN = 2000  # characters of a text in a report


@dataclass(frozen=True)
class Metric:
    """How an item is scored. `unit` is share (0 to 1, more is better), nats or perplexity (less is better)."""

    name: str
    needs: Literal["answer", "loss", "label"]
    unit: Literal["share", "nats", "perplexity"] = "share"
    verify: Verify | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the plan gave the verifier."""

    @property
    def better(self) -> str:
        return "higher" if self.unit == "share" else "lower"


LOSS = Metric("loss", "loss", "nats")
PERPLEXITY = Metric("perplexity", "loss", "perplexity")
ACCURACY = Metric("accuracy", "label")


@dataclass(frozen=True)
class Score:
    """One response judged: its value in the metric's unit, its weight, and why."""

    value: float
    weight: float = 1.0
    reason: str = ""
    decided: bool = True


@dataclass(frozen=True)
class CheckResult:
    """What one check found. Intervals are at 95 %; `detectable` is the difference that n items as noisy as these show
    four times in five."""

    name: str
    kind: Kind
    metric: str
    unit: str
    better: str
    n: int
    before: stats.Interval
    after: stats.Interval
    difference: stats.Interval
    detectable: float
    flips: dict[str, Any] | None
    undecided: dict[str, int]
    calibration: dict[str, float] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(metric: Metric, items: Sequence[Item], responses: Sequence[Response]) -> list[Score]:
    """A score for each response. What a verifier cannot decide counts as wrong, and is counted."""
    return [_score(metric, item, response) for item, response in zip(items, responses, strict=True)]


def _score(metric: Metric, item: Item, response: Response) -> Score:
    if metric.needs == "loss":
        if response.loss is None:
            raise LuthierError(f"record {item.id} has no token to measure a loss on: give it an answer or take it out")
        if not math.isfinite(response.loss):
            raise LuthierError(
                f"the loss on record {item.id} is {response.loss}: the model is broken, audit an earlier one"
            )
        return Score(response.loss, response.tokens)
    if metric.needs == "label":
        right = response.label == item.label
        return Score(float(right), reason=f"with confidence {response.confidence:.2f}")
    if metric.verify is None:
        raise LuthierError(f"metric '{metric.name}' has no verifier: name one of luthier.sampling.verifiers")
    said = metric.verify(dict(item.record), response.text or "")
    verdict = Verdict(float(said)) if isinstance(said, (bool, int, float)) else said
    if not verdict.decided:
        return Score(0.0, reason=verdict.reason, decided=False)
    if not 0.0 <= verdict.reward <= 1.0:
        raise LuthierError(
            f"metric '{metric.name}' gave {verdict.reward} for record {item.id}: a reward lies between 0 and 1"
        )
    return Score(float(verdict.reward), reason=verdict.reason)


def compare(
    name: str,
    kind: Kind,
    metric: Metric,
    items: Sequence[Item],
    before: Sequence[Response],
    after: Sequence[Response],
    *,
    resamples: int = 1000,
    samples: int = 6,
    seed: int = 0,
) -> CheckResult:
    """Judge both sides of a check and set them against each other, item by item."""
    if not items:
        raise LuthierError(
            f"check '{name}' has no record to measure on: give its source records, or take the check out"
        )
    was, now = judge(metric, items, before), judge(metric, items, after)
    pairs = np.array([[b.value, a.value] for b, a in zip(was, now, strict=True)]).reshape(-1, 2)
    weights = np.array([b.weight for b in was])
    share = metric.unit == "share"
    turned = stats.flips(pairs[:, 0], pairs[:, 1], threshold=1.0) if share else None
    interval = _intervals(metric, pairs, weights, resamples, seed)
    detectable = stats.minimum_detectable(*_noise(metric, pairs, weights))
    return CheckResult(
        name, kind, metric.name, metric.unit, metric.better, len(items), *interval, detectable,
        flips=_told(turned, items) if turned else None,
        undecided={"before": sum(not s.decided for s in was), "after": sum(not s.decided for s in now)},
        calibration=_calibration(metric, was, now, before, after),
        samples=_samples(items, before, after, was, now, turned, samples, seed),
    )  # fmt: skip


def _intervals(
    metric: Metric, pairs: np.ndarray, weights: np.ndarray, resamples: int, seed: int
) -> tuple[stats.Interval, stats.Interval, stats.Interval]:
    options: dict[str, Any] = {"weights": weights, "resamples": resamples, "seed": seed}
    if metric.unit == "share":
        options["bounds"] = (0.0, 1.0)
    unchanged = metric.unit == "share" and np.array_equal(pairs[:, 0], pairs[:, 1])
    of = np.exp if metric.unit == "perplexity" else (lambda x: x)
    return (
        stats.bootstrap(pairs[:, 0], lambda m: of(stats.mean(m)), **options),
        stats.bootstrap(pairs[:, 1], lambda m: of(stats.mean(m)), **options),
        stats.nothing_seen(len(pairs))
        if unchanged and len(pairs)
        else stats.bootstrap(pairs, lambda m: of(m[..., 1]) - of(m[..., 0]), **options),
    )


def _noise(metric: Metric, pairs: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both columns as values whose plain paired noise is that of the metric: weighted, and linearised for perplexity."""
    scaled = pairs * (weights / weights.mean())[:, None]
    if metric.unit == "perplexity":
        scaled = scaled * np.exp((pairs * weights[:, None]).sum(0) / weights.sum())
    return scaled[:, 0], scaled[:, 1]


def _told(turned: stats.Flips, items: Sequence[Item]) -> dict[str, Any]:
    ids = {k: [items[i].id for i in getattr(turned, k)] for k in ("negative", "positive")}
    return {"negative": len(ids["negative"]), "positive": len(ids["positive"]),
            "negative_ids": ids["negative"], "positive_ids": ids["positive"]}  # fmt: skip


def _calibration(
    metric: Metric, was: Sequence[Score], now: Sequence[Score], before: Sequence[Response], after: Sequence[Response]
) -> dict[str, float] | None:
    if metric.needs != "label":
        return None
    return {
        moment: stats.calibration_error([r.confidence or 0.0 for r in responses], [s.value for s in scores])
        for moment, scores, responses in (("before", was, before), ("after", now, after))
    }


def _samples(
    items: Sequence[Item],
    before: Sequence[Response],
    after: Sequence[Response],
    was: Sequence[Score],
    now: Sequence[Score],
    turned: stats.Flips | None,
    most: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Flips first (both kinds in turn, so that one does not hide the other), then a seeded draw of the rest."""
    lost, won = (list(turned.negative), list(turned.positive)) if turned else ([], [])
    mixed = [i for k in range(max(len(lost), len(won))) for side in (lost, won) for i in side[k : k + 1]]
    seen = set(mixed)
    rest = [int(i) for i in np.random.default_rng(seed).permutation(len(items)) if int(i) not in seen]
    kept = mixed[: max(most - 1, 0)] if len(rest) and most > 2 else mixed  # leave room for one that did not change
    sides: list[dict[str, Any]] = []
    for i in (kept + rest)[:most]:
        flip = "negative" if i in lost else "positive" if i in won else None
        expected = None if items[i].expected is None else _cut(items[i].expected or "")
        sides.append({"id": items[i].id, "prompt": _cut(items[i].prompt), "expected": expected, "flip": flip,
                      "before": _side(before[i], was[i]), "after": _side(after[i], now[i])})  # fmt: skip
    return sides


def _side(response: Response, score: Score) -> dict[str, Any]:
    text = None if response.text is None else _cut(response.text)
    return {"text": text, "value": score.value, "reason": score.reason, "decided": score.decided}


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … (+{len(text) - _SHOWN:,} characters)"
