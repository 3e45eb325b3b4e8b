"""A few entries of a change, all of one size: their places and signs, Golomb coded on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Site, State
from luthier.forms.engine import Packed, Rows, shape
from luthier.parts.packing import pack_bits, rice_decode, rice_encode, unpack_signs


@FORMS.add("ternary")
@dataclass(frozen=True)
class Ternary(Packed):
    """ΔW = scale · T with T in {−1, 0, 1}; a share `density` of T's entries is not zero.

    In memory `fixed["index"]` [k] are flat places in M, ascending (int32 where they fit), and `fixed["sign"]` [k] int8.
    On disk the gaps between places are Golomb coded (divisor a power of two) and the signs take a bit each: within a
    few percent of H(density) + density bits a weight. Source: Yadav et al. 2023 (P084).
    """

    density: float = 0.05
    """Share of entries that are not zero."""

    paper: ClassVar[str] = "P084"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")

    def kept(self, site: Site) -> int:
        """How many entries are not zero; at least 1."""
        return max(1, round(site.d_in * site.d_out * self.density))

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        size, k = site.d_in * site.d_out, self.kept(site)
        index = torch.randperm(size, generator=g)[:k].sort().values
        sign = torch.randint(0, 2, (k,), generator=g, dtype=torch.int8) * 2 - 1
        return {"scale": torch.zeros(1)}, {"index": index.to(narrow(size)), "sign": sign}

    def rows(self, s: State, which: Rows) -> Tensor:
        index, sign = s.fixed["index"], s.fixed["sign"]
        rows, columns = shape(s.site)
        number = torch.arange(rows, device=index.device)[which]
        ends = torch.searchsorted(index, torch.stack([number, number + 1]).to(index.dtype) * columns)
        length = ends[1] - ends[0]
        first = length.cumsum(0) - length
        at = torch.arange(int(length.sum()), device=index.device)
        row = torch.repeat_interleave(torch.arange(len(number), device=index.device), length)
        place = at - first[row] + ends[0][row]
        out = torch.zeros(len(number) * columns, device=index.device)
        out[row * columns + index[place] % columns] = sign[place].float()
        return out.view(-1, columns)

    def stored(
        self, site: Site, p: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        index, sign = fixed["index"].cpu(), fixed["sign"].cpu()
        unary, low = rice_encode(index, site.d_in * site.d_out)
        return p, {"unary": unary, "low": low, "signs": pack_bits(sign > 0), "count": torch.tensor([len(index)])}

    def restored(
        self, site: Site, p: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        size, count = site.d_in * site.d_out, int(fixed["count"])
        index = rice_decode(fixed["unary"], fixed["low"], count, size)
        if len(index) != count or (count and not 0 <= int(index[-1]) < size):
            raise ValueError(f"{len(index)} places of {count}, the last beyond the matrix")
        sign = unpack_signs(fixed["signs"], count).to(torch.int8)
        return p, {"index": index.to(narrow(size)), "sign": sign}


def narrow(size: int) -> torch.dtype:
    """Integer type for places in a matrix of so many entries."""
    return torch.int32 if size < 2**31 else torch.int64
