"""Weighted sums of the models themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError
from luthier.parts.trims import spans, wide


@MERGES.add("linear")
@dataclass(frozen=True)
class Linear(Merge):
    """W = Σ wᵢ Wᵢ, divided by Σ wᵢ unless `normalize` is off, summed in float32 (float64 stays).

    With equal weights the uniform soup (Wortsman et al. 2022, P080), and the average of nodes that never spoke to each
    other (lo-fi, P412).
    """

    normalize: bool = True
    """Divide by the sum of the weights."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    pointwise: ClassVar[bool] = True
    paper: ClassVar[str] = "P080"

    def merge(self, t: Stack) -> Tensor:
        models = [x.reshape(-1) for x in t.tensors]
        kind = wide(models[0].dtype)
        weights = torch.tensor(t.each["weight"], dtype=kind)
        total = weights.sum()
        if self.normalize and total == 0:
            raise LuthierError(
                f"linear: the weights {t.each['weight']} add up to 0 at {t.name}: change one, or set normalize: false"
            )
        out = torch.empty_like(models[0], memory_format=torch.contiguous_format)
        for a, b in spans(out.numel()):
            piece = torch.zeros(b - a, dtype=kind)
            for x, weight in zip(models, weights, strict=True):
                piece.addcmul_(x[a:b].to(kind), weight)
            out[a:b] = piece.div_(total) if self.normalize else piece
        return out.view(t.tensors[0].shape)
