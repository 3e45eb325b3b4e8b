"""audit: what a finished delta gained on its target and what it cost elsewhere, measured again or by another plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from luthier.attach import Above, Attached
from luthier.attach.assembly import switch
from luthier.delta.artefact import Delta
from luthier.delta.folder import free_for_files
from luthier.delta.wiring import Wiring, is_assembly
from luthier.errors import LuthierError
from luthier.measuring.audit import audit as measure
from luthier.measuring.items import Switch
from luthier.measuring.report import write_report
from luthier.measuring.sources import known
from luthier.plan import Plan
from luthier.plan.measuring import load_measuring
from luthier.verbs.load import load_all

P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Audited:
    """What was found, and where its report lies."""

    out: Path
    report: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What was gained and lost, in one line."""
        return str(self.report["audit"]["verdict"]["line"])


def audit(
    delta: str | os.PathLike[str],
    plan: Plan | dict[str, Any] | str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Audited:
    """Measures a delta folder on the base it was made on, or an assembly's on its large model; writes report.json and
    report.html.

    plan: whose base, data and audit sections count (data and delta may be left out); default the one in the delta's
    lineage. out: default DELTA/audit.
    The delta's own plan came with the delta, perhaps from someone else: it can neither have the code of a model's
    repository run nor name code to import; a plan or an override that you state can.
    Errors: a delta without a plan, a plan without anything to measure, and whatever `load` refuses.
    """
    folder = Path(delta)
    found = Wiring.load(folder) if is_assembly(folder) else Delta.load(folder)
    stated = plan if plan is not None else found.lineage.get("plan")
    if not stated:
        raise LuthierError(
            f"{folder} holds no plan (it was not tuned here): give one by --plan that says what to measure"
        )
    read = load_measuring(stated, overrides)
    if plan is None:
        read = distrusted(read, folder, overrides)
    named = plan if isinstance(plan, (str, os.PathLike)) else "plan"
    known(read.audit, f"the plan inside {folder}" if plan is None else named)
    spec = read.audit.model_copy(update={"enabled": True})
    place = free_for_files(Path(out) if out is not None else folder / "audit")
    if (place / "delta.json").exists():
        raise LuthierError(f"{place} holds a delta, whose own report would be lost: choose another --out")
    base_spec = (
        read.base
        if plan is not None
        else read.base.model_copy(update={"name": found.base.get("name") or read.base.name})
    )
    model, base = load_all(folder) if is_assembly(folder) else load_all(base_spec, [folder])
    result = measure(base, _switch(model), spec, data=read.data, seed=read.train.seed, progress=progress)
    report = {
        "plan": read.model_dump(mode="json", by_alias=True),
        "base": {"name": found.base.get("name"), "fingerprint": found.base.get("fingerprint")},
        "audit": result.to_dict(),
        "warnings": [],
    }
    write_report(place, report)
    return Audited(place, report)


def _switch(model: Any) -> Switch:
    """Hides the delta and leaves on what it was trained on top of, as its own run measured it."""
    found = switch(model)
    if not isinstance(found, Attached):
        return found
    return Above(found, frozenset(name for name in found.pieces if name.startswith("parent")))


def distrusted(read: P, folder: Path, overrides: Sequence[str]) -> P:
    """The plan of a delta folder without its power to run code; what the overrides changed in it is the user's own."""
    trusts = read.base.trust_remote_code and any(o.startswith("base") and "trust_remote_code" in o for o in overrides)
    for group in ("target", "guards", "shifted"):
        stated = " ".join(o.partition("=")[2] for o in overrides if o.startswith(f"audit.{group}"))
        for check in getattr(read.audit, group):
            if ":" in check.metric and check.metric not in stated:
                raise LuthierError(
                    f"{folder}: the plan inside the delta has code of its own run (audit.{group}: the metric "
                    f"{check.metric}): give a plan that you trust by --plan, or state that metric as an override"
                )
    base = read.base.model_copy(update={"trust_remote_code": trusts})
    return read.model_copy(update={"base": base, "train": read.train.model_copy(update={"callbacks": []})})
