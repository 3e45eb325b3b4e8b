"""Interpolation along the arc between two models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.parts.scratch import Scratch
from luthier.parts.spread import SPAN, Over, alone
from luthier.parts.trims import wide

PIECE = 1 << 20
"""Norms and products are summed in float32 over pieces of so many entries, as mergekit sums them: the cosine then has the
same rounding errors (some 1e-5), and 16-bit results agree bit for bit."""
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

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        if 0 <= self.t <= 1:
            return ""
        return "t is not between 0 (the base) and 1 (the model), and goes on beyond them: state one that is"

    def cosine(self, a: Tensor, b: Tensor, over: Over = alone) -> Tensor:
        """Of the angle between two flat tensors [n], taken of normalised copies; 0 where either is 0. A scalar tensor."""
        kind, n, own = wide(a.dtype), a.numel(), Scratch()

        def piece(x: Tensor, name: str, i: int, j: int) -> Tensor:
            return own.get(name, j - i, kind).copy_(x[i:j])

        def products(i: int, j: int) -> Tensor:
            return piece(a, "x", i, j).div_(norms[0]).mul_(piece(b, "y", i, j).div_(norms[1])).sum()

        norms = []
        for x in (a, b):
            parts = over(n, lambda i, j, x=x: torch.linalg.vector_norm(piece(x, "x", i, j)), PIECE)
            norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
            norms.append(torch.where(norm > 1e-8, norm, 1))
        return torch.stack(over(n, products, PIECE)).sum(dim=0).clamp(-1, 1)

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

        own = Scratch()

        def mix(i: int, j: int) -> None:
            x, y = own.get("x", j - i, kind).copy_(a[i:j]).mul_(first), own.get("y", j - i, kind).copy_(b[i:j])
            flat[i:j] = x.add_(y.mul_(second))

        t.over(len(a), mix, SPAN)
        return out
