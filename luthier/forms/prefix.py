"""Deep prefix: learned keys and values before the others, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, No, Site, State


@FORMS.add("prefix")
@dataclass(frozen=True)
class Prefix(Form):
    """`length` extra keys and values [kv_heads, length, head_dim] per layer, without rotary positions.

    Numbers: layers · 2 · length · kv_heads · head_dim. With `inner` they come out of a small network instead,
    W₂ tanh(W₁ e + b₁) + b₂ for each of the `length` vectors e [hidden]; e, W₁ and b₁ are one for all layers, and a layer's
    W₂ and b₂ are its rows of the network's last ones, as in the authors' code. Source: Liu et al. 2021 (P444); Li and Liang 2021.
    """

    length: int = 20
    """Extra positions."""
    shift_positions: bool = True
    """Whether the text's positions start behind the prefix, as in PEFT."""
    spread: float = 0.02
    """Standard deviation of the start."""
    inner: int = 0
    """Width of the reparameterising network; 0 for none."""

    paper: ClassVar[str] = "P444"
    at: ClassVar[str] = "keys-values"
    scope: ClassVar[str] = "layer"
    sites: ClassVar[tuple[str, ...]] = ("attention",)
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    dense: ClassVar[bool | No] = No("adds keys and values; there is no weight change to fold")
    identity: ClassVar[bool | No] = No("any key takes some of the attention")
    scales: ClassVar[bool | No] = No("keys and values multiplied by 0 still take attention")

    def __post_init__(self) -> None:
        if self.length < 1 or self.inner < 0:
            raise ValueError(f"length must be at least 1 and inner at least 0, got {self.length} and {self.inner}")
        if self.inner:
            object.__setattr__(self, "shared", ("e", "W1", "b1"))

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The trained tensors."""
        width = site.kv_heads * site.head_dim
        if not self.inner:
            return {"keys": (self.length, width), "values": (self.length, width)}
        up = {"W2": (2 * width, self.inner), "b2": (2 * width,)}
        return {"e": (self.length, site.d_in), "W1": (self.inner, site.d_in), "b1": (self.inner,), **up}

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {name: torch.randn(shape, generator=g) * self.spread for name, shape in self.shapes(site).items()}, {}

    def extra(self, s: State) -> tuple[Tensor, Tensor]:
        p, site = s.p, s.site
        if self.inner:
            both = torch.tanh(p["e"] @ p["W1"].t() + p["b1"]) @ p["W2"].t() + p["b2"]
        else:
            both = torch.cat([p["keys"], p["values"]], 1)
        keys, values = both.view(self.length, 2, site.kv_heads, site.head_dim).unbind(1)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def count(self, site: Site) -> int:
        return sum(torch.Size(s).numel() for name, s in self.shapes(site).items() if name not in self.shared)

    def count_shared(self, site: Site) -> int:
        return sum(torch.Size(s).numel() for name, s in self.shapes(site).items() if name in self.shared)
