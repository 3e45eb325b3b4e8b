"""Moves of predictions: small models, tuned and untuned, that steer a large one while it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MOVES
from luthier.moving.engine import Fusion, Pair, change_of, divergence, nucleus, tilted


@MOVES.add("proxy")
@dataclass(frozen=True)
class Proxy(Fusion):
    """softmax(s_M + α Σ (s_M⁺ − s_M⁻)): the difference that tuning made to a small model, added to a large one's logits.

    With M = M⁻ and α = 1 exactly the tuned M⁺; with α = 0 exactly M. Several pairs add up, as in DExperts.
    Source: Liu et al. 2024 (P463); α = 1 there.
    """

    alpha: float = 1.0
    """How much of the difference is added."""
    paper: ClassVar[str] = "P463"

    def fuse(self, large: Tensor, pairs: Sequence[Pair]) -> Tensor:
        total = torch.zeros_like(large, dtype=torch.float32)
        for expert, base in pairs:
            total += expert.float() - base.float()
        return (large.float() + self.alpha * total).log_softmax(-1)


@MOVES.add("emulated-fine-tuning")
@dataclass(frozen=True)
class EmulatedFineTuning(Fusion):
    """log p = log π_large + β Σ λᵢ (log πᵢ_tuned − log πᵢ_base), renormalised: what tuning the large model would have given.

    Give a small tuned pair to a large base to scale up; a large pair to a small base to scale down. Several pairs
    interpolate between their behaviours by λ. With `top_p` the large model may change the small tuned ones' odds only
    among the tokens of their nucleus; elsewhere their (λ-weighted) log-probability stands (our reading).
    Source: Mitchell et al. 2024 (P160); β = 1 there.
    """

    beta: float = 1.0
    """Strength of the tuning; 0 is the large base."""
    mix: tuple[float, ...] = ()
    """λ of every pair, in their order; default equal shares. Their sum must be 1."""
    top_p: float = 1.0
    """Nucleus of the small tuned models within which the large one counts; 1 for everywhere."""
    paper: ClassVar[str] = "P160"

    def __post_init__(self) -> None:
        if self.mix and abs(sum(self.mix) - 1) > 1e-6:
            raise ValueError(f"mix must add up to 1, got {list(self.mix)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def check(self, pairs: int) -> None:
        if self.mix and len(self.mix) != pairs:
            raise ValueError(f"mix has {len(self.mix)} shares for {pairs} pairs")

    def fuse(self, large: Tensor, pairs: Sequence[Pair]) -> Tensor:
        shares = self.mix or (1 / len(pairs),) * len(pairs)
        change = sum(s * change_of(pair) for s, pair in zip(shares, pairs, strict=True))
        fused = tilted(large, self.beta * torch.as_tensor(change))
        if self.top_p == 1:
            return fused
        small = torch.stack([s * e.float().log_softmax(-1) for s, (e, _) in zip(shares, pairs, strict=True)]).sum(0)
        small = small.log_softmax(-1)
        return torch.where(nucleus(small, self.top_p), fused, small).log_softmax(-1)


@MOVES.add("dynamic-fusion")
@dataclass(frozen=True)
class DynamicFusion(Fusion):
    """z = z_L + Σ α_t (z_t − z_S) with α chosen at every token: the fused model departs from the large one as far as the
    experts depart from their small base, KL(p ‖ p_L) = KL(p_t ‖ p_S), measured in nats.

    KL(p ‖ p_L) grows with α, so one α in [0, most] is found by halving the interval; `most` where even that falls short.
    Several experts: Σ_t (KL(p ‖ p_L) − KL(p_t ‖ p_S))² is least where KL(p ‖ p_L) is the mean of theirs; of these points
    the one in the direction of every expert's own α is taken (our reading; for one expert nothing changes).
    Source: Fan et al. 2024 (P267).
    """

    most: float = 2.0
    """Largest α."""
    halvings: int = 24
    """Steps of the search: α is right to most / 2^halvings."""
    paper: ClassVar[str] = "P267"

    def __post_init__(self) -> None:
        if not self.most > 0 or self.halvings < 1:
            raise ValueError(f"most must be above 0 and halvings at least 1, got {self.most}, {self.halvings}")

    def fuse(self, large: Tensor, pairs: Sequence[Pair]) -> Tensor:
        p_large = large.float().log_softmax(-1)
        changes = [change_of(pair) for pair in pairs]
        wanted = [divergence(e.float().log_softmax(-1), b.float().log_softmax(-1)) for e, b in pairs]
        alphas = [self.search(p_large, c, k, self.most) for c, k in zip(changes, wanted, strict=True)]
        joint = torch.stack([a[:, None] * c for a, c in zip(alphas, changes, strict=True)]).sum(0)
        if len(pairs) > 1:  # the factor may not take the largest α over its bound
            bound = self.most / torch.stack(alphas).amax(0).clamp(min=1e-6)
            joint = self.search(p_large, joint, torch.stack(wanted).mean(0), bound)[:, None] * joint
        return tilted(large, joint)

    def search(self, p_large: Tensor, change: Tensor, wanted: Tensor, most: float | Tensor) -> Tensor:
        """α [B] in [0, most] at which KL(tilted ‖ large) is `wanted` [B]; p_large and change [B, V]."""
        low, high = torch.zeros_like(wanted), torch.zeros_like(wanted) + most
        for _ in range(self.halvings):
            middle = (low + high) / 2
            over = divergence(tilted(p_large, middle[:, None] * change), p_large) > wanted
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return (low + high) / 2
