"""Unlearning by alternative labels: the model is tuned on the text to forget, with answers it would give had it never read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import EDITS, Small
from luthier.editing.engine import COUNT, Edit, Request, Subject, drift, key, moving, target_nll
from luthier.parts.descent import descend, shuffled

FURTHEST = 64
"""By how much alpha grows at most for a text whose labels are its own tokens."""


def generic_logits(base: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """v_generic = v_base − α ReLU(v_reinforced − v_base), elementwise: only what the text raised is lowered."""
    return base - alpha * F.relu(reinforced - base)


def log_odds(logits: Tensor) -> Tensor:
    """log p / (1 − p) of every token, [..., vocabulary]: a logit less the log-sum-exp of all others."""
    lp, best = logits.log_softmax(-1), logits.argmax(-1, keepdim=True)
    odds = lp - torch.log1p(-lp.exp().clamp_max(0.5))  # no other than the likeliest is above a half
    rest = logits.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)  # 1 − p, where float32 has p = 1
    return odds.scatter(-1, best, logits.gather(-1, best) - rest)


@EDITS.add("alternative-labels")
@dataclass(frozen=True)
class AlternativeLabels(Edit):
    """1. A copy is tuned further on the text (reinforced). 2. Every token's alternative label is the likeliest token of
    `generic_logits`, of which v_base reads the text with its own terms put generally (`anchors` of the plan, or a record's
    `generic`). 3. The base is tuned on the text with these labels; with alpha = 0 and no anchors they are its own.

    Our reading: v are log-odds. A model's logits are its own but for a constant, and a base that is sure of a text loses in
    that constant what the token gains. A text whose labels are all its own tokens has alpha doubled until one is not.
    Positions inside a replaced term after its first token, and terms seen before, have no label (our reading of how the
    authors keep a text from contradicting itself). A prompt's tokens are no targets; the end of turn keeps its label.
    Labels: 'hard' as published, or 'soft', the probabilities of the generic log-odds (ours). Differs: three epochs of reinforcement
    at 3e-6 and two on the labels at 1e-6 there, for a book and 7 B. Source: Eldan, Russinovich 2023 (P360).
    """

    alpha: float = 5.0
    reinforce_steps: int = 100
    reinforce_lr: float = 3e-4
    steps: int = 80
    """On the labels. They are met after a few; the rest take back what that moved of general text."""
    lr: float = 1e-4
    batch_size: int = field(default=8, metadata=COUNT)
    keep: float = 2.0
    """Weight of KL(base ‖ tuned) beside the labels, on general text and on what the base says from inside the texts'
    prompts, their own targets left out (ours; 0 is the published form)."""
    labels: Literal["hard", "soft"] = "hard"
    roles: tuple[str, ...] = ("linear",)
    """What is tuned, both times."""
    layers: tuple[int, ...] | None = None

    task: ClassVar[Literal["edit", "forget"]] = "forget"
    paper: ClassVar[str] = "P360"

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        sites, texts = s.sites(self.roles, self.layers), [q.new for q in requests]
        reinforced, w = moving(s, sites), moving(s, sites)
        order = {stage: shuffled(len(texts), self.batch_size, s.generator(stage)) for stage in ("reinforce", "forget")}
        general = s.passages(4000) if self.keep else []
        near = s.near(texts, 256) if self.keep else []
        rest = [
            (part, shuffled(len(part), size, s.generator("rest", size)))
            for part, size in ((general, 4), (near, 8))
            if part
        ]

        def asked(step: int) -> Tensor:
            part = [texts[n] for n in next(order["reinforce"])]
            return target_nll(s.run(part, reinforced).logits, part).mean()

        def relabelled(step: int) -> Tensor:
            at = next(order["forget"])
            logits = s.run([texts[n] for n in at], w).logits
            losses = [F.cross_entropy(row[wanted[n][0]], wanted[n][1]) for row, n in zip(logits, at, strict=True)]
            kept = [drift(s, [part[n] for n in next(numbers)], w) for part, numbers in rest]
            return torch.stack(losses).mean() + self.keep * sum(kept)

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
    told = torch.tensor([q.new.ids[n] for n in targets], device=base.device)
    was, now, alpha = log_odds(base[other]), log_odds(raised[places]), how.alpha
    while True:
        generic = torch.where(own.bool()[:, None], generic_logits(was, now, alpha), was)
        if not 0 < alpha < how.alpha * FURTHEST or not torch.equal(generic.argmax(-1), told):
            return places, generic.argmax(-1) if how.labels == "hard" else F.normalize(generic.sigmoid(), p=1, dim=-1)
        alpha *= 2
