"""Low-rank experts merged factor by factor, without calibration and without a singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.merging.engine import share, weighted_sum
from luthier.parts.trims import band


@MERGES.add("robust_merge")
@dataclass(frozen=True)
class RobustMerge(Merge):
    """A = Σ wₜ trim(Aₜ), B = Σ wₜ trim(Bₜ) diag(sₜ) / Σ sₜ over the experts t, each change being Bₜ Aₜ.

    trim keeps the largest `keep` of a matrix by magnitude. sₜ has one number a rank: the absolute sum of its row of Aₜ
    over that of trim(Aₜ) (1 for a row trimmed away: our reading), with those below the value at rank
    (1 − `compensate`) · r raised to it: the cheap stand-in for evening out singular values. Weights are 2 in the
    paper. At sites without a low-rank change the models are averaged. Source: Zeng et al. 2025 (P116; later called RobustMerge).
    """

    keep: float = 0.2
    """Share of each factor's entries that stays."""
    compensate: float = 0.2
    """Share of the ranks whose scale is left as it is."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    each: ClassVar[Mapping[str, float | None]] = {"weight": 2.0}
    factors: ClassVar[bool] = True
    paper: ClassVar[str] = "P116"

    def trim(self, x: Tensor, name: str = "") -> Tensor:
        """x with all but its largest entries set to 0."""
        flat, n = x.reshape(-1), x.numel()
        k = int(share(name, self.keep, "keep") * n)
        if not k:
            return torch.zeros_like(x)
        thin = band(lambda a, b: flat[a:b], n, n - k, n, lambda w: torch.argsort(w, descending=True)[:k])
        out = flat.clone()
        return thin.apply(0, out).view(x.shape)

    def scale(self, a: Tensor, trimmed: Tensor) -> Tensor:
        """s [r] of one expert."""
        left = trimmed.abs().sum(1)
        s = torch.where(left > 0, a.abs().sum(1) / left.clamp(min=1e-12), 1.0)
        floor = s.sort().values[min(len(s) - 1, int((1 - self.compensate) * len(s)))]
        return s.clamp(min=float(floor))

    def merge_factors(self, pairs: Sequence[tuple[Tensor, Tensor]], t: Stack) -> tuple[Tensor, Tensor]:
        trimmed = [self.trim(a, t.name) for a, _ in pairs]
        scales = [self.scale(a, cut) for (a, _), cut in zip(pairs, trimmed, strict=True)]
        total = torch.stack(scales).sum(0)
        weights = t.each["weight"]
        merged = sum(w * cut for w, cut in zip(weights, trimmed, strict=True))
        outer = sum(w * self.trim(b, t.name) * s for w, (_, b), s in zip(weights, pairs, scales, strict=True))
        return torch.as_tensor(merged), torch.as_tensor(outer) / total

    def merge(self, t: Stack) -> Tensor:
        return weighted_sum(t, True)
