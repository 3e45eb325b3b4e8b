"""One bit a weight: the signs of a change, and one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Site, State
from luthier.forms.engine import Packed, Rows, random_bytes, shape
from luthier.parts.packing import sums_of_eight, unpack_signs

FEW = 8
"""Up to so many positions at once, sums are looked up byte by byte; above, rows are unpacked and multiplied."""


@FORMS.add("signs")
@dataclass(frozen=True)
class Signs(Packed):
    """ΔW = scale · sign, signs packed eight to a byte in `fixed["bits"]` [rows, ceil(columns / 8)], 1 for plus.

    For a few positions at once (decoding) the product takes no unpacking: all 256 signed sums of every eight inputs are
    made once and each row of M adds up one of them a byte. Source: Liu et al. 2024 (P088).
    """

    paper: ClassVar[str] = "P088"

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows, columns = shape(site)
        return {"scale": torch.zeros(1)}, {"bits": random_bytes(g, rows, -(-columns // 8))}

    def rows(self, s: State, which: Rows) -> Tensor:
        return unpack_signs(s.fixed["bits"][which], shape(s.site)[1])

    def times(self, x: Tensor, s: State) -> Tensor:
        n, bits = x[..., 0].numel(), s.fixed["bits"]
        if n > FEW or x.requires_grad or x.device.type != "cpu":
            return super().times(x, s)
        table = sums_of_eight(F.pad(x.reshape(n, -1).float(), (0, 0, 0, FEW - n)))
        at = bits.int() + torch.arange(bits.shape[1], dtype=torch.int32) * 256
        return F.embedding_bag(at, table, mode="sum").t()[:n].to(x.dtype).reshape(*x.shape[:-1], -1)
