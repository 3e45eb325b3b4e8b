"""(IA)³: keys, values and inner activations, each multiplied by a learned vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State


@FORMS.add("ia3")
@dataclass(frozen=True)
class IA3(Form):
    """l ⊙ k, l ⊙ v and, at the feed-forward part, down(l ⊙ x); every l is 1 at the start.

    At roles named in `inputs` the module's input is multiplied, elsewhere its output. Folds to (l − 1) on W's rows or
    columns. Where query, key and value are one matrix the query's outputs are multiplied too, as PEFT does.
    Source: Liu et al. 2022, "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning".
    """

    inputs: tuple[str, ...] = ("ffn.down",)
    """Roles where the input is multiplied, not the output."""

    at: ClassVar[str] = "output"
    sites: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "ffn.down")

    def at_input(self, site: Site) -> bool:
        """Whether the vector stands before the module."""
        return any(f"{site.role}.".startswith(f"{role}.") for role in self.inputs)

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"l": torch.ones(self.count(site))}, {}

    def before(self, x: Tensor, s: State) -> Tensor:
        return x * s.p["l"].to(x.dtype) if self.at_input(s.site) else x

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor | None:
        return None if self.at_input(s.site) else (s.p["l"] - 1).to(y.dtype) * y

    def delta(self, s: State) -> dict[str, Tensor]:
        more, w = s.p["l"] - 1, s.W().float()
        if self.at_input(s.site):
            return {"weight": w * more}
        change = {"weight": more[:, None] * w}
        return change if s.bias is None else change | {"bias": more * s.bias.float()}

    def count(self, site: Site) -> int:
        return site.d_in if self.at_input(site) else site.d_out
