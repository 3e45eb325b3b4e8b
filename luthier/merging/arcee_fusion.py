"""The most important changes only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack

SAMPLE = 1_000_000


@MERGES.add("arcee_fusion")
@dataclass(frozen=True)
class ArceeFusion(Merge):
    """Entries move to the other model's value where |ΔW| · KL(softmax W₁ ‖ softmax W₀ of their row) is an outlier.

    The limit is the median plus 1.5 interquartile ranges, taken of a drawn million where there are more entries.
    Source: Arcee Fusion, mergekit.
    """

    models: ClassVar[tuple[int, int | None]] = (1, 1)
    each: ClassVar[Mapping[str, float | None]] = {}
    ordered: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    widens: ClassVar[bool] = True

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        if not t.base.numel():
            return t.base.clone()
        weights = importance(t.tensors[0], t.base)
        mask = (weights >= limit(weights, t.generator)).float()
        return t.base + (t.tensors[0] - t.base) * mask


def limit(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The importance from which an entry is an outlier, a scalar; of a drawn sample where there are more than `SAMPLE`."""
    seen = weights.reshape(-1)
    if seen.numel() > SAMPLE:
        seen = seen[torch.randint(seen.numel(), (SAMPLE,), generator=generator)]
    at = (torch.tensor([0.25, 0.5, 0.75]) * (seen.numel() - 1)).long()
    low, middle, high = torch.sort(seen).values[at]
    return middle + 1.5 * (high - low)


def importance(tuned: Tensor, base: Tensor) -> Tensor:
    """|tuned − base| · KL(softmax tuned ‖ softmax base) over the last axis."""
    p, q = (torch.softmax(x, dim=-1).add_(1e-8) for x in (tuned, base))
    divergence = p.mul_(torch.log(p / q)).sum(dim=-1, keepdim=True)
    return (tuned - base).abs_().mul_(divergence)
