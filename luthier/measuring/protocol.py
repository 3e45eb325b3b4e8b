"""How a claim is put to the test here: paired items and seeds, power stated in advance, equal tuning, and a verdict.

    plan = Plan(effect=0.05, seeds=5, items=400, spread=spread(pilot_a, pilot_b))
    plan.power()                                       # 0.93: said before anything is measured
    found = paired(baseline, method)                   # [seeds, items] scores of both arms, the same items
    judge(plan, found, (Arm("lora", …), Arm("dora", …)))   # reproduced, not reproduced or underpowered, in this world

Pure functions of numbers. Scores are in any unit; effects are in the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from luthier.errors import LuthierError
from luthier.measuring.stats import nothing_seen

Scores = Sequence[Sequence[float]] | np.ndarray
"""Scores of one arm, [seeds, items]: row s is the run of seed s, column i is item i, the same in both arms."""
LEVEL, POWER = 0.95, 0.8
FEW = 30
"""Differing scores below which a bootstrap interval is not narrower than a plain one."""
VERDICTS = ("reproduced", "not reproduced", "underpowered")

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the differences method - baseline: between seeds, between items, and what is left."""

    seeds: float
    items: float
    rest: float

    def error(self, seeds: int, items: int) -> float:
        """Standard error of the mean difference over so many seeds and items."""
        return math.sqrt(self.seeds**2 / seeds + self.items**2 / items + self.rest**2 / (seeds * items))

    def freedom(self, seeds: int, items: int) -> float:
        """Degrees of freedom of that error (Satterthwaite 1946): few, where it is the seeds that differ."""
        parts = (
            (self.seeds**2 / seeds, seeds - 1),
            (self.items**2 / items, items - 1),
            (self.rest**2 / (seeds * items), (seeds - 1) * (items - 1)),
        )
        below = sum(v * v / f for v, f in parts if f > 0)
        return sum(v for v, _ in parts) ** 2 / below if below else math.inf


@dataclass(frozen=True)
class Paired:
    """A mean difference (method - baseline), its standard error, and an interval at ``level``."""

    effect: float
    error: float
    low: float
    high: float
    seeds: int
    items: int
    level: float = LEVEL

    @property
    def errors(self) -> float:
        """The effect in standard errors."""
        return self.effect / self.error if self.error else math.copysign(math.inf, self.effect) if self.effect else 0.0


def _differences(baseline: Scores, method: Scores) -> np.ndarray:
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (baseline, method))
    if a.shape != b.shape or a.ndim != 2:
        raise LuthierError(f"protocol: scores of shape {a.shape} and {b.shape}; give [seeds, items], the same for both")
    if min(a.shape) < 2:
        raise LuthierError(f"protocol: {a.shape[0]} seeds and {a.shape[1]} items; give 2 of each at least")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise LuthierError("protocol: a score is not a number; give a score for every seed and item")
    return b - a


def spread(baseline: Scores, method: Scores) -> Spread:
    """The parts of the variance of the differences, by the two-way analysis of variance with random seeds and items and
    one value in each cell; a part estimated below 0 is 0. Raises LuthierError for scores that do not pair."""
    d = _differences(baseline, method)
    s, n = d.shape
    rows, columns, whole = d.mean(1), d.mean(0), d.mean()
    rest = float(((d - rows[:, None] - columns[None] + whole) ** 2).sum()) / ((s - 1) * (n - 1))
    between = [float(np.var(rows, ddof=1)) - rest / n, float(np.var(columns, ddof=1)) - rest / s]
    return Spread(math.sqrt(max(0.0, between[0])), math.sqrt(max(0.0, between[1])), math.sqrt(rest))


