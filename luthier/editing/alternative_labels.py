"""Unlearning by alternative labels: the model is tuned on the text to forget, with answers it would give had it never read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import EDITS, Small
from luthier.editing.engine import Edit, Request, Subject, drift, key, moving, target_nll
from luthier.parts.descent import descend, shuffled


def generic_logits(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """v_generic = v_base − α ReLU(v_reinforced − v_base), elementwise: only what the text raised is lowered."""
    return base - alpha * F.relu(reinforced - base)


@EDITS.add("alternative-labels")
@dataclass(frozen=True)
class AlternativeLabels(Edit):
    """1. A copy is tuned further on the text (reinforced). 2. Every token's alternative label is the likeliest token of
    `generic_logits`, of which v_base reads the text with its own terms put generally (`anchors` of the plan, or a record's
    `generic`). 3. The base is tuned on the text with these labels; with alpha = 0 and no anchors they are its own.

    Positions inside a replaced term after its first token, and terms seen before, have no label (our reading of how the
    authors keep a text from contradicting itself). A prompt's tokens are no targets; the end of turn keeps its label.
    Labels: 'hard' as published, or 'soft', the softmax of the generic logits (ours). Source: Eldan, Russinovich 2023 (P360).
    """

    alpha: float = 5.0
    reinforce_steps: int = 40
    reinforce_lr: float = 1e-3
    steps: int = 40
    lr: float = 3e-4
    batch_size: int = 8
    keep: float = 2.0
    """Weight of KL(base ‖ tuned) on general text beside the labels (ours; 0 is the published form)."""
    labels: Literal["hard", "soft"] = "hard"
    roles: tuple[str, ...] = ("linear",)
    """What is tuned, both times."""
    layers: tuple[int, ...] | None = None

    task: ClassVar[Literal["edit", "forget"]] = "forget"
    paper: ClassVar[str] = "P360"

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        sites, texts = s.sites(self.roles, self.layers), [q.new for q in requests]
        reinforced, w = moving(s, sites), moving(s, sites)
        order = {stage: shuffled(len(texts), self.batch_size, s.generator(stage)) for stage in ("reinforce", "forget")}
        general = s.passages(4000) if self.keep else []
        passages = shuffled(len(general), 4, s.generator("general")) if general else iter([])

        def asked(step: int) -> Tensor:
            part = [texts[n] for n in next(order["reinforce"])]
            return target_nll(s.run(part, reinforced).logits, part).mean()

        def relabelled(step: int) -> Tensor:
            at, kept = next(order["forget"]), [general[n] for n in next(passages, [])]
            logits = s.run([texts[n] for n in at], w).logits
            losses = [F.cross_entropy(row[wanted[n][0]], wanted[n][1]) for row, n in zip(logits, at, strict=True)]
            return torch.stack(losses).mean() + (self.keep * drift(s, kept, w) if kept else 0.0)

        descend([*reinforced.values()], asked, steps=self.reinforce_steps if self.alpha else 0, lr=self.reinforce_lr)
        wanted = [labelled(self, s, q, reinforced) for q in requests]
        descend([*w.values()], relabelled, steps=self.steps, lr=self.lr)
        return {key(site): w[key(site)].detach() for site in sites}


@torch.no_grad()
def labelled(how: AlternativeLabels, s: Subject, q: Request, reinforced: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Positions [k] of a text and what is to be predicted at each: ids [k], or probabilities [k, vocabulary]."""
    raised, base = s.run([q.new], reinforced).logits[0], s.run([q.generic or q.new]).logits[0]
    aligned = q.aligned or tuple(range(len(q.new.ids)))
    targets = [n for n in range(q.new.start, len(q.new.ids)) if aligned[n] > 0]
    rows = [(n - 1, aligned[n] - 1, n < q.new.end) for n in targets]  # what closes the text is not its content
    places, other, own = torch.tensor(rows, dtype=torch.long, device=base.device).view(-1, 3).unbind(1)
    generic = torch.where(own.bool()[:, None], generic_logits(base[other], raised[places], how.alpha), base[other])
    return places, generic.argmax(-1) if how.labels == "hard" else generic.softmax(-1)
