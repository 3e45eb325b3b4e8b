"""The mean of models on a sphere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.parts.trims import spans, wide


@MERGES.add("karcher")
@dataclass(frozen=True)
class Karcher(Merge):
    """The direction with the least mean squared angle to the models' directions, by the mean of the norms.

    Riemannian steps from the normalised mean: along the average of the models as the tangent space sees them, until it
    is shorter than `tol` or after `max_iter`. In mergekit's files a base counts as one of the models, elsewhere only
    where it is among them. Source: Karcher 1977; mergekit.
    """

    max_iter: int = 10
    tol: float = 1e-5

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    each: ClassVar[Mapping[str, float | None]] = {}

    def __post_init__(self) -> None:
        if self.max_iter < 1 or not self.tol >= 0:
            raise ValueError(f"max_iter must be at least 1 and tol at least 0, got {self.max_iter} and {self.tol}")

    def merge(self, t: Stack) -> Tensor:
        flat = [x.reshape(-1) for x in t.tensors]
        n, kind, dtype = flat[0].numel(), wide(flat[0].dtype), flat[0].dtype
        if len(flat) == 1 or not n:
            return t.tensors[0].clone()
        norms = [torch.linalg.vector_norm(x, dtype=kind) for x in flat]
        valid = [(x, norm) for x, norm in zip(flat, norms, strict=True) if float(norm) > self.tol]
        if not valid:
            return torch.zeros_like(t.tensors[0])
        share = 1 / len(flat) / sum([1 / len(flat)] * len(valid))

        def unit(k: int, a: int = 0, b: int = n) -> Tensor:
            x, norm = valid[k]
            return (x[a:b] / norm).to(dtype)

        mean = torch.zeros(n, dtype=dtype)
        for a, b in spans(n):
            for k in range(len(valid)):
                mean[a:b] += share * unit(k, a, b)
        length = torch.linalg.vector_norm(mean, dtype=kind)
        mean = unit(0) if float(length) < self.tol else (mean / length).to(dtype)
        for _ in range(self.max_iter):
            tangent = torch.zeros_like(mean)
            for k in range(len(valid)):
                dot = torch.clamp(torch.dot(mean, unit(k)), -1.0, 1.0)
                angle = torch.arccos(dot)
                if float(angle) >= self.tol:
                    factor = share * (angle / angle.sin())
                    for a, b in spans(n):
                        tangent[a:b] += factor * (unit(k, a, b) - dot * mean[a:b])
            step = torch.linalg.vector_norm(tangent, dtype=kind)
            if float(step) < self.tol:
                break
            for a, b in spans(n):
                mean[a:b] = step.cos() * mean[a:b] + step.sin() * (tangent[a:b] / step)
            length = torch.linalg.vector_norm(mean, dtype=kind)
            if float(length) > self.tol:
                mean.div_(length)
        scale = sum((1 / len(flat)) * norm for norm in norms)
        return (scale * mean).to(dtype).view(t.tensors[0].shape)
