"""Interpolation along an arc by two weights, of models or of changes, as a whole or by rows or columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.parts.trims import spans, wide

NOTHING = 1e-6
"""Weights whose sum is below this cancel."""


@MERGES.add("nuslerp")
@dataclass(frozen=True)
class NuSLERP(Merge):
    """SLERP of two models at t = w₂ / (w₁ + w₂) (0.5 where the weights cancel); with a base, of their changes.

    The angle is that of the whole tensors, or of every vector along the last axis (`nuslerp_flatten: false`), or along
    the first (`nuslerp_row_wise` too). Parallel and opposed vectors are interpolated linearly. Source: mergekit.
    """

    nuslerp_row_wise: bool = False
    """Without flattening: vectors run along the first axis instead of the last."""
    nuslerp_flatten: bool = True
    """One angle for the whole tensor."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    ordered: ClassVar[bool] = True

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        weights = list(each["weight"])
        if abs(sum(weights)) >= NOTHING:
            return ""
        return (
            f"the weights {weights} cancel, so that t is 0.5 whatever they are: state weights that do not add up to 0"
        )

    def merge(self, t: Stack) -> Tensor:
        first, second = t.each["weight"]
        share = 0.5 if abs(first + second) < NOTHING else second / (first + second)
        if not t.tensors[0].numel():
            return t.tensors[0].clone()
        x, y = (v if t.base is None else v - t.base for v in t.tensors)
        if self.nuslerp_flatten:
            out = _arc(x.reshape(-1), y.reshape(-1), share).view(x.shape)
        elif self.nuslerp_row_wise:
            out = _arc(x.transpose(0, -1), y.transpose(0, -1), share).transpose(0, -1)
        else:
            out = _arc(x, y, share)
        return out.contiguous() if t.base is None else t.base + out


def _arc(x: Tensor, y: Tensor, share: float) -> Tensor:
    """From x to y [..., n] along the arc of every vector of the last axis; overwrites neither."""
    kind = wide(x.dtype)
    norms = [v.norm(dim=-1, keepdim=True).clamp(min=1e-7) for v in (x, y)]
    dot = torch.zeros(x.shape[:-1], dtype=kind)
    for a, b in spans(
        x.shape[-1] if x.dim() == 1 else x.shape[0], 1 << 20 if x.dim() == 1 else max(1, (1 << 20) // x[0].numel())
    ):
        pair = (
            (x[a:b] / norms[0], y[a:b] / norms[1]) if x.dim() == 1 else (x[a:b] / norms[0][a:b], y[a:b] / norms[1][a:b])
        )
        product = (pair[0].mul_(pair[1])).sum(-1, dtype=kind)
        if x.dim() == 1:
            dot += product
        else:
            dot[a:b] = product
    cosine = dot.to(x.dtype).unsqueeze(-1).clamp(-1, 1)
    straight = (1 - cosine.square()) <= 1e-16
    angle = torch.acos(torch.where(straight, 0, cosine))
    arc = (torch.sin((1 - share) * angle) * x).add_(torch.sin(share * angle) * y).div_(torch.sin(angle))
    return torch.where(straight, (1 - share) * x + share * y, arc) if bool(straight.any()) else arc
