"""Weighted sums of the models themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.merging.engine import weighted_sum


@MERGES.add("linear")
@dataclass(frozen=True)
class Linear(Merge):
    """W = Σ wᵢ Wᵢ, divided by Σ wᵢ unless `normalize` is off, summed in float32 (float64 stays).

    With equal weights the uniform soup (Wortsman et al. 2022, P080), and the average of nodes that never spoke to each
    other (lo-fi, P412).
    """

    normalize: bool = True
    """Divide by the sum of the weights."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    pointwise: ClassVar[bool] = True
    paper: ClassVar[str] = "P080"

    def merge(self, t: Stack) -> Tensor:
        return weighted_sum(t, self.normalize)
