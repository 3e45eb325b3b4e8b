"""One model's tensors as they are: what stacks of layers are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luthier.delta import MERGES, Merge, Stack


@MERGES.add("passthrough")
@dataclass(frozen=True)
class Passthrough(Merge):
    """W = scale · W₁. With slices in the plan, layers of several models are stacked upon each other."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    each: ClassVar[Mapping[str, float | None]] = {"scale": 1.0}
    pointwise: ClassVar[bool] = True

    def merge(self, t: Stack) -> Tensor:
        (scale,) = t.each["scale"]
        return t.tensors[0].clone() if scale == 1 else t.tensors[0] * scale
