"""Preferences: the better of two answers to one prompt becomes the likelier one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.delta import OBJECTIVES


@OBJECTIVES.add("dpo")
@dataclass(frozen=True)
class DPO:
    """L = −log σ(β [log p(y⁺)/p₀(y⁺) − log p(y⁻)/p₀(y⁻)]) per pair, log p(y) the sum over an answer's supervised tokens.

    p₀ is the reference: the base as the run met it, without what trains. ln 2 at step 0. Source: Rafailov et al. 2023.
    """

    beta: float = 0.1
    """β: how dear it is to leave the reference."""
    smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round (conservative DPO)."""
    needs: ClassVar[tuple[str, ...]] = ("answers", "reference")
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    rows: ClassVar[str] = "pair"

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.smoothing < 0.5:
            raise ValueError(
                f"beta must be above 0 and smoothing in [0, 0.5), got beta {self.beta} and smoothing {self.smoothing}"
            )

    def __call__(self, v: Any) -> tuple[Tensor, Tensor]:
        better, worse = (v.answers.logprobs - v.reference.answers.logprobs).chunk(2)
        margin = self.beta * (better - worse)
        loss = -(1 - self.smoothing) * logsigmoid(margin) - self.smoothing * logsigmoid(-margin)
        weights = v.answers.weights.chunk(2)[0]
        return (weights * loss).sum(), weights.sum()


@OBJECTIVES.add("orpo")
@dataclass(frozen=True)
class ORPO:
    """L = −log p̄(y⁺) − λ log σ(log odds(y⁺) − log odds(y⁻)) per pair, with log p̄ the mean over an answer's tokens and
    odds = p̄ / (1 − p̄). No reference. Source: Hong et al. 2024.
    """

    weight: float = 0.1
    """λ of the odds-ratio term."""
    needs: ClassVar[tuple[str, ...]] = ("answers",)
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    rows: ClassVar[str] = "pair"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be below 0, got {self.weight}")

    def __call__(self, v: Any) -> tuple[Tensor, Tensor]:
        mean = v.answers.logprobs / v.answers.tokens.clamp(min=1)
        better, worse = (mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6)))).chunk(2)
        weights = v.answers.weights.chunk(2)[0]
        loss = -mean.chunk(2)[0] - self.weight * logsigmoid(better - worse)
        return (weights * loss).sum(), weights.sum()
