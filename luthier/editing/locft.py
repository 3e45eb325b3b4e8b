"""LocFT-BF: ordinary fine-tuning of one weight, breadth first."""

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
    Weights,
    key,
    layer_at,
    mean_loss,
    moving,
    one_site,
    share_right,
    target_nll,
)
from luthier.parts.descent import step_on


@EDITS.add("locft")
@dataclass(frozen=True)
class LocFT(Edit):
    """Cross-entropy on the targets alone (mean over a record's tokens, then over the batch; their end is a target too),
    Adam at a constant rate, nothing else. Breadth first: every epoch shuffles all edits into mini-batches; a batch
    below `enough` makes no update, an epoch below it ends the run. Depth first is the earlier custom, kept to compare:
    each edit to its end before the next.

    With `sweep`, every layer × role of `roles` is tried and the best kept: most targets and paraphrases right, less `price`
    for each nat that general text loses (our reading: the authors chose by hand). Differs: lr 5e-4 and 25 epochs there, a
    tenth of that lr for a whole layer, for thousands of edits of 8 B models. Source: P402, authors' code.
    """

    layer: int | None = None
    """Which; default at 0.7 of the depth."""
    role: str = "ffn.down"
    """Which weight of it; 'layer' for all its linear maps at once (our reading)."""
    lr: float = 2e-3
    batch_size: int = field(default=100, metadata=COUNT)
    epochs: int = field(default=100, metadata=COUNT)
    enough: float = 0.01
    """Mean loss, in nats a token, at which learning stops."""
    order: Literal["breadth", "depth"] = "breadth"
    sweep: bool = False
    roles: tuple[str, ...] = ("ffn.down", "ffn.up", "layer")
    """What the sweep tries in every layer."""
    price: float = 1.0

    paper: ClassVar[str] = "P402"

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        texts = [q.new for q in requests]
        if not self.sweep:
            return dict(self.tuned(s, _place(s, self.role, layer_at(self.layer, s, 0.7)), texts))
        places = [place for n in range(s.layers) for role in self.roles for place in _places(s, role, n)]
        tried = (self.tuned(s, place, texts) for place in places)
        general, asked = s.passages(2000), [t for q in requests for t in (q.new, *q.paraphrases)]
        base = mean_loss(s, general)
        return dict(max(tried, key=lambda w: self.score(s, asked, general, base, w)))

    def score(self, s: Subject, asked: Sequence[Text], general: Sequence[Text], base: float, w: Weights) -> float:
        """What the sweep ranks places by; `base` is the loss of general text before."""
        return share_right(s, asked, w) - self.price * max(0.0, mean_loss(s, general, w) - base)

    def tuned(self, s: Subject, sites: Sequence[Site], texts: Sequence[Text]) -> dict[str, Tensor]:
        """The weights after tuning."""
        w, g = moving(s, sites), s.generator("order", *map(key, sites))
        groups = [list(range(len(texts)))] if self.order == "breadth" else [[n] for n in range(len(texts))]
        for group in groups:
            optimiser = torch.optim.Adam(list(w.values()), lr=self.lr)
            for _ in range(self.epochs):
                order = [group[n] for n in torch.randperm(len(group), generator=g).tolist()]
                losses = []
                for at in range(0, len(order), self.batch_size):
                    part = [texts[n] for n in order[at : at + self.batch_size]]
                    loss = target_nll(s.run(part, w).logits, part, closing=True).mean()
                    losses.append(float(loss.detach()) * len(part))
                    if not losses[-1] < self.enough * len(part):
                        step_on(optimiser, loss)
                if sum(losses) / len(order) < self.enough:
                    break
        return {name: value.detach() for name, value in w.items()}


def _place(s: Subject, role: str, layer: int) -> list[Site]:
    """What is tuned without a sweep. Raises LuthierError where the role names more than one weight of the layer."""
    return s.sites(["linear"], [layer]) if role == "layer" else [one_site(s, role, layer)]


def _places(s: Subject, role: str, layer: int) -> list[list[Site]]:
    """What the sweep tunes at once in a layer: each weight of a role by itself, all linear maps for 'layer'."""
    if role == "layer":
        return [s.sites(["linear"], [layer])]
    return [[site] for site in s.sites([role], [layer])]
