"""Changes selected by their variance, weighted by their size, without those of the minority's sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.merging.engine import share
from luthier.parts.trims import spans, wide


@MERGES.add("sce")
@dataclass(frozen=True)
class SCE(Merge):
    """Select, calculate, erase: of entries the `select_topk` share that differs most between models; weights by tensor,
    each model's mean squared change; entries whose sign is not that of the sum count for nothing.

    Where the mean squares add up to less than 1e-6, all models weigh the same, as in mergekit.
    Source: Wan et al. 2024 (arXiv 2408.07990).
    """

    int8_mask: bool = False
    """Without effect, read for the field's files."""
    select_topk: float = 1.0
    """Share of the entries of non-zero variance, 0 to 1."""

    each: ClassVar[Mapping[str, float | None]] = {}

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        return "" if self.select_topk else "a select_topk of 0 leaves nothing of the models: state more than 0"

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        base, models = t.base.reshape(-1), [x.reshape(-1) for x in t.tensors]
        n, kind, dtype = base.numel(), wide(base.dtype), base.dtype
        keep = self._selected(t.name, base, models)

        def changes(a: int, b: int) -> Tensor:
            d = torch.stack([x[a:b] - base[a:b] for x in models])
            return d if keep is None else d.mul_(keep[a:b])

        squares = torch.zeros(len(models), dtype=torch.float64)
        for a, b in spans(n):
            squares += changes(a, b).square_().to(kind).sum(1).double()
        weights = (squares / max(1, n)).to(dtype)
        total = float(weights.sum())
        weights = torch.full_like(weights, 1 / len(models)) if abs(total) < 1e-6 else weights / total
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
        for a, b in spans(n):
            d = changes(a, b)
            major = d.sum(0).ge_(0).mul_(2).sub_(1)
            shares = weights[:, None] * (d.sign() == major)
            out[a:b] = base[a:b] + (d * shares).sum(0) / shares.sum(0).clamp(min=1e-6)
        return out.view(t.base.shape)

    def _selected(self, name: str, base: Tensor, models: list[Tensor]) -> Tensor | None:
        """1 for the entries [n] with the largest variance between models, else 0; None for all.

        Ties at the limit are left to torch.topk.
        """
        part = share(name, self.select_topk, "select_topk")
        if part == 1:
            return None
        variance = torch.cat(
            [
                torch.var(torch.stack([x[a:b] - base[a:b] for x in models]), dim=0, unbiased=False)
                for a, b in spans(len(base))
            ]
            or [base]
        )
        k = int(torch.count_nonzero(variance) * part)
        keep = torch.zeros_like(variance)
        if k:
            keep[torch.topk(variance.abs_(), k=k).indices] = 1
        return keep
