"""Supervised fine-tuning: cross-entropy of the supervised tokens, of the class, or of the target sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from luthier.delta import OBJECTIVES


@OBJECTIVES.add("sft")
@dataclass(frozen=True)
class SFT:
    """L = −Σ wₜ log p(xₜ | x₍<ₜ₎) over supervised tokens, per unit of weight Σ wₜ.

    `v.logprobs` [N] and `v.weights` [N] are those of the tokens with a weight above zero; the same for decoder-only
    bases and for the decoder of a sequence-to-sequence base.
    """

    smoothing: float = 0.0
    """ε of label smoothing: that share of the target is spread evenly over the vocabulary."""
    needs: ClassVar[tuple[str, ...]] = ("logprobs",)
    kinds: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")

    def __call__(self, v: Any) -> tuple[Tensor, Tensor]:
        loss = -v.logprobs
        if self.smoothing:
            even = -v.logits.float().log_softmax(-1).mean(-1)
            loss = (1 - self.smoothing) * loss + self.smoothing * even
        return (v.weights * loss).sum(), v.weights.sum()


@OBJECTIVES.add("classification")
@dataclass(frozen=True)
class Classification:
    """L = −Σ log p(label | x) over the records, per record; for bases of kind: classify."""

    smoothing: float = 0.0
    """ε of label smoothing."""
    needs: ClassVar[tuple[str, ...]] = ("class_logits",)
    kinds: ClassVar[tuple[str, ...]] = ("classify",)
    __post_init__ = SFT.__post_init__

    def __call__(self, v: Any) -> tuple[Tensor, Tensor]:
        weights = v.record_weights
        loss = F.cross_entropy(v.class_logits.float(), v.labels, reduction="none", label_smoothing=self.smoothing)
        return (weights * loss).sum(), weights.sum()
