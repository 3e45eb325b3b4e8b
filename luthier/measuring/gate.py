"""The gate: an old and a new model on the same items, line by line against limits, each with what its items can tell.

Every line is one change with its 95 % interval and one limit. It passes where the whole interval keeps the limit, fails
where the estimate breaks it, and is underpowered in between: the items cannot exclude what the limit forbids. The gate
passes only if every line does, so the lines need no correction for their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal, Protocol

import numpy as np

from luthier.bases.fingerprint import fingerprint_template, fingerprint_tokenizer
from luthier.errors import LuthierError, nearest
from luthier.measuring import stats
from luthier.measuring.audit import drift_text, respond
from luthier.measuring.calibration import Calibration, calibration, sure_answers
from luthier.measuring.checks import CheckResult, Score, compare, judge
from luthier.measuring.drift import Drift, between
from luthier.measuring.forward import measured, predict, vocabulary_of
from luthier.measuring.items import Item, Response
from luthier.measuring.sources import Prepared, prepare_checks
from luthier.plan.schema import AuditSpec, DataSpec, GateSpec
from luthier.sampling.verifiers import must_refuse

Verdict = Literal["pass", "fail", "underpowered"]
POWER = 0.8
"""How often a difference of the size called detectable is seen."""
_SURE = NormalDist().inv_cdf(0.975)
_SEEN = _SURE + NormalDist().inv_cdf(POWER)
_ROUNDING = 1e-12
"""What a share computed in two ways may differ by: a limit that is just reached is not passed over by it."""


class Side(Protocol):
    """One of the two models: `base` has `.model`, `.tokenizer` and `.kind`; inside `here()` it is the one that answers."""

    name: str
    base: Any

    def here(self) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Line:
    """One limit and what was found. `old`, `new`, `change` and `limit` are in `unit`; a loss is a change for the worse."""

    what: str
    """gain, loss, negative flips, drift, refused, over-refused or calibration."""
    check: str
    unit: str
    n: int
    old: float | None
    new: float | None
    change: stats.Interval
    limit: float
    bound: Literal["least", "most"]
    """Whether the change must be at least or at most the limit."""
    detectable: float
    """The smallest difference that n items as noisy as these show in four of five gates."""
    needed: int | None
    """Items that would tell, four times in five, if the change is as estimated; None where no number would, or none is."""
    verdict: Verdict


@dataclass(frozen=True)
class Found:
    """Everything a gate measured. `flipped` holds the negative flips: check, id, prompt, expected, old and new answer."""

    lines: list[Line]
    checks: list[CheckResult]
    flipped: list[dict[str, Any]]
    drift: Drift | None
    calibration: Calibration | None
    verdict: Literal["pass", "fail"]
    why: str
    unmeasured: list[str] = field(default_factory=list)
    """Default limits of which there is no line: gain, negative flips, refusal, calibration, drift."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answered:
    """A check and both models' responses, judged. `right` holds (old, new) rewards, [n, 2]."""

    check: Prepared
    old: list[Response]
    new: list[Response]
    was: list[Score] = field(default_factory=list)
    now: list[Score] = field(default_factory=list)

    def right(self) -> np.ndarray:
        return np.array([[a.value, b.value] for a, b in zip(self.was, self.now, strict=True)]).reshape(-1, 2)


