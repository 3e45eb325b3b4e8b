"""gate: whether a new model may replace an old one, line by line, each with what its items can tell."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.delta.folder import free_for_files
from luthier.delta.wiring import is_assembly
from luthier.errors import LuthierError
from luthier.measuring.cost import Watch
from luthier.measuring.gate import POWER
from luthier.measuring.gate import gate as measure
from luthier.measuring.gate_page import write_gate
from luthier.measuring.sources import known
from luthier.plan.measuring import limits, load_measuring
from luthier.plan.schema import Plan
from luthier.training.certificate import versions
from luthier.verbs.sides import Sides, is_delta


@dataclass(frozen=True)
class Gated:
    """The verdict, and where its report lies. `report` is what gate.json holds; docs/gate.md says what that is."""

    out: Path
    report: dict[str, Any]

    @property
    def verdict(self) -> str:
        """pass or fail."""
        return str(self.report["verdict"])

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


def gate(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    plan: Plan | dict[str, Any] | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Gated:
    """Measures two models by a plan's audit and holds the new one to the plan's gate section.

    old, new: 'base' for the plan's base as it is, a delta, PEFT or assembly folder, a base's name, or a checkpoint folder.
    plan: its audit says what is asked, its gate what is allowed; it may leave out data and delta. out: folder for gate.json
    and gate.html; default NEW/gate for a delta or an assembly, else ./gate. A base that both sides stand on is held once.
    Errors: a plan that names nothing to measure, and whatever loading refuses.
    """
    read = load_measuring(plan, overrides)
    if not read.audit.enabled:
        raise LuthierError("the plan's audit is switched off: state audit.enabled: true, or leave it out")
    known(read.audit, plan if isinstance(plan, str | os.PathLike) else "plan")
    inside = is_delta(Path(new)) or is_assembly(Path(new))
    place = Path(out) if out is not None else Path(new) / "gate" if inside else Path("gate")
    free_for_files(place)
    watch = Watch()
    sides = Sides(read)
    before, after = (sides.open(os.fspath(name)) for name in (old, new))
    allowed = limits(read)
    found = measure(before, after, read.audit, allowed, data=read.data, seed=read.train.seed, progress=progress)
    table = found.to_dict()
    report = {
        "verdict": table.pop("verdict"),
        "why": table.pop("why"),
        "old": before.card(),
        "new": after.card(),
        "limits": allowed.model_dump(mode="json"),
        "level": 0.95,
        "power": POWER,
        **table,
        "plan": read.model_dump(mode="json", by_alias=True),
        "versions": versions(),
        "seconds": watch.read(),
    }
    write_gate(place, report)
    return Gated(place, report)
