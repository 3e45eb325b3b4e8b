"""What a run is after: its objective, the rows that this takes, and the reference it looks back to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from luthier.attach.attached import Above, Attached
from luthier.delta import OBJECTIVES
from luthier.errors import LuthierError
from luthier.plan.schema import Plan

OBJECTIVE_OF = {("sft", "classify"): "classification"}
"""sft on a base of another kind means that base's own loss."""


def objective_of(plan: Plan, kind: str) -> Any:
    """The plan's objective with its settings; one that this kind of base has no rows for is refused."""
    name = OBJECTIVE_OF.get((plan.objective.name, kind), plan.objective.name)
    objective = OBJECTIVES.make(name, plan.objective.settings)
    if kind not in objective.kinds:
        raise LuthierError(
            f"objective '{name}' is for bases of kind {' or '.join(objective.kinds)}, this one is of kind {kind}: "
            "state another objective or base.kind"
        )
    return objective


def rows_of(objective: Any, kind: str) -> str:
    """What the data room makes of a record: what the base's kind takes, or pairs of answers."""
    return getattr(objective, "rows", kind)


def reference_of(objective: Any, handle: Attached, parents: Collection[str]) -> Callable[[], Any] | None:
    """Hides what trains, where the objective needs to see the base as the run met it."""
    return Above(handle, frozenset(parents)).off if "reference" in objective.needs else None
