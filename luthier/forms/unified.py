"""One design space for adapters, low-rank changes and prefixes: what is added to a hidden state, where, from what, and how.

| design | function | insertion | scaling | sites |
|---|---|---|---|---|
| adapter | relu | sequential | 1 | attn.o, ffn.down |
| LoRA | linear | parallel | alpha / r | attn.q, attn.v |
| parallel, scaled parallel adapter | relu | parallel | 1, 4 | attn.module or ffn.module |
| prefix | softmax | parallel | 1 | attention |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Form, No, Site, State

FUNCTIONS = {"linear": lambda z: z, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


@FORMS.add("unified")
@dataclass(frozen=True)
class Unified(Form):
    """h' = h + s · f(z Dᵀ) U for the output h of the module at its site; z is its input x (parallel) or h (sequential).

    softmax, at attention's heads: h' = (1 − λ) h + λ · softmax(q Dᵀ) U, λ the share of attention that `width` keys D with
    values U take beside the text's own: gated by λ, parallel by its nature, without s. D is drawn as in LoRA and U zero;
    for softmax both are normal with deviation 0.02.

    The module's table says which method is which. Mix-and-match is its last two: width 30 at attention, 512 and s = 4 at
    ffn.module. Source: He et al. 2022 (P187).
    """

    function: Literal["linear", "relu", "gelu", "tanh", "softmax"] = "relu"
    insertion: Literal["sequential", "parallel"] = "sequential"
    scaling: float = 1.0
    """s."""
    width: int = 64
    """Rows of D and U: the bottleneck, LoRA's r, or a prefix's length."""

    paper: ClassVar[str] = "P187"
    at: ClassVar[str] = "output"
    sites: ClassVar[tuple[str, ...]] = ("attn.o", "ffn.down")
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "attention", "feed-forward")
    dense: ClassVar[bool | No] = No("its function may be any; what is linear and parallel is lora, which folds")

    def __post_init__(self) -> None:
        if self.width < 1 or self.scaling == 0:
            raise ValueError(f"width must be at least 1 and scaling not 0, got {self.width} and {self.scaling}")
        if self.function == "softmax":
            if self.insertion != "parallel" or self.scaling != 1:
                raise ValueError(
                    "softmax is parallel and gated by the attention it takes: insertion parallel, scaling 1"
                )
            no, one = No("keys and values take attention whatever they are multiplied by"), ("attention",)
            own = {"at": "keys-values", "sites": one, "kinds": one, "identity": no, "scales": no}
            for fact, value in own.items():  # what it declares of itself is a prefix's
                object.__setattr__(self, fact, value)

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """Of D and U."""
        heads = site.kv_heads * site.head_dim
        reads = site.d_out if self.insertion == "sequential" else site.d_in
        d, u = (heads, heads) if self.function == "softmax" else (reads, site.d_out)
        return {"D": (self.width, d), "U": (self.width, u)}

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        d, u = self.shapes(site).values()
        if self.function == "softmax":
            return {"D": torch.randn(d, generator=g) * 0.02, "U": torch.randn(u, generator=g) * 0.02}, {}
        return {"D": torch.empty(d).uniform_(-(d[1] ** -0.5), d[1] ** -0.5, generator=g), "U": torch.zeros(u)}, {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        z = y if self.insertion == "sequential" else x
        return FUNCTIONS[self.function](z @ s.p["D"].to(y.dtype).t()) @ s.p["U"].to(y.dtype) * self.scaling

    def extra(self, s: State) -> tuple[Tensor, Tensor]:
        keys, values = (s.p[k].view(self.width, s.site.kv_heads, -1).transpose(0, 1) for k in ("D", "U"))
        return keys, values

    def count(self, site: Site) -> int:
        return sum(a * b for a, b in self.shapes(site).values())
