"""A near-identity map behind whatever writes to the residual stream, and the channels it leaves out."""

from __future__ import annotations

import math
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
    Here m is stated; `pat` trains it. Source: PAT (P114), as the authors' code has it; folding takes s along.
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

    def mask(self, s: State, still: bool = False) -> Tensor:
        """m, [d]; `still` as it is outside of training, whatever the moment."""
        return s.fixed["mask"]

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        low = (y @ s.p["V"].to(y.dtype).t()) @ s.p["U"].to(y.dtype).t()
        scale = s.p["s"] * self.mask(s)
        return (scale - 1).to(y.dtype) * y + scale.to(y.dtype) * low

    def delta(self, s: State) -> dict[str, Tensor]:
        scale, u, v, w = s.p["s"] * self.mask(s, still=True), s.p["U"], s.p["V"], s.W().float()
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


@FORMS.add("pat")
@dataclass(frozen=True)
class PAT(Sparsifier):
    """`sparsifier` whose m is trained: one logit M [d] a channel, from 0, the same at every site of the piece.

    In step t of T, m = sigmoid(τ M) + max(½ − t/T, 0) with τ = 1 / (1 − ln t / ln T): 1 at first, then ever harder, and
    fixed from 0.8 T on. `penalty_shared` asks for `keep` of the channels to be open, M ≥ 0: 10 |open − wanted| / wanted,
    passed straight through to M, + mean (M − ½)² of open and + mean (M + ½)² of closed ones. T steps at rate lr move a
    logit by about T · lr, which ½ needs. Everywhere but in training m is 1 or 0. Our reading: there exactly the wanted
    number is open, those of largest M, which are the open ones once the penalty is met, and all while all M are equal, as at
    the start; the mean of no channels is 0.
    """

    keep: float = 0.75
    """Share of channels to keep."""
    steps: int = 10000
    """T: the run's steps."""

    shared: ClassVar[tuple[str, ...]] = ("logits",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1 or self.steps < 2:
            raise ValueError(f"keep must lie in (0, 1] and steps be at least 2, got {self.keep} and {self.steps}")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        p, fixed = super().build(site, g)
        return p | {"logits": torch.zeros(site.d_out)}, fixed

    def mask(self, s: State, still: bool = False) -> Tensor:
        t, logits = s.ctx.step, s.p["logits"]
        if t >= 0.8 * self.steps:
            t, logits = int(0.8 * self.steps), logits.detach()
        hardness = 1 / (1 - math.log(max(1, t)) / math.log(self.steps) + 1e-6)
        soft = 1 / (1 + (-hardness * logits).clamp(max=10).exp()) + max(0.5 - t / self.steps, 0.0)
        if still or not s.ctx.training:  # the value is hard; a gradient is still there for whoever asks
            least = logits.detach().topk(self.wanted(logits)).values[-1]
            soft = (logits >= least).float() + (soft - soft.detach())
        return soft * s.fixed["mask"]

    def wanted(self, logits: Tensor) -> int:
        """Channels to keep."""
        return max(1, round(self.keep * len(logits)))

    def count_shared(self, site: Site) -> int:
        return site.d_out

    def penalty_shared(self, s: State) -> Tensor | float:
        logits = s.p["logits"] if s.ctx.step < 0.8 * self.steps else s.p["logits"].detach()
        wanted, is_open = self.wanted(logits), logits >= 0
        count = is_open.sum() + (logits - logits.detach()).sum()
        apart = [
            (logits[which] - goal).square().mean() for which, goal in ((is_open, 0.5), (~is_open, -0.5)) if which.any()
        ]
        return 10 * (count - wanted).abs() / wanted + torch.stack(apart).sum()
