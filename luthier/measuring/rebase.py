"""Which of several ways to put a delta on a new base is to be shipped: measured alike, chosen by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from luthier.errors import LuthierError
from luthier.measuring import stats
from luthier.measuring.audit import respond
from luthier.measuring.checks import Score, judge
from luthier.measuring.cost import Watch
from luthier.measuring.gate import Answered, Line, Side, verdict
from luthier.measuring.items import Response
from luthier.measuring.sources import Prepared
from luthier.plan.schema import AuditSpec, GateSpec

RULE = (
    "Of the ways whose guards stay within tolerance of what is in use now (the old base with the delta), the best is the "
    "one with the highest lower bound of the target score; the cheapest way that is not shown to be worse than it on the "
    "same items is shipped."
)


@dataclass(frozen=True)
class Replies:
    """What one model said to every check, and how it was judged."""

    responses: list[list[Response]]
    scores: list[list[Score]]
    seconds: float


@dataclass(frozen=True)
class Way:
    """One way to put the delta on the new base. Ways are listed cheapest first."""

    name: str
    how: str
    target: stats.Interval
    """Mean over the targets: share right, or minus the loss in nats."""
    over_base: stats.Interval
    """The same, minus that of the new base alone, paired."""
    guards: list[Line]
    """What the guards lose against the old base with the delta."""
    within: bool
    """No guard's estimate is beyond its tolerance."""
    flips: int
    """Items that were right on the old base with the delta and are wrong this way, over all checks."""
    seconds: float
    """To make and to measure it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask(side: Side, checks: Sequence[Prepared], spec: AuditSpec, progress: Callable[[str], None]) -> Replies:
    """All checks put to one model."""
    with Watch() as watch, side.here():
        responses = []
        for check in checks:
            progress(f"{check.name}: {side.name}")
            responses.append(respond(side.base, check, spec.batch_size))
    scores = [judge(c.metric, c.items, r) for c, r in zip(checks, responses, strict=True)]
    return Replies(responses, scores, watch.seconds)


def paired(checks: Sequence[Prepared], old: Replies, new: Replies) -> list[Answered]:
    """Two models' replies, check by check."""
    rows = zip(checks, old.responses, new.responses, old.scores, new.scores, strict=True)
    return [Answered(*row) for row in rows]


def weigh(
    name: str, how: str, checks: Sequence[Prepared], base: Replies, old: Replies, new: Replies, made: float,
    spec: AuditSpec, limits: GateSpec, seed: int,
) -> Way:  # fmt: skip
    """A way's scores: its target over the new base alone, guards and flips against the old base with the delta."""
    options: dict[str, Any] = {"resamples": spec.resamples, "seed": seed}
    values, weights = target_values(checks, new)
    bare, _ = target_values(checks, base)
    shares = all(check.metric.unit == "share" for check in checks if check.kind == "target")
    own, apart = ((0.0, 1.0), (-1.0, 1.0)) if shares else (None, None)
    quiet = limits.model_copy(update={"max_calibration_loss": None, "max_drift": None, "max_negative_flips": None})
    kept = [a for a in paired(checks, old, new) if a.check.kind != "target"]
    guards = verdict(kept, None, spec, quiet, seed).lines if kept else []
    flips = sum(
        len(stats.flips([s.value for s in a.was], [s.value for s in a.now], 1.0).negative)
        for a in paired(checks, old, new)
        if a.check.metric.unit == "share"
    )
    return Way(
        name, how,
        stats.bootstrap(values, weights=weights, bounds=own, **options),
        stats.bootstrap(values - bare, weights=weights, bounds=apart, **options),
        guards, all(line.verdict != "fail" for line in guards), flips, made + new.seconds,
    )  # fmt: skip


def one_unit(checks: Sequence[Prepared]) -> None:
    """Refuses targets of which some are scored by shares and others by losses: no mean is made of the two."""
    targets = [check for check in checks if check.kind == "target"]
    shares = [check.name for check in targets if check.metric.unit == "share"]
    losses = [check.name for check in targets if check.metric.unit != "share"]
    if shares and losses:
        raise LuthierError(
            f"audit.target: {', '.join(shares)} are scored by the share right, {', '.join(losses)} by a loss, and the ways are "
            "compared by one mean: state targets of one kind"
        )


def target_values(checks: Sequence[Prepared], replies: Replies) -> tuple[np.ndarray, np.ndarray]:
    """Every target item's score, higher is better, and its weight: targets count alike, tokens within one do too."""
    values, weights = [], []
    for check, scores in zip(checks, replies.scores, strict=True):
        if check.kind == "target":
            own = np.array([s.weight for s in scores])
            sign = 1.0 if check.metric.better == "higher" else -1.0
            values.append(sign * np.array([s.value for s in scores]))
            weights.append(own / own.sum())
    return np.concatenate(values), np.concatenate(weights)


def choose(
    ways: Sequence[Way], replies: Sequence[Replies], checks: Sequence[Prepared], spec: AuditSpec, seed: int
) -> tuple[int | None, str]:
    """The way to ship by RULE, and why; None where every way breaks a guard."""
    within = [i for i, way in enumerate(ways) if way.within]
    if not within:
        return None, "every way loses more on a guard than its tolerance"
    best = max(within, key=lambda i: (ways[i].target.low, -i))
    top, weights = target_values(checks, replies[best])
    for i in within:
        own, _ = target_values(checks, replies[i])
        worse = stats.bootstrap(own - top, weights=weights, resamples=spec.resamples, seed=seed)
        if i == best:
            return i, f"{ways[i].name} has the best lower bound of the target score"
        if worse.high >= 0:
            return i, (
                f"{ways[best].name} has the best lower bound of the target score, and {ways[i].name}, which is cheaper, "
                f"is not shown to be worse ({worse.value:+.3f} [{worse.low:+.3f}, {worse.high:+.3f}])"
            )
    raise AssertionError("the best is among those within")
