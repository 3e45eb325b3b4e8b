"""Weighted sums of the models themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError


@MERGES.add("linear")
@dataclass(frozen=True)
class Linear(Merge):
    """W = Σ wᵢ Wᵢ, divided by Σ wᵢ unless `normalize` is off. With equal weights the uniform soup.

    Source: Wortsman et al. 2022 (P080).
    """

    normalize: bool = True
    """Divide by the sum of the weights."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    paper: ClassVar[str] = "P080"

    def merge(self, t: Stack) -> Tensor:
        weights = t.each["weight"]
        total = sum(weights) if self.normalize else 1.0
        if total == 0:
            raise LuthierError(f"linear: the weights {weights} add up to 0 at {t.name}: change one, or set normalize: false")
        out = t.tensors[0] * (weights[0] / total)
        for weight, tensor in zip(weights[1:], t.tensors[1:], strict=True):
            out.add_(tensor, alpha=weight / total)
        return out
