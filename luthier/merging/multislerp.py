"""Interpolation of any number of models on a sphere, about their mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError
from luthier.merging.engine import divisor, length
from luthier.parts.trims import spans, wide


@MERGES.add("multislerp")
@dataclass(frozen=True)
class MultiSLERP(Merge):
    """The models (or, with a base, their changes) as directions: averaged in the tangent space at their weighted mean.

    The direction goes back to the sphere by the exponential map and takes the weighted mean of the norms. Models must
    not cancel out; two that do are interpolated linearly. A tensor that no model changed stays. Source: Goddard, mergekit.
    """

    normalize_weights: bool = True
    """Weights are made to sum to 1."""
    eps: float = 1e-8

    base: ClassVar[Literal["needed", "optional", "unused"]] = "optional"

    def merge(self, t: Stack) -> Tensor:
        flat = [x.reshape(-1) for x in t.tensors]
        n, kind, dtype = flat[0].numel(), wide(flat[0].dtype), flat[0].dtype
        if len(flat) == 1 or not n:
            return t.tensors[0].clone()
        origin = t.base.reshape(-1) if t.base is not None else None
        weights = torch.tensor(t.each["weight"], dtype=dtype)
        if self.normalize_weights:
            weights = weights / divisor(t, weights, "normalize_weights")
        changes = [partial(_change, x, origin) for x in flat]
        norms = torch.stack([length(change, n, dtype) for change in changes])
        if not norms.any():  # nobody changed this tensor
            return (t.tensors[0] if t.base is None else t.base).clone()
        sizes = torch.where(norms > 0, norms, 1) + self.eps

        def units(a: int, b: int) -> list[Tensor]:
            return [change(a, b) / size for change, size in zip(changes, sizes, strict=True)]

        reach = length(lambda a, b: _mixed(units(a, b), weights), n, dtype)
        if reach < self.eps and len(flat) > 2:
            raise LuthierError(f"multislerp: the models cancel out at {t.name}: use other weights")
        out = t.blank().view(-1)
        if reach < self.eps:
            for a, b in spans(n):
                out[a:b] = changes[0](a, b) * weights[0] + changes[1](a, b) * weights[1]
        else:
            along = torch.zeros(len(flat), dtype=kind)
            for a, b in spans(n):
                parts = units(a, b)
                mean = _mixed(parts, weights) / reach
                along += torch.stack([(u * mean).sum(dtype=kind) for u in parts])
            dots = along.to(dtype)

            def tangent(a: int, b: int) -> tuple[Tensor, Tensor]:
                parts = units(a, b)
                mean = _mixed(parts, weights) / reach
                return mean, _mixed([u - dot * mean for u, dot in zip(parts, dots, strict=True)], weights)

            angle = length(lambda a, b: tangent(a, b)[1], n, dtype) + self.eps
            size = (norms * weights).sum()
            away = angle.sin() / angle if angle > 0 else 1.0  # eps may be nothing in float16
            for a, b in spans(n):
                mean, aside = tangent(a, b)
                out[a:b] = (mean * angle.cos() + aside * away) * size
        if origin is not None:
            out += origin
        return out.view(t.tensors[0].shape)


def _change(x: Tensor, origin: Tensor | None, a: int, b: int) -> Tensor:
    return x[a:b] if origin is None else x[a:b] - origin[a:b]


def _mixed(parts: list[Tensor], weights: Tensor) -> Tensor:
    return torch.stack([p * w for p, w in zip(parts, weights, strict=True)]).sum(0)
