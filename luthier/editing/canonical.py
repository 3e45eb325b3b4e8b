"""Canonical examples: the few vectors that a behaviour hangs on are found by gradient, tuned, and kept within a ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import EDITS, Site, Small
from luthier.editing.engine import (
    COUNT,
    Edit,
    Request,
    Subject,
    Text,
    drift,
    key,
    mean_loss,
    moving,
    target_nll,
)
from luthier.parts.descent import shuffled, step_on


@EDITS.add("canonical")
@dataclass(frozen=True)
class Canonical(Edit):
    """Per request: every vector is scored by ‖∇ loss(example)‖ − contrast · ‖∇ loss(general text)‖ and the `vectors` best
    are chosen. The union over requests is tuned on −log p(target) + kl · KL(base ‖ tuned) on general text, once for
    each rate of `lrs`; kept is the state with the lowest loss on the examples among all whose loss on general text is
    at most (1 + ball) times the base's. Where no state is within the ball, nothing is changed.

    A vector is what one hidden unit writes into the stream, a column of the down projection (unit: 'out'), or the row
    that a unit reads by ('in'). Our reading for models without sense vectors: the published form tunes those of a
    Backpack. General text for the choice is other than for the ball. Source: Hewitt et al. 2024 (P073).
    """

    vectors: int = field(default=10, metadata=COUNT)
    """Chosen for each request."""
    contrast: float = 1.0
    """Weight of general text in the score."""
    kl: float = 1.0
    ball: float = 0.001
    """Largest relative rise of general loss; 0.001, 0.0001 and 0.00001 in the paper."""
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    steps: int = 20
    batch_size: int = field(default=8, metadata=COUNT)
    every: int = field(default=2, metadata=COUNT)
    """Steps between two looks at the ball."""
    role: str = "ffn.down"
    unit: Literal["out", "in"] = "out"
    tokens: int = field(default=4000, metadata=COUNT)
    """Of general text, half for the choice and KL, half for the ball."""

    paper: ClassVar[str] = "P073"

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        texts, general = [q.new for q in requests], s.passages(self.tokens)
        seen, ball = general[::2], general[1::2]
        masks = chosen(self, s, texts, seen)
        limit, lowest = (1 + self.ball) * mean_loss(s, ball), mean_loss(s, texts, closing=True)
        best: dict[str, Tensor] = {}
        for lr in self.lrs:
            w = {name: s.weight(site).clone().requires_grad_(True) for name, (site, _) in masks.items()}
            optimiser = torch.optim.Adam(list(w.values()), lr=lr)
            examples = shuffled(len(texts), self.batch_size, s.generator("examples", lr))
            passages = shuffled(len(seen), 2, s.generator("passages", lr))
            for step in range(self.steps):
                part, rest = [texts[n] for n in next(examples)], [seen[n] for n in next(passages)]
                asked = target_nll(s.run(part, w).logits, part, closing=True).mean()
                step_on(
                    optimiser,
                    asked + self.kl * drift(s, rest, w),
                    {id(w[name]): mask for name, (_, mask) in masks.items()},
                )
                if (step + 1) % self.every == 0 and (now := mean_loss(s, texts, w, closing=True)) < lowest:
                    if mean_loss(s, ball, w) <= limit:
                        best, lowest = {name: value.detach().clone() for name, value in w.items()}, now
        return dict(best)


def chosen(
    how: Canonical, s: Subject, texts: Sequence[Text], general: Sequence[Text]
) -> dict[str, tuple[Site, Tensor]]:
    """Parameter -> its site and the mask of its chosen vectors, [1, d_in] or [d_out, 1]."""
    sites = s.sites([how.role])
    w, across = moving(s, sites), 0 if how.unit == "out" else 1

    def sizes(part: Sequence[Text]) -> Tensor:
        loss = target_nll(s.run(part, w).logits, part).mean()
        return torch.cat([g.norm(dim=across) for g in torch.autograd.grad(loss, list(w.values()))])

    every = torch.stack([sizes([general[n] for n in at]) for at in s.batches(general)]).mean(0)
    picked = torch.zeros_like(every, dtype=torch.bool)
    for text in texts:
        picked[(sizes([text]) - how.contrast * every).topk(min(how.vectors, len(every))).indices] = True
    parts = picked.split([value.shape[1 - across] for value in w.values()])
    return {key(site): (site, m.unsqueeze(across)) for site, m in zip(sites, parts, strict=True) if m.any()}
