"""The audit: the base and the tuned model on the same items, and what the difference is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.attach.attached import HANDLE
from luthier.errors import LuthierError
from luthier.measuring import forward, words
from luthier.measuring.checks import CheckResult, compare
from luthier.measuring.cost import Watch
from luthier.measuring.drift import Drift, drift, own_text, starts
from luthier.measuring.items import Item, Response, Switch
from luthier.measuring.remembered import cache_folder, remembered
from luthier.measuring.sources import Prepared, prepare_checks
from luthier.plan.schema import AuditSpec, DataSpec

_DRIFT_PROMPTS = 64
_OPENING = 8  # tokens of a guard's text from which the base writes on


@dataclass(frozen=True)
class Audit:
    """What was found; `seconds` is what the measuring itself took, `verdict` the finding in plain words."""

    target: list[CheckResult] = field(default_factory=list)
    guards: list[CheckResult] = field(default_factory=list)
    shifted: list[CheckResult] = field(default_factory=list)
    drift: Drift | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For report.json; see docs/report.md."""
        groups = {k: [c.to_dict() for c in getattr(self, k)] for k in ("target", "guards", "shifted")}
        table = {**groups, "drift": self.drift.to_dict() if self.drift else None, "seconds": self.seconds}
        return table | {"verdict": words.verdict(table)}


def audit(
    base: Any,
    switch: Switch,
    spec: AuditSpec,
    *,
    data: DataSpec | None = None,
    seed: int = 0,
    cache: Path | None | bool = True,
    progress: Callable[[str], None] = lambda _: None,
    checks: Sequence[Prepared] | None = None,
) -> Audit:
    """Measure a base with its deltas off and on.

    `base` has `.model`, `.tokenizer`, `.kind` and `.fingerprint`; `switch.off()` hides the deltas. `data` is the run's
    data section: prompts are rendered as they were for training. The base's responses are kept in `cache` (default:
    $LUTHIER_CACHE, where that is set; False for never), where its fingerprint says all of it. `progress` is told what is
    being done. `checks`: what `prepare_checks` gave for the same spec, data and seed, where it was asked before.
    """
    if not spec.enabled:
        return Audit()
    watch = Watch()
    checks = prepare_checks(base, spec, data, seed) if checks is None else checks
    folder = cache_folder() if cache is True else cache or None
    before: list[tuple[list[Response], bool, float]] = []
    with switch.off():
        for check in checks:
            progress(f"{check.name}: base")
            before.append(_base_side(base, check, spec, folder))
    results: dict[str, list[CheckResult]] = {"target": [], "guard": [], "shifted": []}
    for check, (was, cached, spent) in zip(checks, before, strict=True):
        progress(f"{check.name}: tuned")
        with Watch() as w:
            now = respond(base, check, spec.batch_size)
            found = compare(
                check.name, check.kind, check.metric, check.items, was, now,
                resamples=spec.resamples, samples=spec.samples, seed=seed,
            )  # fmt: skip
        results[check.kind].append(replace(found, seconds=w.seconds + spent, cached=cached, dropped=check.dropped))
    moved = None
    if spec.drift_tokens:
        progress("drift")
        moved = _drift(base, switch, spec, checks, seed)
    return Audit(results["target"], results["guard"], results["shifted"], moved, watch.read())


def respond(base: Any, check: Prepared, batch_size: int) -> list[Response]:
    """The model as it is now, on the items of a check."""
    if check.metric.needs == "answer":
        return forward.answers(base.model, base.tokenizer, check.items, check.max_new_tokens, batch_size)
    if check.metric.needs == "label":
        return forward.classes(base.model, check.items, batch_size)
    return forward.losses(base.model, base.kind, check.items, batch_size)


def _base_side(base: Any, check: Prepared, spec: AuditSpec, folder: Path | None) -> tuple[list[Response], bool, float]:
    asked = {
        "needs": check.metric.needs, "kind": base.kind, "dtype": str(getattr(base.model, "dtype", "")),
        "device": base.model.device.type, "max_new_tokens": check.max_new_tokens, "batch_size": spec.batch_size,
    }  # fmt: skip
    mark = str(base.fingerprint or "") if _bare(base) else ""
    with Watch() as watch:
        made, cached = remembered(folder, mark, asked, check.items, lambda: respond(base, check, spec.batch_size))
    return made, cached, watch.seconds


def _bare(base: Any) -> bool:
    """Whether the fingerprint says all of a base with its deltas off: no piece stays on, and no row of a new token and no
    part that the checkpoint lacks is drawn."""
    handle = base.model.__dict__.get(HANDLE)
    drawn = [getattr(base, name, ()) for name in ("new_rows", "new_parameters", "fresh")]
    return not any(drawn) and not (handle is not None and handle.kept)


def _drift(base: Any, switch: Switch, spec: AuditSpec, checks: Sequence[Prepared], seed: int) -> Drift | None:
    items, source = drift_text(base, switch, spec, checks, seed)
    if not items:
        return None
    return drift(
        base.model, switch, items, kind=base.kind, source=source,
        batch_size=spec.batch_size, resamples=spec.resamples, seed=seed,
    )  # fmt: skip


def drift_text(
    base: Any, switch: Switch, spec: AuditSpec, checks: Sequence[Prepared], seed: int
) -> tuple[list[Item], str]:
    """What drift is measured on, and its name: text that the base writes now, or for a classifier what it is asked."""
    guards = [c for c in checks if c.kind == "guard"]
    prompts = _spread([i.source or i.ids[:_OPENING] for c in guards for i in c.items])
    if base.kind == "classify":
        texts = prompts or _spread([i.source for c in checks for i in c.items])
        return [Item(str(n), "", source=p) for n, p in enumerate(texts)], "classes"
    if base.kind == "seq2seq" and not prompts:
        prompts = _spread([i.source for c in checks for i in c.items if i.source])
    begin = starts(base.tokenizer, prompts)
    if not begin:
        raise LuthierError("drift has nothing to start from: name a guard, or set audit.drift_tokens: 0")
    told = (
        "the base's own writing, begun as the guards' records begin" if prompts else "the base's own text from nothing"
    )
    options: dict[str, Any] = {"kind": base.kind, "batch_size": spec.batch_size}
    return own_text(base.model, base.tokenizer, switch, begin, spec.drift_tokens, seed=seed, **options), told


def _spread(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """At most 64, evenly over all, so that every guard has its share."""
    if len(prompts) <= _DRIFT_PROMPTS:
        return list(prompts)
    return [prompts[i * len(prompts) // _DRIFT_PROMPTS] for i in range(_DRIFT_PROMPTS)]
