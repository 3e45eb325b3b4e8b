"""RoseLoRA: a low-rank change whose rows of A and columns of B are thinned out while they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import EDITS, FORMS, Site, Small
from luthier.editing.engine import COUNT, Edit, Request, Subject, key, target_nll
from luthier.parts.descent import shuffled, step_on


def kept_at(step: int, steps: int, keep: float, warm: float, cool: float) -> float:
    """Share kept after a step: 1 for the first `warm` of the steps, then cubically down to `keep`, reached `cool` before
    the end: keep + (1 − keep)(1 − progress)³."""
    progress = (step + 1 - warm * steps) / max(1.0, (1 - warm - cool) * steps)
    return keep + (1 - keep) * (1 - min(1.0, max(0.0, progress))) ** 3


def thin(values: Tensor, score: Tensor, count: int) -> Tensor:
    """values with all but the `count` best-scored entries of every row zeroed."""
    index = score.topk(count, dim=1).indices
    return torch.zeros_like(values).scatter(1, index, values.gather(1, index))


@EDITS.add("rose-lora")
@dataclass(frozen=True)
class RoseLoRA(Edit):
    """ΔW = B A. Score of an entry: moving average (beta) of |w · ∇w|, w as it was before the step. After every step each row
    of A and each column of B keeps its best share, which falls by `kept_at`, and the rest become zero. At the end every
    row of A has max(1, round(keep · d_in)) entries and every column of B as few of d_out, so that B A has at most
    rank · keep² of its entries. Trained on the targets by Adam. Differs: the authors' edits have rank 8, keep 0.05, 25
    steps on queries and values, and no entry beyond 0.003. Source: Wang et al. 2024 (P143).
    """

    rank: int = field(default=4, metadata=COUNT)
    keep: float = 0.1
    """Share of each row of A and column of B that is left."""
    steps: int = 60
    lr: float = 1e-2
    batch_size: int = field(default=16, metadata=COUNT)
    beta: float = 0.8
    """Of the moving average."""
    warm: float = 0.1
    """Share of the steps before thinning begins."""
    cool: float = 0.3
    """Share of the steps that train what is left."""
    roles: tuple[str, ...] = ("ffn.down",)
    layers: tuple[int, ...] | None = None

    paper: ClassVar[str] = "P143"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")
        if self.warm + self.cool > 1:
            raise ValueError(f"warm and cool must be shares, together at most 1, got {self.warm}, {self.cool}")

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        sites, texts = s.sites(self.roles, self.layers), [q.new for q in requests]
        form = FORMS.make("rose-lora", {"rank": self.rank, "keep": self.keep})
        start = {key(site): s.weight(site) for site in sites}
        # B is held as its transpose: its columns are rows here, as A's rows are.
        p = {(key(q), k): v.to(start[key(q)].device).requires_grad_(True) for q in sites for k, v in self.drawn(s, q)}
        score = {name: torch.zeros_like(value) for name, value in p.items()}
        optimiser = torch.optim.Adam(list(p.values()), lr=self.lr)
        order = shuffled(len(texts), self.batch_size, s.generator("order"))
        for step in range(self.steps):
            part = [texts[n] for n in next(order)]
            now = {name: w + p[name, "B"].t() @ p[name, "A"] for name, w in start.items()}
            held = {name: value.detach().clone() for name, value in p.items()}
            step_on(optimiser, target_nll(s.run(part, now).logits, part, closing=True).mean())
            share = kept_at(step, self.steps, self.keep, self.warm, self.cool)
            with torch.no_grad():
                for name, value in p.items():
                    assert value.grad is not None
                    score[name].mul_(self.beta).add_((held[name] * value.grad).abs(), alpha=1 - self.beta)
                    value.copy_(thin(value, score[name], max(1, round(share * value.shape[1]))))
        return {key(q): Small(form, *form.packed(p[key(q), "A"].detach(), p[key(q), "B"].detach().t())) for q in sites}

    def drawn(self, s: Subject, site: Site) -> list[tuple[str, Tensor]]:
        """A as LoRA draws it, Bᵀ zero."""
        a = torch.empty(self.rank, site.d_in).uniform_(-1, 1, generator=s.generator("A", key(site))) / site.d_in**0.5
        return [("A", a), ("B", torch.zeros(self.rank, site.d_out))]
