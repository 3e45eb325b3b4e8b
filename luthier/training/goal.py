"""What a run is after: its objective, the rows that this takes, and the reference it looks back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from luthier.attach.edits import assign
from luthier.attach.weights import gathered
from luthier.delta import OBJECTIVES
from luthier.errors import LuthierError
from luthier.plan.schema import Plan
from luthier.training.machine import reshard
from luthier.training.pieces import Pieces

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


class Began:
    """The model as a run met it: earlier deltas on, what trains off, or, where that goes on from an earlier delta, at the
    numbers it began with. To be made before anything moves."""

    def __init__(self, pieces: Pieces) -> None:
        self.handle, started = pieces.handle, pieces.started
        self.kept = pieces.parents | started
        numbers = [(q.state.p, k) for n in started for q in self.handle.placed.get(n, ()) for k in q.state.p]
        self.edits = [e for n in started for e in self.handle.edits.get(n, {}).values()]
        self.first = [(table, k, gathered(table[k].detach()).clone()) for table, k in numbers]
        self.first_edits = [gathered(e.parameter.detach()).clone() for e in self.edits]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model is that; afterwards all is as it was."""
        places = [(table[k], first) for table, k, first in self.first]  # a wrapper may have replaced the objects
        places += [(e.parameter, first) for e, first in zip(self.edits, self.first_edits, strict=True)]
        reshard(self.handle.model)
        with self.handle.off(keep=self.kept), torch.no_grad():
            held = [gathered(place.detach()).clone() for place, _ in places]
            for place, first in places:
                assign(place, first)
            torch.clear_autocast_cache()
            try:
                yield
            finally:
                reshard(self.handle.model)
                for (place, _), value in zip(places, held, strict=True):
                    assign(place, value)


def reference_of(objective: Any, pieces: Pieces) -> Callable[[], Any] | None:
    """Puts the model back to what the run met, where the objective needs to see that."""
    return Began(pieces).off if "reference" in objective.needs else None
