"""Sparse entries: a few single numbers of each weight, moved by trained amounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State


@FORMS.add("sparse")
@dataclass(frozen=True)
class Sparse(Form):
    """ΔW is zero but at k fixed entries of every weight, whose changes are trained and start at zero.

    `fixed["index"]` holds flat positions in W [out, in]. Unlike the choices that move entries in place, the base's values
    stay untouched and the change adds to other forms; W + ΔW exists during each forward pass.
    Source: sparse deltas of fixed support, as in Ansell et al. 2022 (P031) without its first phase.
    """

    fraction: float = 0.01
    """Share of each weight's entries that move."""
    entries: int | None = None
    """Their number at each site, instead of the share."""
    by: Literal["random", "largest", "smallest"] = "random"
    """How they are found: drawn, or by the size of the base's weight."""

    changes_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or (self.entries is not None and self.entries < 1):
            raise ValueError(
                f"fraction must lie in (0, 1] and entries be positive, got {self.fraction}, {self.entries}"
            )

    def count(self, site: Site) -> int:
        size = site.d_in * site.d_out
        return min(self.entries or max(round(size * self.fraction), 1), size)

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        drawn = torch.randperm(site.d_in * site.d_out, generator=g)[: self.count(site)].sort().values
        return {"values": torch.zeros(len(drawn))}, {"index": drawn}

    def start(self, s: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.by == "random":
            return dict(s.p), dict(s.fixed)
        size = s.W().float().abs().flatten()
        index = size.topk(self.count(s.site), largest=self.by == "largest").indices.sort().values
        return dict(s.p), {"index": index.cpu()}

    def delta(self, s: State) -> dict[str, Tensor]:
        flat = s.p["values"].new_zeros(s.site.d_out * s.site.d_in)
        return {"weight": flat.index_copy(0, s.fixed["index"], s.p["values"]).view(s.site.d_out, s.site.d_in)}
