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
from luthier.parts.descent import shuffled, step_on


def generic_logits(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """v_generic = v_base − α ReLU(v_reinforced − v_base), elementwise: only what the text raised is lowered."""
    return base - alpha * F.relu(reinforced - base)


@EDITS.add("alternative-labels")
@dataclass(frozen=True)
class AlternativeLabels(Edit):
    """1. A copy is tuned further on the text (reinforced). 2. Every token's alternative label is the likeliest token of
    v_base − α ReLU(v_reinforced − v_base), where v_base reads the text with its own terms put generally (`anchors` of
    the plan, or a record's `generic`) and v_reinforced the text itself. 3. The base is tuned on the text with these
    labels. With alpha = 0 and no anchors the labels are the base's own predictions.

    Positions inside a replaced term after its first token, and terms seen before, have no label (our reading of how
    the authors keep a text from contradicting itself). A prompt's tokens are not targets; the end of turn keeps its label. Labels: 'hard' as published,
    or 'soft', the softmax of the generic logits (ours). Source: Eldan and Russinovich 2023 (P360).
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
        optimiser = torch.optim.Adam(list(reinforced.values()), lr=self.reinforce_lr)
        order = shuffled(len(texts), self.batch_size, s.generator("reinforce"))
        for _ in range(self.reinforce_steps if self.alpha else 0):
            part = [texts[n] for n in next(order)]
            step_on(optimiser, target_nll(s.run(part, reinforced).logits, part).mean())
        wanted = [self.labelled(s, q, reinforced) for q in requests]
        optimiser = torch.optim.Adam(list(w.values()), lr=self.lr)
        order = shuffled(len(texts), self.batch_size, s.generator("forget"))
        general = s.passages(4000) if self.keep else []
        passages = shuffled(len(general), 4, s.generator("general")) if general else iter([])
        for _ in range(self.steps):
            at, kept = next(order), [general[n] for n in next(passages, [])]
            logits = s.run([texts[n] for n in at], w).logits
            losses = [F.cross_entropy(logits[row, wanted[n][0]], wanted[n][1]) for row, n in enumerate(at)]
            loss = torch.stack(losses).mean()
            step_on(optimiser, loss + self.keep * drift(s, kept, w) if kept else loss)
        return {key(site): w[key(site)].detach() for site in sites}

    @torch.no_grad()
    def labelled(self, s: Subject, q: Request, reinforced: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions [k] of a text and what is to be predicted at each: ids [k], or probabilities [k, vocabulary]."""
        raised = s.run([q.new], reinforced).logits[0]
        base = s.run([q.generic or q.new]).logits[0]
        aligned = q.aligned or tuple(range(len(q.new.ids)))
        targets = [n for n in range(q.new.start, len(q.new.ids)) if aligned[n] > 0]
        places = torch.tensor([n - 1 for n in targets], device=base.device)
        other = torch.tensor([aligned[n] - 1 for n in targets], device=base.device)
        # what closes the text is not its content
        own = torch.tensor([n < q.new.end for n in targets], device=base.device)
        generic = torch.where(own[:, None], generic_logits(base[other], raised[places], self.alpha), base[other])
        return places, generic.argmax(-1) if self.labels == "hard" else generic.softmax(-1)
