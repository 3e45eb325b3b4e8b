"""Channel projection: a square matrix behind a module's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State


@FORMS.add("projection")
@dataclass(frozen=True)
class Projection(Form):
    """y' = y + D y for the outputs of linear layers, D [d_out, d_out]; D = 0 at the start, so that I + D is the identity.

    Folds to D W and D b. The paper projects what each block of a diffusion model gives; our reading for transformers:
    what attention and feed-forward layers write to the residual stream, where the projection folds and a tuned model
    stays as large as its base. Source: the channel-wise projection of Ma et al. 2024 (P403).
    """

    paper: ClassVar[str] = "P403"
    at: ClassVar[str] = "output"
    sites: ClassVar[tuple[str, ...]] = ("attn.o", "ffn.down")
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"d": torch.zeros(site.d_out, site.d_out)}, {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        return y @ s.p["d"].T.to(y.dtype)

    def delta(self, s: State) -> dict[str, Tensor]:
        d = s.p["d"].float()
        out = {"weight": d @ s.W().float()}
        return out if s.bias is None else out | {"bias": d @ s.bias.float()}

    def count(self, site: Site) -> int:
        return site.d_out * site.d_out
