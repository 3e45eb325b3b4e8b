"""rebase: a delta onto an upgraded base: ported, repaired the cheap ways, measured, and one of them chosen by rule."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.algebra.rescale import by_depth, rescaled
from luthier.bridge.proof import prove
from luthier.bridge.target import Target
from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError
from luthier.measuring.cost import Watch
from luthier.measuring.gate import asked_of, flipped_of
from luthier.measuring.rebase import RULE, Replies, Way, ask, choose, one_unit, paired, weigh
from luthier.measuring.report import plain
from luthier.measuring.sources import Prepared
from luthier.plan.measuring import limits, load_measuring
from luthier.plan.schema import MeasuringPlan, Plan, RebaseSpec
from luthier.training.certificate import versions
from luthier.verbs.audit import distrusted
from luthier.verbs.port import port
from luthier.verbs.sides import Side, Sides, is_delta

FILE, PAGE = "rebase.json", "rebase.md"


@dataclass(frozen=True)
class Rebased:
    """What was tried and what is shipped. `delta` is None where every way breaks a guard; `report` is rebase.json."""

    delta: Delta | None
    out: Path
    report: dict[str, Any]

    @property
    def shipped(self) -> str | None:
        """Name of the way that was chosen."""
        return self.report["shipped"]


def rebase(
    delta: str | os.PathLike[str],
    onto: str | os.PathLike[str],
    plan: Plan | dict[str, Any] | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Rebased:
    """Puts a delta on another base of the same make, and chooses how by measuring.

    delta: a delta folder made on a base that is still at hand. onto: name or folder of the new base. plan: its audit says
    what is measured, its gate what a guard may lose, its rebase what is tried, its data (if any) what a few steps of
    tuning read; default the plan in the delta's lineage. out: folder for the shipped delta with rebase.json and
    rebase.md; where every way breaks a guard those two files alone.
    Errors: whatever port and load refuse, a plan without a target, an `out` that is not empty.
    """
    folder, place = Path(delta), Path(out)
    own = Delta.load(folder)
    read = _plan(plan, own, folder, overrides)
    if is_delta(Path(onto)):
        raise LuthierError(
            f"{onto} is a delta: name the base to go onto, or export the model it makes (luthier export)"
        )
    refuse_existing(place, [folder, onto])
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        return _Rebase(own, folder, os.fspath(onto), read, place, work, progress).run()
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass
class _Rebase:
    """One rebase: what it was given, and what it holds on the way."""

    delta: Delta
    folder: Path
    onto: str
    plan: MeasuringPlan
    out: Path
    work: Path
    progress: Callable[[str], None]

    def run(self) -> Rebased:
        watch = Watch()
        plan, spec = self.plan, self.plan.rebase or RebaseSpec()  # pyright: ignore[reportCallIssue]
        sides = Sides(plan)
        old = sides.open(str(self.folder), on=self.delta.base.get("name"))
        bare = sides.open(self.onto)
        checks = asked_of(old, bare, plan.audit, plan.data, plan.train.seed)
        self.here = [check for _, check in checks]
        one_unit(self.here)
        with Watch() as made:
            ported = self._ported(spec, old.base, bare.base)
        before = ask(old, [check for check, _ in checks], plan.audit, self.progress)
        base = ask(bare, self.here, plan.audit, self.progress)
        ways, replies, deltas, skipped = [], [], [], {}
        for name, how, make in self._ways(ported, spec, bare.base):
            try:
                with Watch() as took:
                    candidate = make()
            except LuthierError as e:
                skipped[name] = str(e)
                continue
            found = ask(Side(name, bare.base, [candidate]), self.here, plan.audit, self.progress)
            cost = made.seconds + took.seconds
            ways.append(self._weigh(name, how, base, before, found, cost))
            replies.append(found)
            deltas.append(candidate)
        at, why = choose(ways, replies, self.here, plan.audit, plan.train.seed)
        report = self._report(old, bare, before, base, ways, replies, at, why, skipped)
        report["seconds"] = watch.read()
        return self._write(report, None if at is None else deltas[at], bare.base)

    def _ported(self, spec: RebaseSpec, old: Target, new: Target) -> Delta:
        self.progress(f"port: {spec.move}")
        return port(self.delta, onto=new, base=old, method=spec.move, connectivity=False).delta

    def _ways(
        self, ported: Delta, spec: RebaseSpec, new: Target
    ) -> Iterator[tuple[str, str, Callable[[], Delta]]]:  # fmt: skip
        """(name, what it is, how it is made), cheapest first."""
        layers = 1 + max((part.layer for part in new.roles.parts if part.layer is not None), default=0)
        yield "ported", f"{spec.move}, as it is", lambda: ported
        for factor in spec.factors:
            yield (
                f"scaled {factor:g}",
                f"the whole change times {factor:g}",
                lambda f=factor: rescaled(ported, lambda _: f),
            )
        for first in spec.lines:
            how = f"LiNeS: the change times {first:g} at the first layer, rising to 1 at the last"
            yield f"lines {first:g}", how, lambda f=first: rescaled(ported, by_depth(f, layers))
        if spec.steps:
            yield (
                f"tuned {spec.steps}",
                f"{spec.steps} steps on the plan's data from the ported delta",
                (lambda: self._tuned(ported, spec.steps)),
            )

    def _tuned(self, ported: Delta, steps: int) -> Delta:
        """The plan's own deltas, going on from the ported one on the new base."""
        from luthier.verbs.tune import tune

        if self.plan.data is None or not self.plan.delta:
            raise LuthierError("the plan gives no data to tune on: state data and delta")
        start = self.work / "ported"
        ported.save(start)
        raw = self.plan.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"gate", "rebase", "push_to"})
        raw["base"] = {**raw["base"], "name": self.onto, "deltas": []}
        raw["delta"] = [{**d, "start_from": str(start)} for d in raw["delta"]]
        raw["train"] = {**raw["train"], "steps": steps, "report_to": [], "callbacks": []}
        raw["checkpoint"], raw["audit"] = {"every": 0}, {"enabled": False}
        self.progress(f"tuning {steps} steps")
        return tune(raw, out=self.work / "tuned", progress=False).delta

    def _weigh(self, name: str, how: str, base: Replies, old: Replies, new: Replies, made: float) -> Way:
        plan = self.plan
        return weigh(name, how, self.here, base, old, new, made, plan.audit, limits(plan), plan.train.seed)

    def _report(
        self, old: Side, bare: Side, before: Replies, base: Replies, ways: list[Way], replies: list[Replies],
        at: int | None, why: str, skipped: dict[str, str],
    ) -> dict[str, Any]:  # fmt: skip
        sides = [self._weigh("old base with the delta", "", base, before, before, 0.0),
                 self._weigh("new base alone", "", base, before, base, 0.0)]  # fmt: skip
        shown = 0 if at is None else at
        lost = [line.check for line in sides[1].guards if line.verdict == "fail"]
        if at is None and lost:
            why += f"; the new base alone does so too ({', '.join(dict.fromkeys(lost))}), which no repair of the delta mends"
        return {
            "shipped": None if at is None else ways[at].name,
            "why": why,
            "rule": RULE,
            "old": old.card(),
            "new": bare.card(),
            "before": [side.to_dict() for side in sides],
            "ways": [way.to_dict() for way in ways],
            "not_tried": skipped,
            "flipped": _flips(self.here, before, replies[shown]) if replies else [],
            "limits": limits(self.plan).model_dump(mode="json"),
            "plan": self.plan.model_dump(mode="json", by_alias=True),
            "versions": versions(),
        }

    def _write(self, report: dict[str, Any], chosen: Delta | None, new: Target) -> Rebased:
        report = plain(report)
        files = {
            FILE: (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode(),
            PAGE: page(report).encode(),
        }
        if chosen is None:
            ready = self.work / "report"
            ready.mkdir()
            for name, content in files.items():
                (ready / name).write_bytes(content)
            if self.out.exists():
                self.out.rmdir()  # empty, as was checked; os.replace wants it away on some systems
            os.replace(ready, self.out)
            return Rebased(None, self.out, report)
        shipped = Delta(chosen.pieces, {}, dict(chosen.lineage))
        shipped.base = {k: v for k, v in chosen.base.items() if k in ("kind", "labels", "seed") and v}
        shipped.lineage |= {"parents": [str(self.folder)], "made_by": f"rebase: {report['shipped']}"}
        shipped.audit = {"verdict": {"status": "rebased", "line": report["why"]}}
        shipped.files = {**chosen.files, **files}
        template = {k: chosen.base[k] for k in ("template",) if k in chosen.base}
        prove(shipped, dataclasses.replace(new), full=True)
        shipped.base |= template
        shipped.save(self.out)
        return Rebased(shipped, self.out, report)


def _plan(stated: Any, delta: Delta, folder: Path, overrides: Sequence[str]) -> MeasuringPlan:
    source = stated if stated is not None else delta.lineage.get("plan")
    if not source:
        raise LuthierError(
            f"{folder} holds no plan (it was not tuned here): give one by --plan that says what to measure"
        )
    read = load_measuring(source, overrides)
    if stated is None:
        read = distrusted(read, folder, overrides)
    if not read.audit.target:
        raise LuthierError("the plan's audit names no target: state audit.target, which the ways are compared by")
    return read


def _flips(checks: Sequence[Prepared], old: Replies, new: Replies) -> list[dict[str, Any]]:
    """Items that were right on the old base with the delta and are wrong this way."""
    return [row for answered in paired(checks, old, new) for row in flipped_of(answered)]


def page(report: dict[str, Any]) -> str:
    """rebase.md: the table, what is shipped and why, and the flips."""
    head = "| way | target | over the new base | worst guard | flips | seconds |\n|---|---|---|---|---|---|"
    lines = [
        f"# Rebase of {report['old']['name']} onto {report['new']['name']}",
        "",
        f"**{_decision(report)}**",
        "",
        head,
    ]
    lines += ["| " + " | ".join(row) + " |" for row in table(report)]
    lines += ["", report["rule"], ""]
    lines += [f"Not tried: {name} ({why})" for name, why in report["not_tried"].items()]
    lines += ["", f"Right on the old base with the delta and wrong now: {len(report['flipped'])} items.", ""]
    lines += [f"* {f['check']}, {f['id']}: {_short(f['old'])} → {_short(f['new'])}" for f in report["flipped"]]
    return "\n".join(lines) + "\n"


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: way, target, gain over the new base, worst guard, flips, seconds."""
    return [_row(way, way["name"] == report["shipped"]) for way in (*report["before"], *report["ways"])]


def _row(way: dict[str, Any], shipped: bool) -> tuple[str, ...]:
    worst = min(way["guards"], key=lambda line: line["change"]["value"], default=None)
    told = (
        "–" if worst is None else f"{worst['check']} {worst['change']['value']:+.3f}" + ("" if way["within"] else " ✗")
    )
    name = f"{way['name']} ← shipped" if shipped else way["name"]
    flips = str(way["flips"])
    return name, _range(way["target"]), _range(way["over_base"], "+"), told, flips, f"{way['seconds']:.1f}"


def _range(x: dict[str, Any], sign: str = "") -> str:
    value, low, high = ("?" if v is None else format(v, f"{sign}.3f") for v in (x["value"], x["low"], x["high"]))
    return f"{value} [{low}, {high}]"


def _decision(report: dict[str, Any]) -> str:
    return f"{'Ship ' + report['shipped'] if report['shipped'] else 'Ship nothing'}: {report['why']}."


def _short(text: str | None) -> str:
    shown = " ".join((text or "").split())
    return repr(shown if len(shown) <= 60 else shown[:57] + "…")
