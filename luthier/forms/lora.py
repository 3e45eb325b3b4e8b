"""LoRA: a low-rank change of a weight; DoRA: its direction by LoRA, its magnitude by one number for every output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import FORMS, Form, Site, State
from luthier.parts.lowrank import add_lowrank, row_norms

T = TypeVar("T")


def named(pattern: str, site: Site) -> bool:
    """Whether a pattern is the site's role, a beginning of it, or matches its name."""
    return f"{site.role}.".startswith(f"{pattern}.") or fnmatch(site.name, pattern)


def own(table: Mapping[str, T], site: Site, default: T) -> T:
    """The value of the first pattern that names the site; else `default`."""
    return next((v for k, v in table.items() if named(k, site)), default)


def check_settings(form: LoRA) -> None:
    """Raises ValueError for a rank, scale or dropout that no site can have."""
    if form.rank < 1 or any(r < 1 for r in form.ranks.values()):
        raise ValueError(f"rank must be at least 1, got {min([form.rank, *form.ranks.values()])}")
    if any(a == 0 for a in (form.alpha, *form.alphas.values())):
        raise ValueError("alpha must not be 0, where nothing would be trained")
    if not 0 <= form.dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {form.dropout}")


def check_by_site(form: LoRA, sites: Sequence[Site]) -> None:
    """Raises ValueError for a pattern that names no site, a rank that none has room for, and dropout where there is no x."""
    if idle := [k for k in (*form.ranks, *form.alphas) if not any(named(k, s) for s in sites)]:
        raise ValueError(f"'{idle[0]}' in ranks or alphas names none of its sites: correct it, or leave it out")
    room = max((min(s.d_in, s.d_out) for s in sites), default=form.rank)
    if (rank := max((form.at_site(s)[0] for s in sites), default=0)) > room:
        raise ValueError(f"rank {rank} is more than any of its sites has room for: state one of at most {room}")
    if form.dropout and (fused := next((s.name for s in sites if s.kind == "fused-experts"), None)):
        raise ValueError(f"dropout cannot act on the fused experts of {fused}: set it to 0, or leave them out")


@FORMS.add("lora")
@dataclass(frozen=True)
class LoRA(Form):
    """ΔW = s · B A with A [r, in] Kaiming-uniform and B [out, r] zero at the start; the weight itself is frozen.

    s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling. Fused experts get one pair each. As in the authors' code
    a = √5 in drawing A, and on an embedding A is zero and B normal. Source: Hu et al. 2021 (P110); rsLoRA: Kalajdzievski 2023.
    """

    rank: int = 16
    """r: how many directions the change may use."""
    alpha: float | None = None
    """Numerator of the scale; default 2 r."""
    scaling: Literal["standard", "rslora"] = "standard"
    dropout: float = 0.0
    """Share of x's entries zeroed on the low-rank path, in training; none of an embedding's, whose x are tokens."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Other ranks by role or name pattern, first match: {"attn.q": 4, "*.0.*": 32}."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Other alphas, likewise."""

    paper: ClassVar[str] = "P110"
    reads_output: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "fused-experts")

    def __post_init__(self) -> None:
        check_settings(self)

    def check(self, sites: Sequence[Site]) -> None:
        check_by_site(self, sites)

    def at_site(self, site: Site) -> tuple[int, float]:
        """Rank and scale s there."""
        r = own(self.ranks, site, self.rank)
        alpha = own(self.alphas, site, 2 * r if self.alpha is None else self.alpha)
        return r, alpha / (math.sqrt(r) if self.scaling == "rslora" else r)

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r, stack = self.at_site(site)[0], (site.experts,) if site.experts else ()
        if site.kind == "embedding":  # a token's first step must not shrink with the vocabulary
            return {"A": torch.zeros(r, site.d_in), "B": torch.randn(site.d_out, r, generator=g)}, {}
        bound = 1 / math.sqrt(site.d_in)
        a = torch.empty(*stack, r, site.d_in).uniform_(-bound, bound, generator=g)
        return {"A": a, "B": torch.zeros(*stack, site.d_out, r)}, {}

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        a, b, scale = s.p["A"], s.p["B"], self.at_site(s.site)[1]
        if s.site.kind == "embedding":
            return F.embedding(x, a.t()).to(y.dtype) @ b.t().to(y.dtype) * scale
        x = F.dropout(x, self.dropout, s.ctx.training) if self.dropout else x
        return (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t() * scale

    def onto(self, total: Tensor, x: Tensor, y: Tensor, scale: float, s: State) -> Tensor:
        if s.site.kind == "embedding":
            return super().onto(total, x, y, scale, s)
        w = s.W() if s.product and not (self.dropout and s.ctx.training) else None
        x = F.dropout(x, self.dropout, s.ctx.training) if self.dropout else x
        return add_lowrank(total, x, s.p["A"], s.p["B"], scale * self.at_site(s.site)[1], w)

    def delta(self, s: State) -> dict[str, Tensor]:
        return {"weight": s.p["B"] @ s.p["A"] * self.at_site(s.site)[1]}

    def count(self, site: Site) -> int:
        return self.at_site(site)[0] * (site.d_in + site.d_out) * (site.experts or 1)


@FORMS.add("dora")
@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m · (W + s B A) / ‖W + s B A‖, norms per output row, m [out] trained and equal to ‖W‖ at the start.

    Norms are constants in the backward pass and come from Gram products in float32, never from W + s B A itself.
    `fixed["w2"]` keeps ‖W_i‖². As in the authors' code dropout takes x from both terms that are added to the base's output.
    Settings are LoRA's. Source: Liu et al. 2024 (P175); m per output row as in the authors' code.
    """

    paper: ClassVar[str] = "P175"
    reads_output: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    onto = Form.onto

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        p, fixed = super().build(site, g)
        return p | {"m": torch.ones(site.d_out)}, fixed | {"w2": torch.ones(site.d_out)}

    def start(self, s: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        w = s.W().float()
        w2 = w.square().sum(1).cpu()
        m = row_norms(w.cpu(), w2, s.p["A"], s.p["B"], self.at_site(s.site)[1])
        return {**s.p, "m": m}, {**s.fixed, "w2": w2}

    def ratio(self, s: State) -> Tensor:
        """m / ‖W + s B A‖, [out] in float32; exactly 1 at the start."""
        with torch.no_grad():
            norms = row_norms(s.W(), s.fixed["w2"], s.p["A"], s.p["B"], self.at_site(s.site)[1])
        return s.p["m"] / norms.clamp_min(torch.finfo(torch.float32).tiny)

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        r, scale = self.ratio(s), self.at_site(s.site)[1]
        if self.dropout and s.ctx.training:
            x = F.dropout(x, self.dropout)
            straight = F.linear(x, s.W().to(x.dtype))
        else:
            straight = y if s.bias is None else y - s.bias
        low = (x @ s.p["A"].to(x.dtype).t()) @ s.p["B"].to(x.dtype).t()
        return (r - 1).to(y.dtype) * straight + (r * scale).to(y.dtype) * low

    def delta(self, s: State) -> dict[str, Tensor]:
        r, w = self.ratio(s)[:, None], s.W().float()
        return {"weight": (r - 1) * w + r * (s.p["B"] @ s.p["A"]) * self.at_site(s.site)[1]}

    def count(self, site: Site) -> int:
        return super().count(site) + site.d_out
