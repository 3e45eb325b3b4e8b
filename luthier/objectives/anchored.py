"""Anchored fine-tuning: what is told, and how far the answers may go from the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from luthier.delta import OBJECTIVES


@OBJECTIVES.add("anchored")
@dataclass(frozen=True)
class Anchored:
    """L = Σ wₜ (−log p(xₜ) + λ dₜ) / Σ wₜ over supervised tokens, dₜ the distance of the outputs from the reference's.

    `kl`: KL(p₀ ‖ p) over the vocabulary. `mse`: mean of (z − z₀)² over the logits, which holds their level too. The
    reference is the base as the run met it, its earlier deltas on and those that train off. Source: the consistency
    loss of Ma et al. 2024 (P403), mean squares with λ = 1; our reading: at supervised tokens.
    """

    weight: float = 1.0
    """λ."""
    distance: Literal["kl", "mse"] = "kl"
    """How outputs are compared."""
    needs: ClassVar[tuple[str, ...]] = ("logprobs", "logits", "reference")
    kinds: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be below 0, got {self.weight}")

    def __call__(self, v: Any) -> tuple[Tensor, Tensor]:
        now, then = v.logits.float(), v.reference.logits.float()
        if self.distance == "mse":
            apart = (now - then).square().mean(-1)
        else:
            before = then.log_softmax(-1)
            apart = (before.exp() * (before - now.log_softmax(-1))).sum(-1)
        return (v.weights * (self.weight * apart - v.logprobs)).sum(), v.weights.sum()
