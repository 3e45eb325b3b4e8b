"""RoseLoRA's form: a low-rank change of which every row of A and column of B has few entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State
from luthier.parts.lowrank import add_lowrank


@FORMS.add("rose-lora")
@dataclass(frozen=True)
class RoseLoRA(Form):
    """ΔW = B A, where each of A's rows has k_in = max(1, round(keep · d_in)) entries and each of B's columns k_out of d_out.

    Trained: `A` [r, k_in] and `B` [r, k_out], the entries themselves; `fixed` holds their places. As a form of its own
    the places are drawn, A uniformly as in LoRA and B zero; the edit of the same name finds them by thinning.
    BA has at most r · k_in · k_out entries. Source: Wang et al. 2024 (P143).
    """

    rank: int = 4
    keep: float = 0.1
    """Share of each row of A and column of B."""

    paper: ClassVar[str] = "P143"
    reads_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.keep <= 1:
            raise ValueError(f"rank must be positive and keep lie in (0, 1], got {self.rank}, {self.keep}")

    def kept(self, width: int) -> int:
        """Entries of one row of A (width d_in) or column of B (width d_out)."""
        return max(1, round(self.keep * width))

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = {}
        for name, width in (("A", site.d_in), ("B", site.d_out)):
            drawn = torch.rand(self.rank, width, generator=g).topk(self.kept(width), dim=1).indices
            rows[f"{name}_at"] = drawn.sort(1).values
        a = torch.empty(self.rank, self.kept(site.d_in)).uniform_(-1, 1, generator=g) / site.d_in**0.5
        return {"A": a, "B": torch.zeros(self.rank, self.kept(site.d_out))}, rows

    def packed(self, a: Tensor, b: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """p and fixed from A [r, d_in] and B [d_out, r], of which the largest entries of each row and column are kept."""
        p, fixed = {}, {}
        for name, dense in (("A", a), ("B", b.t())):
            index = dense.abs().topk(self.kept(dense.shape[1]), dim=1).indices.sort(1).values
            p[name], fixed[f"{name}_at"] = dense.gather(1, index).float().cpu(), index.cpu()
        return p, fixed

    def pair(self, s: State) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r], dense."""
        a, b = s.p["A"], s.p["B"]
        wide = a.new_zeros(self.rank, s.site.d_in).scatter(1, s.fixed["A_at"], a)
        return wide, b.new_zeros(self.rank, s.site.d_out).scatter(1, s.fixed["B_at"], b).t()

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        a, b = self.pair(s)
        return (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()

    def onto(self, total: Tensor, x: Tensor, y: Tensor, scale: float, s: State) -> Tensor:
        return add_lowrank(total, x, *self.pair(s), scale, s.W() if s.product else None)

    def delta(self, s: State) -> dict[str, Tensor]:
        a, b = self.pair(s)
        return {"weight": b @ a}

    def count(self, site: Site) -> int:
        return self.rank * (self.kept(site.d_in) + self.kept(site.d_out))
