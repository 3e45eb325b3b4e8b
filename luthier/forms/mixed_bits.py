"""A low-rank change whose strongest directions have many bits and whose weakest have few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Site, State
from luthier.forms.engine import Packed, Rows, random_bytes, shape
from luthier.parts.packing import unpack_codes
from luthier.parts.rounding import levels


@FORMS.add("mixed-bits")
@dataclass(frozen=True)
class MixedBits(Packed):
    """ΔW = scale · Σ U_g V_g over groups g of singular directions, group g in bits[g] bits; the rest has no bits at all.

    `directions` of the first groups are stated, the last group gets what is left of the budget of `budget` bits a weight
    of ΔW (a direction costs bits · (rows + columns) and two scales of 16 bits). `fixed["u0"]`, `fixed["v0"]` … are bit planes
    [bits, r, ceil(n / 8)], a direction a row, their steps `su0` … [r] float16. Source: Ping et al. 2024 (P023): 8, 3, 2 bits.
    """

    bits: tuple[int, ...] = (8, 3, 2)
    directions: tuple[int, ...] = (2, 32)
    """Of every group but the last."""
    budget: float = 1.0
    """Bits a weight of ΔW, all in all."""

    paper: ClassVar[str] = "P023"

    def __post_init__(self) -> None:
        if len(self.directions) != len(self.bits) - 1 or not all(1 <= b <= 8 for b in self.bits):
            raise ValueError(
                f"bits must be 1 to 8 and directions state all groups but the last, got {self.bits}, {self.directions}"
            )
        if not 0 < self.budget <= 16:
            raise ValueError(f"budget must lie in (0, 16] bits a weight, got {self.budget}")

    def ranks(self, site: Site) -> list[int]:
        """Directions of every group at a site, within the budget and the matrix; at least one in all."""
        rows, columns = shape(site)
        left, free, out = self.budget * rows * columns, min(rows, columns), []
        for bits, wanted in zip(self.bits, (*self.directions, free), strict=True):
            each = bits * (8 * (-(-rows // 8)) + 8 * (-(-columns // 8))) + 32
            out.append(max(0, min(wanted, free, int(left // each))))
            left, free = left - out[-1] * each, free - out[-1]
        return out if sum(out) else [1, *out[1:]]

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows, columns = shape(site)
        fixed: dict[str, Tensor] = {}
        for k, (bits, r) in enumerate(zip(self.bits, self.ranks(site), strict=True)):
            for side, n in (("u", rows), ("v", columns)) if r else ():
                fixed[f"{side}{k}"] = random_bytes(g, bits, r, -(-n // 8))
                fixed[f"s{side}{k}"] = torch.full((r,), 0.5 / levels(bits)).half()
        return {"scale": torch.zeros(1)}, fixed

    def factors(self, s: State) -> tuple[Tensor, Tensor]:
        """U [r, rows] and V [r, columns], all groups, float32."""
        out = []
        for side, n in zip("uv", shape(s.site), strict=True):
            names = [k for k in range(len(self.bits)) if f"{side}{k}" in s.fixed]
            parts = [unpack_codes(s.fixed[f"{side}{k}"], n) - levels(self.bits[k]) for k in names]
            steps = torch.cat([s.fixed[f"s{side}{k}"] for k in names]).float()
            out.append(torch.cat(parts) * steps[:, None])
        return out[0], out[1]

    def rows(self, s: State, which: Rows) -> Tensor:
        u, v = self.factors(s)
        return u[:, which].t() @ v

    def times(self, x: Tensor, s: State) -> Tensor:
        u, v = self.factors(s)
        return (x @ v.to(x.dtype).t()) @ u.to(x.dtype)
