"""A weight replaced by two thin ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Form, No, Site, State
from luthier.parts.svd import balanced, truncated_svd


@FORMS.add("factored")
@dataclass(frozen=True)
class Factored(Form):
    """W' = B A with A [r, in] and B [out, r] from W's SVD, the roots of the singular values on both sides; both train.

    r = floor(in · out / (factor · (in + out))), so that a `factor`-th of the numbers is left. It replaces W: beside other
    forms it adds B A − W. `penalty` keeps the largest deviation near `eps`: weight · (max |B A − W| − eps)², averaged over
    matrices. Our reading: a layer has `matrices` of them. As a recast: `bases.recast.factor`. Source: PELA (P343).
    """

    factor: float = 2.0
    """Of compression; above 1."""
    penalty_weight: float = 1.0
    """0 for none, as the authors' DeiT, which distils, has it."""
    eps: float = 1e-3
    matrices: int = 7
    """Factored matrices of a layer."""

    paper: ClassVar[str] = "P343"
    identity: ClassVar[bool | No] = No("two thin matrices are the nearest of their rank, not the weight itself")

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")
        if self.penalty_weight < 0 or self.matrices < 1:
            raise ValueError("penalty_weight must not be negative, matrices at least 1")

    def rank(self, site: Site) -> int:
        """r; at least 1."""
        return max(1, int(site.d_in * site.d_out / (self.factor * (site.d_in + site.d_out))))

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r = self.rank(site)
        return {"A": torch.zeros(r, site.d_in), "B": torch.zeros(site.d_out, r)}, {}

    def start(self, s: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        a, b = balanced(*truncated_svd(s.W().float().cpu(), self.rank(s.site)))
        return {"A": a, "B": b}, {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        bias = None if s.bias is None else s.bias.to(x.dtype)
        return F.linear(F.linear(x, s.p["A"].to(x.dtype)), s.p["B"].to(x.dtype), bias) - y

    def delta(self, s: State) -> dict[str, Tensor]:
        return {"weight": s.p["B"] @ s.p["A"] - s.W().float()}

    def count(self, site: Site) -> int:
        return self.rank(site) * (site.d_in + site.d_out)

    def penalty(self, s: State) -> Tensor | float:
        if not self.penalty_weight:
            return 0.0
        drift = (s.p["B"] @ s.p["A"] - s.W().float()).abs().max()
        return self.penalty_weight * (drift - self.eps).square() / (self.matrices * max(1, s.site.layers))
