"""What forms of packed numbers share: one factor that may be tuned, times a matrix that is unpacked by blocks of rows."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import Form, Site, State
from luthier.parts.blocks import product, whole

Rows = slice | Tensor
"""Which rows of the packed matrix: a range, or int64 numbers [n]."""


class Packed(Form):
    """ΔW = scale · M, with p["scale"] [1] and M in packed numbers, never whole in memory while it is applied.

    M is [d_out, d_in]; of an embedding it is the table [vocabulary, hidden], so that a token's row is unpacked alone.
    `build` draws a random M with scale 0, for tests of the form alone: compressions give the real one.
    """

    reads_output: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")

    def rows(self, s: State, which: Rows) -> Tensor:
        """Those rows of M, [n, columns] in float32."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def times(self, x: Tensor, s: State) -> Tensor:
        """x Mᵀ [..., rows] for x [..., columns]."""
        return product(x, lambda a, b: self.rows(s, slice(a, b)), shape(s.site)[0])

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        if s.site.kind == "embedding":
            out = self.rows(s, x.flatten()).view(*x.shape, -1).to(y.dtype)
        else:
            out = self.times(x, s)
        return out * s.p["scale"].to(out.dtype)

    def delta(self, s: State) -> dict[str, Tensor]:
        made = whole(lambda a, b: self.rows(s, slice(a, b)), *shape(s.site)) * s.p["scale"]
        return {"weight": made.t() if s.site.kind == "embedding" else made}

    def count(self, site: Site) -> int:
        return 1


def shape(site: Site) -> tuple[int, int]:
    """Rows and columns of the packed matrix."""
    return (site.d_in, site.d_out) if site.kind == "embedding" else (site.d_out, site.d_in)


def random_bytes(g: torch.Generator, *size: int) -> Tensor:
    """Uniform bytes."""
    return torch.randint(0, 256, size, generator=g, dtype=torch.uint8)
