"""Models of separate groups of data put together, with weights found by trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from luthier.delta import MERGES
from luthier.errors import LuthierError
from luthier.merging.engine import TaskVectors

MOST = 4096
"""Evaluations a grid may take."""


@MERGES.add("deme")
@dataclass(frozen=True)
class DeMe(TaskVectors):
    """Decouple, then merge: W = W₀ + Σ wₖ (Wₖ − W₀) over models each tuned on one group of the data, w from a grid.

    Every combination of the grid's values is evaluated, points ** N in all, and the best kept (the first of equals).
    The paper's groups are ranges of diffusion steps; here whatever records are split by. Our reading: fifths from 0.2 to 1;
    the weights in the authors' code lie from 0.1 to 0.5 for four models. Source: Ma et al. 2024 (P403).
    """

    lowest: float = 0.2
    """First value tried for every weight."""
    highest: float = 1.0
    """Last value tried."""
    points: int = 5
    """How many values are tried, at equal distances."""

    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0}
    pointwise: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    paper: ClassVar[str] = "P403"

    def __post_init__(self) -> None:
        if self.points < 1 or self.highest < self.lowest:
            raise ValueError(f"no grid from {self.lowest} to {self.highest} in {self.points} points")

    @property
    def grid(self) -> list[float]:
        """The values tried for every weight."""
        step = (self.highest - self.lowest) / max(1, self.points - 1)
        return [round(self.lowest + k * step, 9) for k in range(self.points)]

    def search(self, models: int, evaluate: Callable[[Mapping[str, list[float]]], float]) -> Mapping[str, list[float]]:
        if len(self.grid) ** models > MOST:
            raise LuthierError(
                f"deme: a grid of {len(self.grid)} values for {models} models has more than {MOST} points: fewer points"
            )
        rows = [{"weight": list(weights)} for weights in product(self.grid, repeat=models)]
        scores = [evaluate(row) for row in rows]
        return rows[scores.index(max(scores))]
