"""Two of every four weights, in a few bits each with a scale for every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Site, State
from luthier.forms.engine import Packed, Rows, random_bytes, shape
from luthier.parts.packing import TWO_OF_FOUR, unpack_codes, unpack_sixths
from luthier.parts.rounding import levels


@FORMS.add("two-four")
@dataclass(frozen=True)
class TwoFour(Packed):
    """ΔW of which every four consecutive inputs keep two, each (code − (2^bits − 1)/2) · step of its group · scale.

    `fixed["codes"]` bit planes [bits, rows, ceil(kept / 8)], `fixed["places"]` which two of four, three of them in a byte
    (0.67 bits a weight, where the layout of sparse tensor cores takes 1), `fixed["steps"]` float16 [rows, groups].
    bits / 2 + 0.67 + 16 / group bits a weight. Source: Yao et al. 2025 (P142).
    """

    bits: int = 2
    """Of a kept weight."""
    group: int = 128
    """Inputs that share a step; a multiple of 4."""

    paper: ClassVar[str] = "P142"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group < 4 or self.group % 4:
            raise ValueError(f"group must be a multiple of 4, got {self.group}")

    def sizes(self, site: Site) -> tuple[int, int, int]:
        """Rows, fours in a row, groups in a row; the last four and group may be filled up."""
        rows, columns = shape(site)
        return rows, -(-columns // 4), -(-columns // self.group)

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows, fours, groups = self.sizes(site)
        codes = random_bytes(g, self.bits, rows, -(-2 * fours // 8))
        places = torch.randint(0, 216, (rows, -(-fours // 3)), generator=g, dtype=torch.uint8)
        return {"scale": torch.zeros(1)}, {"codes": codes, "places": places, "steps": torch.ones(rows, groups).half()}

    def rows(self, s: State, which: Rows) -> Tensor:
        _, fours, _ = self.sizes(s.site)
        columns = shape(s.site)[1]
        at = unpack_sixths(s.fixed["places"][which], fours)
        values = unpack_codes(s.fixed["codes"][:, which], 2 * fours) - levels(self.bits)
        out = values.new_zeros(*at.shape, 4)
        out.scatter_(2, F.embedding(at, TWO_OF_FOUR.to(at.device)), values.unflatten(-1, (-1, 2)))
        steps = s.fixed["steps"][which].float().repeat_interleave(self.group, 1)
        return out.flatten(1)[:, :columns].mul_(steps[:, :columns])
