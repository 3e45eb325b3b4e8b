"""Interpolation along the arc between two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.parts.spread import Over, alone, spans
from luthier.parts.trims import wide

PIECE = 1 << 20
"""Norms and products are summed over pieces of so many entries, as mergekit sums them, so that 16-bit results agree."""
STRAIGHT = 0.9995
"""Tensors whose |cosine| is above are interpolated linearly."""


@MERGES.add("slerp")
@dataclass(frozen=True)
class Slerp(Merge):
    """W = (sin((1 − t) Ω) W₀ + sin(t Ω) W₁) / sin Ω, Ω the angle between the two flattened tensors, in float32.

    t = 0 is the base, 1 the other model. Nearly parallel or opposed tensors (|cos Ω| > 0.9995), the usual case for two
    tunes of one base, are interpolated linearly, and counted. The norm lies on the arc only where both have
    one norm. Source: Shoemake 1985; Lu et al. 2024 (P054).
    """

    t: float = 0.5
    """0 the base … 1 the other model; gradients over depth make it differ by layer."""

    models: ClassVar[tuple[int, int | None]] = (1, 1)
    each: ClassVar[Mapping[str, float | None]] = {}
    ordered: ClassVar[bool] = True
    paper: ClassVar[str] = "P054"

    def cosine(self, a: Tensor, b: Tensor, over: Over = alone) -> Tensor:
        """Of the angle between two flat tensors [n], taken of normalised copies; 0 where either is 0. A scalar tensor.

        Above `PIECE` entries of products instead, added up in float64: one pass, in cache.
        """
        kind = wide(a.dtype)
        if a.numel() > PIECE:

            def products(i: int, j: int) -> tuple[float, float, float]:
                x, y = a[i:j].to(kind), b[i:j].to(kind)
                return float(x.dot(x)), float(x.dot(y)), float(y.dot(y))

            aa, ab, bb = map(sum, zip(*over(a.numel(), products), strict=True))
            scale = math.sqrt(aa) * math.sqrt(bb)
            return torch.tensor(ab / scale if scale > 0 else 0.0, dtype=kind).clamp(-1, 1)
        norms = []
        for x in (a, b):
            parts = [torch.linalg.vector_norm(x[i:j].to(kind)) for i, j in spans(x.numel(), PIECE)]
            norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
            norms.append(torch.where(norm > 1e-8, norm, 1))
        parts = [
            ((a[i:j].to(kind) / norms[0]).mul_(b[i:j].to(kind) / norms[1])).sum() for i, j in spans(a.numel(), PIECE)
        ]
        return torch.stack(parts).sum(dim=0).clamp(-1, 1)

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        a, b, out = t.base.reshape(-1), t.tensors[0].reshape(-1), t.blank()
        if not len(a):
            return out
        kind, flat = wide(a.dtype), out.view(-1)
        cosine, share = self.cosine(a, b, t.over), torch.tensor(self.t, dtype=kind)
        first, second = 1 - share, share
        t.notes["interpolated linearly"] = float(cosine.abs() > STRAIGHT)
        if not t.notes["interpolated linearly"]:
            angle = torch.acos(cosine)
            first, second = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()

        def mix(i: int, j: int) -> None:
            x, y = a[i:j].to(kind, copy=True).mul_(first), b[i:j].to(kind, copy=True).mul_(second)
            flat[i:j] = x.add_(y)

        t.over(len(a), mix)
        return out