def gate(
    old: Side,
    new: Side,
    spec: AuditSpec,
    limits: GateSpec,
    *,
    data: DataSpec | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Found:
    """Measure two models and hold the new one to the limits.

    Both are asked the same records, each in its own tokens and template. Errors: models of different kinds, a loss or a
    drift to be compared across two vocabularies, a tolerance for a check that is not there, a limit that the plan states
    and of which nothing is measured.
    """
    asked = asked_of(old, new, spec, data, seed)
    known = [check.name for check, _ in asked]
    for name in limits.tolerances:
        if name not in known:
            raise LuthierError(f"gate.tolerances: there is no check '{name}': {nearest(name, known, 'check')}")
    missing = not_measured([check for check, _ in asked], spec, limits)
    _refuse_stated(missing, limits)
    sure = limits.max_calibration_loss is not None
    responses: list[list[list[Response]]] = []
    for side, checks in ((old, [a for a, _ in asked]), (new, [b for _, b in asked])):
        with side.here():
            found = []
            for check in checks:
                progress(f"{check.name}: {side.name}")
                found.append(_respond(side.base, check, spec, limits, sure))
            responses.append(found)
    answered = [
        Answered(check, a, b, judge(check.metric, check.items, a), judge(check.metric, check.items, b))
        for (check, _), a, b in zip(asked, *responses, strict=True)
    ]
    moved = None
    if limits.max_drift is not None and spec.drift_tokens:
        progress("drift")
        moved = _drift(old, new, spec, [check for check, _ in asked], seed)
        if moved is None:
            missing["max_drift"] = ("drift", "name a guard that the old model's texts can begin with")
            _refuse_stated(missing, limits)
    return replace(verdict(answered, moved, spec, limits, seed), unmeasured=[name for name, _ in missing.values()])


def not_measured(checks: Sequence[Prepared], spec: AuditSpec, limits: GateSpec) -> dict[str, tuple[str, str]]:
    """The keys of limits that hold for nothing these checks measure -> (what is not measured, what to state instead)."""
    scored = [c for c in checks if c.metric.name != "refusal"]
    rows = {
        "min_gain": ("gain", any(c.kind == "target" for c in scored), "state audit.target"),
        "max_negative_flips": (
            "negative flips", any(c.metric.unit == "share" for c in checks), "state a check that is scored by the share right",
        ),
        "max_refusal_loss": ("refusal", len(scored) < len(checks), "state a check with metric: refusal"),
        "max_calibration_loss": (
            "calibration", any(c.metric.needs != "loss" for c in checks), "state a check of answers or classes",
        ),
        "max_drift": ("drift", spec.drift_tokens > 0, "state audit.drift_tokens: 1024"),
    }  # fmt: skip
    return {
        key: (name, remedy)
        for key, (name, found, remedy) in rows.items()
        if not found and getattr(limits, key) is not None
    }


def _refuse_stated(missing: Mapping[str, tuple[str, str]], limits: GateSpec) -> None:
    """One line where a limit that the plan states is among those of which nothing is measured."""
    for key, (name, remedy) in missing.items():
        if key in limits.model_fields_set:
            raise LuthierError(f"gate.{key} is stated and no {name} is measured: {remedy}, or leave gate.{key} out")


def verdict(answered: Sequence[Answered], moved: Drift | None, spec: AuditSpec, limits: GateSpec, seed: int) -> Found:
    """The lines of what was answered, and what they come to. Nothing is asked of a model here."""
    checks, lines, flipped = [], [], []
    for a in answered:
        result = compare(
            a.check.name, a.check.kind, a.check.metric, a.check.items, a.old, a.new,
            resamples=spec.resamples, samples=spec.samples, seed=seed,
        )  # fmt: skip
        checks.append(replace(result, dropped=a.check.dropped))
        flipped += flipped_of(a)
        if a.check.metric.name == "refusal":
            lines += _refusals(a, spec, limits, seed)
        else:
            lines.append(_score(a, result, limits))
        if result.flips and limits.max_negative_flips is not None:
            count = result.flips["negative"]
            lines.append(
                line("negative flips", a.check.name, "share", len(a.check.items), None, None,
                     stats.share(count, len(a.check.items)), limits.max_negative_flips, "most", rare=count == 0)
            )  # fmt: skip
    sure = _calibration(answered, spec, limits, seed)
    if sure is not None and limits.max_calibration_loss is not None:
        ece = sure.ece
        lines.append(
            line("calibration", "all answers", "share", sure.n, ece["old"].value, ece["new"].value, ece["change"],
                 limits.max_calibration_loss, "most", rare=ece["change"].value == 0)
        )  # fmt: skip
    if moved is not None and limits.max_drift is not None:
        lines.append(line("drift", "own text", "nats", moved.sequences, None, None, moved.kl, limits.max_drift, "most"))
    return Found(lines, checks, flipped, moved, sure, *_said(lines, limits))


def line(
    what: str, check: str, unit: str, n: int, old: float | None, new: float | None, change: stats.Interval,
    limit: float, bound: Literal["least", "most"], *, rare: bool = False,
) -> Line:  # fmt: skip
    """A change held to its limit. rare: nothing was seen, so the interval shrinks with n and not with its root."""
    worst = change if bound == "most" else stats.Interval(-change.value, -change.high, -change.low)
    most = limit if bound == "most" else -limit
    reach = worst.high - worst.value
    detectable = _SEEN / _SURE * reach
    margin = most - worst.value
    passed, failed = worst.high <= most + _ROUNDING, margin < -_ROUNDING or math.isnan(margin)
    found: Verdict = "pass" if passed else "fail" if failed else "underpowered"
    needed = None
    if found == "underpowered" and margin > _ROUNDING:
        many = math.log(0.025) / math.log1p(-margin) if rare and margin < 1 else n * (detectable / margin) ** 2
        needed = math.ceil(many) if math.isfinite(many) else None
    return Line(what, check, unit, n, old, new, change, limit, bound, detectable, needed, found)


# -- asking


def asked_of(
    old: Side, new: Side, spec: AuditSpec, data: DataSpec | None, seed: int
) -> list[tuple[Prepared, Prepared]]:
    """Every check in the old and the new model's tokens, with the same records in the same order.

    Errors: models of different kinds, and a loss to be compared across different tokens.
    """
    if old.base.kind != new.base.kind:
        raise LuthierError(
            f"{old.name} is a base of kind {old.base.kind}, {new.name} of kind {new.base.kind}: compare two of one kind"
        )
    before = prepare_checks(old.base, spec, data, seed)
    if _one_tongue(old, new):
        return [(check, check) for check in before]
    out = []
    for a, b in zip(before, prepare_checks(new.base, spec, data, seed), strict=True):
        if a.metric.needs == "loss":
            raise LuthierError(
                f"check '{a.name}' compares losses, but {old.name} and {new.name} have different tokens: "
                "state a metric of answers, or leave the check out"
            )
        both = {i.id for i in a.items} & {i.id for i in b.items}
        out.append(tuple(replace(p, items=[i for i in p.items if i.id in both]) for p in (a, b)))
    return out


def _one_tongue(old: Side, new: Side) -> bool:
    """Whether both turn text into the same tokens and have the same chat template, so that one rendering serves both."""
    a, b = old.base.tokenizer, new.base.tokenizer
    if a is b or a is None or b is None:
        return a is b
    return all(mark(a) == mark(b) for mark in (fingerprint_tokenizer, fingerprint_template))


def _words(tokenizer: Any) -> Any:
    get = getattr(tokenizer, "get_vocab", None)
    return get() if callable(get) else tokenizer


def _respond(base: Any, check: Prepared, spec: AuditSpec, limits: GateSpec, sure: bool) -> list[Response]:
    if sure and check.metric.needs == "answer":
        return sure_answers(base, check.items, check.max_new_tokens, spec.batch_size, limits.confidence)
    return respond(base, check, spec.batch_size)


class _Off:
    """The old model as what an audit calls the base."""

    def __init__(self, side: Side) -> None:
        self.off = side.here


def _drift(old: Side, new: Side, spec: AuditSpec, checks: Sequence[Prepared], seed: int) -> Drift | None:
    widths = [vocabulary_of(side.base.model) for side in (old, new)]
    if widths[0] != widths[1] or (
        old.base.kind != "classify" and _words(old.base.tokenizer) != _words(new.base.tokenizer)
    ):
        raise LuthierError(
            f"drift compares next tokens, but {old.name} and {new.name} have different vocabularies: "
            "set gate.max_drift: null"
        )
    items, source = drift_text(old.base, _Off(old), spec, checks, seed)
    if not items:
        return None

    def of(side: Side) -> Callable[[list[Item]], Any]:
        def run(group: list[Item]) -> Any:
            with side.here():
                return predict(side.base.model, side.base.kind, group)

        return run

    source = source.replace("the base", "the old model")
    with measured(old.base.model), measured(new.base.model):
        return between(
            of(old), of(new), items, widths[0], source=source,
            batch_size=spec.batch_size, resamples=spec.resamples, seed=seed,
        )  # fmt: skip


# -- lines


def _score(a: Answered, result: CheckResult, limits: GateSpec) -> Line:
    """A target's gain or a guard's loss, as a change of the metric for the better."""
    pairs = a.right()
    change = result.difference
    same = bool(np.array_equal(pairs[:, 0], pairs[:, 1]))
    if result.better == "lower":
        change = stats.Interval(-change.value, -change.high, -change.low)
    tolerance = limits.tolerances.get(a.check.name, limits.tolerance)
    target = a.check.kind == "target"
    return line(
        "gain" if target else "loss", a.check.name, result.unit, result.n, result.before.value, result.after.value,
        change, (limits.min_gain if target else 0.0) - tolerance, "least", rare=same and result.unit == "share",
    )  # fmt: skip


def _refusals(a: Answered, spec: AuditSpec, limits: GateSpec, seed: int) -> list[Line]:
    """Refused of what must be refused, and refused of what need not be."""
    if limits.max_refusal_loss is None:
        return []
    options = a.check.metric.options
    should = np.array(
        [must_refuse(i.record, options.get("expected"), options.get("phrases", ())) is not False for i in a.check.items]
    )
    right, out = a.right(), []
    for what, chosen, values, sign in (
        ("refused", should, right[should], -1),
        ("over-refused", ~should, 1 - right[~should], 1),
    ):
        if not chosen.any():
            continue
        same = bool(np.array_equal(values[:, 0], values[:, 1]))
        n = int(chosen.sum())
        change = (
            stats.nothing_seen(n)
            if same
            else stats.bootstrap(values[:, 1] - values[:, 0], resamples=spec.resamples, seed=seed, bounds=(-1.0, 1.0))
        )
        limit, bound = sign * limits.max_refusal_loss, "most" if sign > 0 else "least"
        old, new = (float(v) for v in values.mean(0))
        out.append(line(what, a.check.name, "share", n, old, new, change, limit, bound, rare=same))  # pyright: ignore
    return out


def _calibration(answered: Sequence[Answered], spec: AuditSpec, limits: GateSpec, seed: int) -> Calibration | None:
    """Over the items of all checks that have answers with a confidence: single checks are too small for ten bins."""
    if limits.max_calibration_loss is None:
        return None
    rows = [
        (x.confidence, p.value, y.confidence, q.value)
        for a in answered
        for x, p, y, q in zip(a.old, a.was, a.new, a.now, strict=True)
        if x.confidence is not None and y.confidence is not None
    ]
    return calibration(*zip(*rows, strict=True), resamples=spec.resamples, seed=seed) if rows else None


def flipped_of(a: Answered) -> list[dict[str, Any]]:
    """The items that were right and are wrong now, with both answers."""
    if a.check.metric.unit != "share":
        return []
    turned = stats.flips(a.right()[:, 0], a.right()[:, 1], threshold=1.0).negative
    return [
        {
            "check": a.check.name, "id": a.check.items[i].id, "prompt": a.check.items[i].prompt,
            "expected": a.check.items[i].expected, "old": a.old[i].text, "new": a.new[i].text, "reason": a.now[i].reason,
        }
        for i in turned
    ]  # fmt: skip


def _said(lines: Sequence[Line], limits: GateSpec) -> tuple[Literal["pass", "fail"], str]:
    counts = {v: [f"{x.what} ({x.check})" for x in lines if x.verdict == v] for v in ("fail", "underpowered")}
    parts = [f"broken: {', '.join(counts['fail'])}"] if counts["fail"] else []
    weak = counts["underpowered"]
    if weak:
        weight = "" if limits.underpowered == "fail" else ", which this plan lets pass"
        parts.append(f"too few items to tell{weight}: {', '.join(weak)}")
    bad = bool(counts["fail"] or (weak and limits.underpowered == "fail"))
    return ("fail" if bad else "pass"), "; ".join(parts) or f"all {len(lines)} limits are kept"
