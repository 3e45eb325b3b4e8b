"""Sums of changes that are averaged only where several models changed the same entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.parts.trims import spans


@MERGES.add("ram")
@dataclass(frozen=True)
class RAM(Merge):
    """Entries that one model alone changed by more than `epsilon` keep its change; those of several get their mean.

    Source: reinforced agent merging (arXiv 2601.13572).
    """

    epsilon: float = 1e-5

    each: ClassVar[Mapping[str, float | None]] = {}
    pointwise: ClassVar[bool] = True

    def merge(self, t: Stack) -> Tensor:
        return _joined(t, self.epsilon, None)


@MERGES.add("ramplus_tl")
@dataclass(frozen=True)
class RAMPlus(Merge):
    """RAM whose unshared entries are enlarged by 1 + r · min(ρ, α), ρ the model's shared by its unshared entries here.

    RAM+ looks at the whole model; this is its tensor-local form. Source: reinforced agent merging (arXiv 2601.13572).
    """

    r: float = 0.1
    alpha: float = 0.2
    epsilon: float = 1e-5

    each: ClassVar[Mapping[str, float | None]] = {}
    widens: ClassVar[bool] = True

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        base, models = t.base.reshape(-1), [x.reshape(-1) for x in t.tensors]
        shared = torch.zeros(len(models), dtype=torch.int64)
        alone = shared.clone()
        for a, b in spans(base.numel()):
            moved = torch.stack([(x[a:b] - base[a:b]).abs_() > self.epsilon for x in models])
            count = moved.sum(0)
            shared += (moved & (count > 1)).sum(1)
            alone += (moved & (count == 1)).sum(1)
        factors = 1 + self.r * (shared / alone.clamp(min=self.epsilon)).clamp(min=0, max=self.alpha)
        return _joined(t, self.epsilon, factors[:, None])


def _joined(t: Stack, epsilon: float, factors: Tensor | None) -> Tensor:
    """Base + changes: unshared entries by their model's factor [N, 1], shared ones divided by their number."""
    assert t.base is not None
    base, models = t.base.reshape(-1), [x.reshape(-1) for x in t.tensors]
    pieces = [base[:0]]
    for a, b in spans(base.numel()):
        d = torch.stack([x[a:b] - base[a:b] for x in models])
        moved = d.abs() > epsilon
        count = moved.sum(0)
        d.mul_(moved)
        alone = d * (count == 1) if factors is None else d * (count == 1) * factors
        pieces.append(base[a:b] + (alone + d.mul_(count > 1) / count.clamp(min=1)).sum(0))
    return torch.cat(pieces[1:] or pieces).view(t.base.shape)
