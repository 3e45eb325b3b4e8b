"""Numbers with their uncertainty: paired bootstrap intervals, flips, calibration, and what a sample can detect at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Numbers = Sequence[float] | np.ndarray
Statistic = Callable[[np.ndarray], np.ndarray]
"""From weighted column means, shape [..., k], to one number each, shape [...]."""

_NORMAL = NormalDist()
_CHUNK = 4_000_000  # numbers drawn at once: bounds the memory of a bootstrap over many items


@dataclass(frozen=True)
class Interval:
    """A number and the range that holds it at the stated level (default 95 %), all in the number's own unit."""

    value: float
    low: float
    high: float

    def excludes(self, number: float = 0.0) -> bool:
        """Whether the range leaves this number out."""
        return self.low > number or self.high < number

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Flips:
    """Items that were right and are wrong now (negative), and the other way round (positive), by position."""

    negative: tuple[int, ...]
    positive: tuple[int, ...]


def mean(means: np.ndarray) -> np.ndarray:
    """The statistic of one column: its mean."""
    return means[..., 0]


def bootstrap(
    values: Sequence[Sequence[float]] | np.ndarray,
    statistic: Statistic = mean,
    *,
    weights: Numbers | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """A bias-corrected and accelerated bootstrap interval (Efron 1987) of a statistic of weighted column means.

    `values` is [n] or [n, k]; whole rows are drawn, so columns stay paired. `weights` [n] weigh the rows (tokens of a
    record). `bounds` are the limits of one item's value; a sample without any variation there gets the exact binomial
    bound instead of a width of zero, because 100 of 100 does not show that the next one is right too.
    """
    rows = np.asarray(values, dtype=np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    n = len(rows)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.sum() <= 0:
        return Interval(math.nan, math.nan, math.nan)
    weighted = np.column_stack([rows * w[:, None], w])
    totals = weighted.sum(0)
    point = float(statistic(totals[:-1] / totals[-1]))
    if bounds is not None and np.ptp(rows, axis=0).max() == 0:
        slack = (bounds[1] - bounds[0]) * _unseen(n, level)
        reach = bounds[1] - bounds[0]
        least, most = (-reach, reach) if rows.shape[1] > 1 else bounds
        return Interval(point, max(least, point - slack), min(most, point + slack))
    if n == 1:
        return Interval(point, -math.inf, math.inf)
    drawn = np.sort(statistic(_resampled(weighted, resamples, seed)))
    left = totals - weighted
    keep = left[:, -1] > 0
    return Interval(point, *_bca(point, drawn, statistic(left[keep, :-1] / left[keep, -1:]), level))


def nothing_seen(n: int, level: float = 0.95) -> Interval:
    """The change of a share when none of n pairs differs: 0, up to what so few could hide in either direction."""
    slack = _unseen(n, level)
    return Interval(0.0, -slack, slack)


def share(count: int, n: int, level: float = 0.95) -> Interval:
    """A share with its exact binomial interval (Clopper and Pearson 1934), for events too rare to draw again."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    tail = (1.0 - level) / 2.0
    low = 0.0 if count == 0 else _crossing(lambda p: 1.0 - _at_most(count - 1, n, p), tail)
    high = 1.0 if count == n else _crossing(lambda p: 1.0 - _at_most(count, n, p), 1.0 - tail)
    return Interval(count / n, low, high)


def _at_most(count: int, n: int, p: float) -> float:
    """P(no more than `count` of n) where each has probability p."""
    if not 0.0 < p < 1.0:
        return 1.0 if p <= 0 or count >= n else 0.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(count + 1)
    )
    return math.fsum(map(math.exp, logs))


def _crossing(rising: Callable[[float], float], level: float) -> float:
    """Where a rising function on [0, 1] passes a level."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2


def _unseen(n: int, level: float) -> float:
    """The largest share that could still be hidden when none of n items showed it (Clopper and Pearson 1934)."""
    return 1.0 - ((1.0 - level) / 2.0) ** (1.0 / n)


def _resampled(weighted: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Weighted column means of `resamples` draws with replacement, shape [resamples, k]."""
    rng = np.random.default_rng(seed)
    n, step = len(weighted), max(1, _CHUNK // len(weighted))
    parts = []
    for start in range(0, resamples, step):
        sums = weighted[rng.integers(0, n, (min(step, resamples - start), n))].sum(1)
        parts.append(sums[:, :-1] / np.maximum(sums[:, -1:], np.finfo(float).tiny))
    return np.concatenate(parts)


def _bca(point: float, drawn: np.ndarray, jackknife: np.ndarray, level: float) -> tuple[float, float]:
    below = (np.count_nonzero(drawn < point) + np.count_nonzero(drawn <= point)) / 2 / len(drawn)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    spread = jackknife.mean() - jackknife
    scale = 6.0 * float((spread**2).sum()) ** 1.5
    bend = float((spread**3).sum()) / scale if scale > 0 else 0.0
    ends = []
    for z in (_NORMAL.inv_cdf((1 - level) / 2), _NORMAL.inv_cdf((1 + level) / 2)):
        ends.append(_NORMAL.cdf(bias + (bias + z) / max(1 - bend * (bias + z), 1e-6)))
    low, high = np.quantile(drawn, ends)
    return float(low), float(high)


def flips(before: Numbers, after: Numbers, threshold: float = 0.5) -> Flips:
    """Which items crossed the threshold, downwards (negative) and upwards (positive)."""
    was = np.asarray(before) >= threshold
    now = np.asarray(after) >= threshold
    return Flips(tuple(np.flatnonzero(was & ~now).tolist()), tuple(np.flatnonzero(~was & now).tolist()))


def minimum_detectable(before: Numbers, after: Numbers, *, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference that this many pairs, as noisy as these, would show at `level` with `power`.

    Pairs that all agree carry no estimate of the noise; then the noise of one disagreeing pair is assumed.
    """
    gaps = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(gaps) < 2:
        return math.inf
    noise = float(gaps.std(ddof=1)) or 1.0 / math.sqrt(len(gaps))
    return (_NORMAL.inv_cdf((1 + level) / 2) + _NORMAL.inv_cdf(power)) * noise / math.sqrt(len(gaps))


def calibration_error(confidence: Numbers, correct: Numbers, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): confidence minus accuracy, by equal-width bins, weighted by size."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if len(sure) == 0:
        return math.nan
    slot = np.clip((sure * bins).astype(int), 0, bins - 1)
    return float(sum(abs((sure - right)[slot == b].sum()) for b in range(bins)) / len(sure))
