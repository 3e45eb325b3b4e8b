"""The base's own parameters, moved: what a choice leaves behind, kept exactly (whole tensors, or single entries)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State
from luthier.parts.bits import INTEGER, decode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@FORMS.add("dense")
@dataclass(frozen=True)
class Dense(Form):
    """A whole parameter of the base, moved: ΔW = tuned − base, stored as integer differences of the bit patterns.

    `p["bits"]` has the parameter's own shape in the model (a Conv1D's is transposed) and turns the base's value into
    the tuned one bit for bit. Made by choices; edits the base in place and restores it from the kept original.
    """

    dtype: str = "float32"
    """Floating type the difference was taken in; the base must be held in a type that converts to it exactly."""
    at: ClassVar[str] = "base"
    sites: ClassVar[tuple[str, ...]] = ("all",)
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "norm", "fused-experts", "other")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"bits": torch.zeros(site.shape, dtype=INTEGER[DTYPES[self.dtype]])}, {}

    def edit(self, base: Tensor, s: State) -> Tensor:
        """The tuned parameter, in `dtype`, from the base's (in the model's own layout)."""
        return decode(s.p["bits"].to(base.device), base, DTYPES[self.dtype])

    def delta(self, s: State) -> dict[str, Tensor]:
        base = s.W()
        return {"weight": self.edit(base, s).float() - base.float()}

    def count(self, site: Site) -> int:
        return math.prod(site.shape)


@FORMS.add("entries")
@dataclass(frozen=True)
class Entries(Dense):
    """Single entries of a parameter, moved: `fixed["index"]` flat positions [k], `p["bits"]` their differences [k]."""

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        index = torch.randperm(super().count(site), generator=g)[: self.count(site)].sort().values
        return {"bits": torch.zeros(len(index), dtype=INTEGER[DTYPES[self.dtype]])}, {"index": index}

    def edit(self, base: Tensor, s: State) -> Tensor:
        dtype = DTYPES[self.dtype]
        flat = base.to(dtype).flatten().clone()
        index = s.fixed["index"].to(base.device)
        flat[index] = decode(s.p["bits"].to(base.device), flat[index], dtype)
        return flat.view_as(base)

    def count(self, site: Site) -> int:
        return site.entries or max(super().count(site) // 2, 1)
