"""The point near the centre of fine-tuned weights that the angles between a few of them show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.parts.trims import spans, wide


@MERGES.add("model_stock")
@dataclass(frozen=True)
class ModelStock(Merge):
    """W = t W̄ + (1 − t) W₀ with t = N cos θ / (1 + (N − 1) cos θ), cos θ the mean cosine between two models' changes.

    Equal models give t = 1, orthogonal changes t = 0, and so does no change. Where 1 + (N − 1) cos θ is 0, the base
    stays. t is noted for the report. Differs from mergekit, which divides by 1e-6 where the product of two changes' norms
    is less: here small changes have the cosine that they have. In float16, as there, products of changes below about 2e-4
    are lost: `dtype: float32` keeps them. Source: Jang et al. 2024 (P017).
    """

    filter_wise: bool = False
    """An angle for every row (of the last axis) instead of one a tensor."""

    models: ClassVar[tuple[int, int | None]] = (2, None)
    each: ClassVar[Mapping[str, float | None]] = {}
    paper: ClassVar[str] = "P017"

    def ratio(self, t: Stack) -> Tensor:
        """t as [..., 1] by rows, or [1]."""
        base, models = self._flat(t)
        n, rows, kind = len(models), base.shape[:-1], wide(base.dtype)
        squares, products = torch.zeros(n, *rows, dtype=kind), torch.zeros(n, n, *rows, dtype=kind)
        for cut in _cuts(base):
            changes = [x[cut] - base[cut] for x in models]
            where = cut if base.dim() > 1 else ...
            for i, d in enumerate(changes):
                squares[i][where] += d.to(kind).square().sum(-1)
                for j in range(i + 1, n):
                    products[i, j][where] += (d * changes[j]).sum(-1, dtype=kind)
        norms, pairs = squares.sqrt(), [(i, j) for i in range(n) for j in range(i + 1, n)]
        cosines = [_cosine(products[i, j], norms[i], norms[j], base.dtype) for i, j in pairs]
        cosine = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
        below = 1 + (n - 1) * cosine
        singular = below.abs() < 1e-6
        return torch.where(singular, 0, (n * cosine) / torch.where(singular, 1, below))

    def _flat(self, t: Stack) -> tuple[Tensor, list[Tensor]]:
        assert t.base is not None
        if self.filter_wise and t.base.dim() > 1:
            return t.base, t.tensors
        return t.base.reshape(-1), [x.reshape(-1) for x in t.tensors]

    def merge(self, t: Stack) -> Tensor:
        base, models = self._flat(t)
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
        if not base.numel():
            return out.view(t.tensors[0].shape)
        ratio = self.ratio(t)
        t.notes["t"] = float(ratio.double().mean())
        for cut in _cuts(base):
            mean = models[0][cut].clone()
            for x in models[1:]:
                mean += x[cut]
            share = ratio[cut] if base.dim() > 1 else ratio
            out[cut] = share * mean.div_(len(models)) + (1 - share) * base[cut]
        return out.view(t.tensors[0].shape)


def _cosine(product: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """product / (a b) in `dtype`, each rounded to it first where it can hold them; 0 where a or b is."""
    size, rounded = a * b, a.to(dtype) * b.to(dtype)
    exact = product / torch.where(size > 0, size, 1)
    return torch.where(rounded < 1e-6, exact.to(dtype), product.to(dtype) / rounded).clamp(-1, 1)


def _cuts(x: Tensor) -> list[slice]:
    """Pieces along the first axis."""
    row = max(1, x.numel() // max(1, x.shape[0]))
    return [slice(a, b) for a, b in spans(x.shape[0], max(1, (1 << 16) // row))]
