"""Bottleneck adapters: a small network of its own after, or beside, a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Form, No, Site, State

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@FORMS.add("adapter")
@dataclass(frozen=True)
class Adapter(Form):
    """y' = y + s · U f(D h + c) + e with h = y (serial) or the module's input x (parallel); U and e start at zero.

    By default after the output projection of attention and of the feed-forward part, before their residual sum. Parallel,
    it reads what the module at its site reads: at `ffn.module` the input of the feed-forward part (P187), at `ffn.down`
    that of its last matrix (P246).
    D [width, in] is drawn Kaiming-uniform; the paper draws both matrices near zero, here the start is the base exactly.
    The paper also trains norms and head: add the choice `norm`.
    Source: Houlsby et al. 2019 (P123); parallel and scaled: He et al. 2022 (P187).
    """

    width: int = 64
    """Units of the bottleneck."""
    placement: Literal["serial", "parallel"] = "serial"
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    scaling: float = 1.0
    """s; P187 uses 4 with parallel adapters."""

    paper: ClassVar[str] = "P123"
    at: ClassVar[str] = "output"
    sites: ClassVar[tuple[str, ...]] = ("attn.o", "ffn.down")
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "attention", "feed-forward")
    dense: ClassVar[bool | No] = No("an activation stands between its two matrices; there is no weight change to fold")

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def reads(self, site: Site) -> int:
        """Width of what it reads there."""
        return site.d_out if self.placement == "serial" else site.d_in

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        bound = 1 / self.reads(site) ** 0.5
        down = torch.empty(self.width, self.reads(site)).uniform_(-bound, bound, generator=g)
        up = torch.zeros(site.d_out, self.width)
        return {"down": down, "c": torch.zeros(self.width), "up": up, "e": torch.zeros(site.d_out)}, {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        h = y if self.placement == "serial" else x
        p = {name: value.to(y.dtype) for name, value in s.p.items()}
        inner = ACTIVATIONS[self.activation](F.linear(h, p["down"], p["c"]))
        return F.linear(inner, p["up"], p["e"]) * self.scaling

    def count(self, site: Site) -> int:
        return self.width * (self.reads(site) + site.d_out + 1) + site.d_out
