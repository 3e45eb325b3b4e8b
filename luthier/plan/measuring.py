"""Plans for commands that only measure: they need an audit section, and nothing to train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from luthier.errors import LuthierError
from luthier.plan.load import override, read_plan
from luthier.plan.problems import first_problem
from luthier.plan.schema import GateSpec, MeasuringPlan, Plan
from luthier.plan.yaml import expand


def load_measuring(
    source: str | os.PathLike[str] | Mapping[str, Any] | Plan, overrides: Sequence[str] = ()
) -> MeasuringPlan:
    """The checked plan of a gate or a rebase; a plan to tune by serves as well, its data and delta are then at hand.

    source: a YAML file, its content as a dict, or a plan. overrides: 'gate.min_gain=0.1'. Errors: LuthierError naming
    the file and the key, and a plan whose audit section has neither target nor guards.
    """
    if isinstance(source, Plan):
        where, raw = "plan", source.model_dump(mode="json", by_alias=True)
        if source.gate is not None:  # what is stated must be measured, what is a default need not
            raw["gate"] = source.gate.model_dump(mode="json", by_alias=True, exclude_unset=True)
    else:
        where, raw = ("plan", dict(source)) if isinstance(source, Mapping) else read_plan(source)
    raw = expand(raw, "")
    for text in overrides:
        override(raw, text)
    try:
        plan = MeasuringPlan.model_validate(raw)
    except ValidationError as e:
        raise LuthierError(f"{where}: {first_problem(e, raw)}") from e
    if not (plan.audit.target or plan.audit.guards or plan.audit.shifted):
        raise LuthierError(f"{where}: audit: names nothing to measure: state audit.target and audit.guards")
    return plan


def limits(plan: Plan) -> GateSpec:
    """The plan's gate section, or its defaults."""
    return plan.gate or GateSpec()  # pyright: ignore[reportCallIssue]