def paired(baseline: Scores, method: Scores, *, resamples: int = 2000, seed: int = 0, level: float = LEVEL) -> Paired:
    """The mean difference with a bootstrap interval. Seeds and items are both drawn with replacement (the pigeonhole
    bootstrap, Owen 2007), pairs staying together, which gives the interval its shape; that bootstrap overstates what is
    left between seeds and items up to three times, and few seeds drawn from themselves vary too little, so the width is
    that of the two-way analysis of variance with Student's quantile (our reading), the same that ``Plan`` reckons with.
    Where fewer than ``FEW`` scores differ, draws from them have no shape worth following: the interval is then at least
    what that quantile gives on either side. Raises LuthierError for scores that do not pair."""
    d = _differences(baseline, method)
    s, n = d.shape
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(s, np.full(s, 1 / s), size=resamples) / s
    columns = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    means = ((rows @ d) * columns).sum(1)
    effect = float(d.mean())
    parts = spread(baseline, method)
    error, sides = parts.error(s, n), np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) - effect
    drawn = float(means.std())
    share = (1 + level) / 2
    plain = error * quantile_t(share, parts.freedom(s, n)) if error else 0.0
    shaped = sides * (plain / drawn / _NORMAL.inv_cdf(share) if drawn else 0.0)
    low, high = float(shaped[0]), float(shaped[1])
    if np.count_nonzero(d) < FEW:
        low, high = min(-plain, low), max(plain, high)
    return Paired(effect, error, effect + low, effect + high, s, n, level)


def quantile_t(share: float, freedom: float) -> float:
    """Student's quantile, by the expansion of Fisher and Cornish (1960) in 1 / freedom: within 1 in 100 from 4 degrees
    of freedom on for the usual shares."""
    z = _NORMAL.inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))


@dataclass(frozen=True)
class Plan:
    """What is said before anything is measured: the smallest effect that matters, how many seeds and items will be run,
    and the spread that a pilot showed. ``sign`` is +1 where the claim is that the method scores higher, -1 for lower, and
    0 that both score alike, to within the effect."""

    effect: float
    seeds: int
    items: int
    spread: Spread
    sign: int = 1
    level: float = LEVEL

    def __post_init__(self) -> None:
        if not self.effect > 0 or self.sign not in (1, 0, -1):
            raise LuthierError(
                f"protocol: effect {self.effect} with sign {self.sign}; choose an effect above 0, sign 1, 0 or -1"
            )
        if self.seeds < 2 or self.items < 2:
            raise LuthierError(f"protocol: {self.seeds} seeds and {self.items} items; choose 2 of each at least")

    def power(self) -> float:
        """Chance that an effect of this size is found, its sign told at ``level`` (two-sided), by the normal
        approximation around Student's quantile; with sign 0, that arms which are alike are told to be. A pilot in which
        nothing varied counts as one that missed what so many items can miss, in scores of at most 1."""
        error = self.spread.error(self.seeds, self.items)
        bar = quantile_t((1 + self.level) / 2, self.spread.freedom(self.seeds, self.items))
        error = error or nothing_seen(self.items, self.level).high / bar
        found = _NORMAL.cdf(self.effect / error - bar)
        return found if self.sign else max(0.0, 2 * found - 1)


def needed(
    effect: float, spread: Spread, *, power: float = POWER, level: float = LEVEL, most: int = 64
) -> list[tuple[int, int]]:
    """(seeds, items) that find an effect with this power: for every number of seeds from 2 to ``most`` with which items
    can, the fewest items (at most a million), until more seeds save nothing. Empty where no such plan exists."""
    found: list[tuple[int, int]] = []
    for seeds in range(2, most + 1):
        low, high = 1, 1_000_000
        if Plan(effect, seeds, high, spread, level=level).power() < power:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            enough = Plan(effect, seeds, middle, spread, level=level).power() >= power
            low, high = (low, middle) if enough else (middle, high)
        if found and high >= found[-1][1]:
            break
        found.append((seeds, high))
    return found


@dataclass(frozen=True)
class Arm:
    """One arm's tuning on record: setting -> score on the tuning items, in the order tried, higher being better.
    ``chosen`` is the setting that was taken, by default the one with the best score."""

    name: str
    tried: Mapping[float, float]
    chosen: float | None = None

    def best(self) -> float:
        """The setting taken; else the one with the best score, the smaller of two that tie."""
        if self.chosen is not None:
            return self.chosen
        return max(sorted(self.tried), key=lambda setting: self.tried[setting])

    def at_edge(self) -> bool:
        """Whether a better setting may lie outside: the one taken is the smallest or largest tried, and none between these
        scores as well as the best. The smallest, taken because nothing is shown to be better (``gentlest``), is no open
        edge where the best score lies inside."""
        low, high = min(self.tried, default=0.0), max(self.tried, default=0.0)
        inside = [score for setting, score in self.tried.items() if low < setting < high]
        return low < high and self.best() in (low, high) and max(self.tried.values()) > max(inside, default=-math.inf)


