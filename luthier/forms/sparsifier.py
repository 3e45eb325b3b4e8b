"""A near-identity map behind whatever writes to the residual stream, and the channels it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, Site, State


@FORMS.add("sparsifier")
@dataclass(frozen=True)
class Sparsifier(Form):
    """h' = s ⊙ m ⊙ (h + U V h) after every attention output and every feed-forward output, before the sum; state `embed` as
    a site, too, where the head is not tied to it, as the paper does and as dropping channels needs.

    V [r, d] Kaiming-uniform, U [d, r] zero and s [d] one at the start; all three train. m is 0 at the channels `dropped`,
    the same at every site, else 1: once folded, those channels are zero in the whole residual stream and
    `bases.recast.drop_channels` takes them out. `penalty` is the identity loss, mean (V Vᵀ − I)², which leaves scaling to s.
    The paper trains m, one logit a channel for the whole model; here it is stated.
    Source: PAT (P114), as the authors' code has it; folding takes s along.
    """

    rank: int = 200
    """r; at most d."""
    dropped: tuple[int, ...] = ()
    """Channels left out."""
    identity_loss: float = 1.0

    paper: ClassVar[str] = "P114"
    at: ClassVar[str] = "output"
    sites: ClassVar[tuple[str, ...]] = ("attn.o", "ffn.down")
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.identity_loss < 0 or any(c < 0 for c in self.dropped):
            raise ValueError("rank must be at least 1, identity_loss and channels not negative")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        d, r = site.d_out, min(self.rank, site.d_out)
        if any(c >= d for c in self.dropped):
            raise ValueError(f"dropped names channel {max(self.dropped)} of {d}")
        mask = torch.ones(d)
        mask[list(self.dropped)] = 0
        v = torch.empty(r, d).uniform_(-(d**-0.5), d**-0.5, generator=g)
        return {"U": torch.zeros(d, r), "V": v, "s": torch.ones(d)}, {"mask": mask}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        low = (y @ s.p["V"].to(y.dtype).t()) @ s.p["U"].to(y.dtype).t()
        scale = s.p["s"] * s.fixed["mask"]
        return (scale - 1).to(y.dtype) * y + scale.to(y.dtype) * low

    def delta(self, s: State) -> dict[str, Tensor]:
        scale, u, v, w = s.p["s"] * s.fixed["mask"], s.p["U"], s.p["V"], s.W().float()
        out = {"weight": scale[:, None] * (w + u @ (v @ w)) - w}
        if s.bias is not None:
            b = s.bias.float()
            out["bias"] = scale * (b + u @ (v @ b)) - b
        return out

    def count(self, site: Site) -> int:
        return site.d_out * (2 * min(self.rank, site.d_out) + 1)

    def penalty(self, s: State) -> Tensor | float:
        v = s.p["V"]
        return self.identity_loss * (v @ v.t() - torch.eye(len(v), device=v.device)).square().mean()
