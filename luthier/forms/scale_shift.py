"""Scale and shift: two numbers for every feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State


@FORMS.add("scale-shift")
@dataclass(frozen=True)
class ScaleShift(Form):
    """y' = γ y + β for every channel of the outputs of linear layers and norms; γ = 1, β = 0 at the start.

    Folds to (γ − 1) W and (γ − 1) b + β; where the module has no bias a trained β keeps it from folding. A norm that
    multiplies by 1 + weight (Gemma's) folds to (γ − 1)(1 + w).
    Differs from the paper: γ and β start at exactly 1 and 0. Source: Lian et al. 2022 (P224).
    """

    shift: bool = True
    """Whether β is trained; without it the change folds everywhere."""

    paper: ClassVar[str] = "P224"
    at: ClassVar[str] = "output"
    sites: ClassVar[tuple[str, ...]] = ("linear", "norm")
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "norm", "offset-norm")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        p = {"gamma": torch.ones(site.d_out)}
        return (p | {"beta": torch.zeros(site.d_out)} if self.shift else p), {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        scaled = (s.p["gamma"] - 1).to(y.dtype) * y
        return scaled + s.p["beta"].to(y.dtype) if self.shift else scaled

    def delta(self, s: State) -> dict[str, Tensor]:
        more, w = s.p["gamma"] - 1, s.W().float()
        effective = w + 1 if s.site.kind == "offset-norm" else w
        out = {"weight": (more[:, None] if w.dim() == 2 else more) * effective}
        if s.bias is not None or self.shift:
            moved = torch.zeros_like(more) if s.bias is None else more * s.bias.float()
            out["bias"] = moved + s.p["beta"] if self.shift else moved
        return out

    def count(self, site: Site) -> int:
        return site.d_out * (2 if self.shift else 1)