def gentlest(tried: Mapping[float, Sequence[float]], level: float = LEVEL) -> float:
    """Of settings with their scores on the same tuning items, the smallest that is not shown, by the paired differences
    at ``level``, to be worse than the best: what a measure at its ceiling cannot tell apart is not decided by one item."""
    best = max(sorted(tried), key=lambda setting: float(np.mean(tried[setting])))
    for setting in sorted(tried):
        d = np.asarray(tried[best], dtype=np.float64) - np.asarray(tried[setting], dtype=np.float64)
        noise = float(d.std(ddof=1)) / math.sqrt(len(d))
        if d.mean() <= quantile_t((1 + level) / 2, len(d) - 1) * noise:
            return setting
    return best


def equal_budgets(arms: Sequence[Arm]) -> list[str]:
    """What is unequal or open about the arms' tuning, in words; empty if all had as many tries and none ends at an
    open edge (``Arm.at_edge``)."""
    counts = {arm.name: len(arm.tried) for arm in arms}
    told = []
    if len(set(counts.values())) > 1:
        told.append("tries differ: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    open_ended = {arm.name: Arm(arm.name, arm.tried).best() for arm in arms if arm.at_edge()}
    return told + [f"{name} scores best at the edge of its sweep, {at:g}" for name, at in open_ended.items()]


@dataclass(frozen=True)
class Verdict:
    """One of ``VERDICTS``, the reason in words, and what was wrong with the tuning, if anything."""

    verdict: str
    reason: str
    tuning: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = f"; {'; '.join(self.tuning)}" if self.tuning else ""
        return f"{self.verdict} in this world: {self.reason}{notes}"


def judge(plan: Plan, found: Paired, arms: Sequence[Arm] = ()) -> Verdict:
    """Reproduced: the interval lies on the claimed side of zero; where it excludes an effect as large as the plan's, the
    reason says so. Else not reproduced: it lies on the other side, or excludes such an effect. With sign 0, reproduced: it
    lies within the plan's effect on both sides of zero; not reproduced: it lies wholly outside. Underpowered: neither, or no
    item differs at all where some should; with sign 0 the interval is then what so many items cannot exclude, in scores
    of at most 1. Raises LuthierError where less was run than planned, or arms were not given as many tries as each other."""
    if found.seeds < plan.seeds or found.items < plan.items:
        raise LuthierError(
            f"protocol: planned {plan.seeds} seeds and {plan.items} items, got {found.seeds} and {found.items}; run the rest"
        )
    if len({len(arm.tried) for arm in arms}) > 1:
        raise LuthierError(f"protocol: {equal_budgets(arms)[0]}; tune every arm alike")
    low, high = sorted((plan.sign * found.low, plan.sign * found.high))
    said = f"{found.effect:+.4g} [{found.low:+.4g}, {found.high:+.4g}], {abs(found.errors):.1f} standard errors"
    tuning = tuple(equal_budgets(arms))
    if plan.sign == 0:
        return _alike(plan.effect, found, said, tuning)
    if found.error == 0 == found.effect:
        return Verdict("underpowered", "no item differs in any seed, so the noise is not known", tuning)
    if low > 0:
        small = f"; less than the {plan.effect:g} that matters" if high < plan.effect else ""
        return Verdict("reproduced", f"{said}{small}", tuning)
    if high < plan.effect:
        why = "the other way round" if high < 0 else f"an effect of {plan.effect:g} is excluded"
        return Verdict("not reproduced", f"{said}; {why}", tuning)
    return Verdict("underpowered", f"{said}; neither 0 nor {plan.effect:g} is excluded", tuning)


def _alike(bound: float, found: Paired, said: str, tuning: tuple[str, ...]) -> Verdict:
    if found.error == 0 == found.effect:
        unseen = nothing_seen(found.items, found.level)
        found = replace(found, low=unseen.low, high=unseen.high)
        said = f"no item differs in any seed, of {found.items} [{found.low:+.4g}, {found.high:+.4g}]"
    if -bound < found.low and found.high < bound:
        return Verdict("reproduced", f"{said}; a difference of {bound:g} is excluded both ways", tuning)
    if found.low >= bound or found.high <= -bound:
        return Verdict("not reproduced", f"{said}; they differ by {bound:g} at least", tuning)
    return Verdict("underpowered", f"{said}; a difference of {bound:g} is not excluded", tuning)
