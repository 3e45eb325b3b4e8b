"""What moving is: of weights (the same change on another base) and of predictions (small models that steer a large one)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Logits [B, V] of a tuned small model (the expert) and of the same model before its tuning (its base)."""


@dataclass(frozen=True)
class Transport:
    """Base of all moves of weights: W' = W_new + scale · (W_tuned − W_old), tensor by tensor; rows of settings over it.

    What is preserved is the additive change. A form whose change does not depend on the base's values keeps its numbers
    bit for bit; one that does (exact bit differences, DoRA's m, the factors of (IA)³) is written anew as exact
    differences on the new base, right to one rounding of the type that the base is held in.
    """

    scale: float = 1.0
    """Factor on the change."""
    keep: Literal["change", "numbers"] = "change"
    """What stays the same where a form reads the base: the additive change, or the form's own numbers (then the form and
    its size stay, and the change follows the new base's weights)."""

    kind: ClassVar[Literal["weights", "logits"]] = "weights"
    whole: ClassVar[bool] = False
    """Whether every piece must be a change of weights; else others (adapters, prefixes) are carried as they are."""
    connectivity: ClassVar[bool] = False
    """Whether the loss between the two bases is looked at, unless the plan says otherwise."""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")

    def carry(self, new: Tensor, change: Tensor) -> Tensor:
        """The tuned tensor on the new base, of new's shape, in float32."""
        return new.float() + self.scale * change.float()


@dataclass(frozen=True)
class Fusion:
    """Base of all moves of predictions: a pure function of the members' logits for the same text.

    `large` is the model that is steered; each pair is (expert, base): a small tuned model and the same before its
    tuning. All share one vocabulary. Nothing of the large model but its predictions is used.
    """

    kind: ClassVar[Literal["weights", "logits"]] = "logits"
    paper: ClassVar[str] = ""

    def check(self, pairs: int) -> None:
        """Raises ValueError where the settings do not fit that many pairs."""

    def fuse(self, large: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """Log-probabilities [B, V] in float32 from logits [B, V] of every member. Nothing handed in is written to."""
        raise NotImplementedError(f"{type(self).__name__} has no fuse")


def change_of(pair: Pair) -> Tensor:
    """log π_expert − log π_base [B, V] in float32: what the small model's tuning did to each next token."""
    expert, base = pair
    return expert.float().log_softmax(-1) - base.float().log_softmax(-1)


def tilted(large: Tensor, change: Tensor) -> Tensor:
    """log softmax(log π_large + change) [B, V]."""
    return (large.float().log_softmax(-1) + change).log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) [B] of log-probabilities [B, V], in nats; never below 0."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Mask [B, V] of the smallest set of tokens that holds `top_p` of the probability; always the likeliest one."""
    ranked, order = logits.float().softmax(-1).sort(-1, descending=True)
    inside = ranked.cumsum(-1) - ranked < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)
