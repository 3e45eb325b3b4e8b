"""What is wrong with a chain's stages whatever the earlier ones write, told before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.algebra.jobs import Method
from luthier.delta import COMPRESSIONS, MOVES
from luthier.errors import LuthierError, nearest
from luthier.plan.compressing import load_compressing
from luthier.plan.measuring import load_measuring
from luthier.plan.merge import load_merge
from luthier.plan.moving import AssembleSpec, PortSpec, load_moving
from luthier.plan.stages import Stage, resolved
from luthier.verbs.edit import understood


def foresee(stages: Sequence[Stage]) -> None:
    """Raises LuthierError that names the stage: unknown keys, methods and settings, values that none can have."""
    folders = {stage.name: Path(stage.name) for stage in stages}
    for stage in stages:
        try:
            CHECKS.get(stage.verb, lambda _: None)(resolved(stage.settings, folders))
        except LuthierError as e:
            raise LuthierError(f"stage '{stage.name}': {e}") from e


def _merge(settings: Mapping[str, Any]) -> None:
    plan = load_merge(settings)
    Method(plan.method).foresee(plan)


def _compress(settings: Mapping[str, Any]) -> None:
    plan = load_compressing(settings)
    COMPRESSIONS.make(plan.method, plan.settings)


def _edit(settings: Mapping[str, Any]) -> None:
    understood(settings)


def _move(model: type[PortSpec] | type[AssembleSpec], settings: Mapping[str, Any]) -> None:
    plan = load_moving(model, settings)
    MOVES.make(plan.method, plan.settings)


def _diff(settings: Mapping[str, Any]) -> None:
    from luthier.verbs.diff import diff

    known = [name for name in inspect.signature(diff).parameters if name != "out"]
    for key in settings:
        if key not in known:
            raise LuthierError(f"diff: unknown key '{key}': {nearest(key, known, 'key')}")
    if missing := [key for key in known[:2] if key not in settings]:
        raise LuthierError(f"diff: states no {missing[0]}: write diff: {{base: …, tuned: '@name of a stage'}}")


def _audit(settings: Mapping[str, Any]) -> None:
    if not isinstance(settings.get("delta"), str):
        raise LuthierError("audit: states no delta: write delta: '@name of a stage'")
    load_measuring({"audit": {k: v for k, v in settings.items() if k not in ("delta", "plan")}})


CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "merge": _merge,
    "compress": _compress,
    "edit": _edit,
    "port": lambda settings: _move(PortSpec, settings),
    "assemble": lambda settings: _move(AssembleSpec, settings),
    "diff": _diff,
    "audit": _audit,
}
