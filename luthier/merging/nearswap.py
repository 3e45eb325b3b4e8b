"""Entries that are near the base's take the other model's value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from luthier.delta import MERGES, Merge, Stack


@MERGES.add("nearswap")
@dataclass(frozen=True)
class NearSwap(Merge):
    """W = (1 − s) W₀ + s W₁ with s = t / |W₀ − W₁| up to 1, entry by entry: no entry moves further than t.

    Source: alchemonaut, QuartetAnemoi-70B; mergekit.
    """

    t: float
    """How far entries may move."""

    models: ClassVar[tuple[int, int | None]] = (1, 1)
    each: ClassVar[Mapping[str, float | None]] = {}
    ordered: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.t >= 0:
            raise ValueError(f"t must be at least 0, got {self.t}")

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        (other,) = t.tensors
        share = (self.t / (t.base - other).abs_().clamp_(min=1e-6)).clamp_(min=0, max=1)
        return (share * other).add_((1 - share).mul_(t.base))
