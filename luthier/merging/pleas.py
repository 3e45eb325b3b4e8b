"""Models of different starts merged unit by unit: units matched, some kept apart, weights solved for (PLeaS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError
from luthier.parts.assignment import assign
from luthier.parts.units import Blocks


@MERGES.add("pleas")
@dataclass(frozen=True)
class PLeaS(Merge):
    """B's units are matched to A's by their features on text, the best matched merged, the rest of both kept; then every
    linear map is the least-squares one from the merged features of its inputs to those of its outputs.

    Merged features are the mean of a pair's two, and a lone unit's own, of A and B as they are: layers are solved one by
    one. What A has alone never reads what B has alone. What is no linear map (norms, biases) is the mean. Our reading:
    `ridge` draws to the average, where the authors descend from it. Source: Nasery et al. 2024 (P111), as their code has it.
    """

    keep: float = 1.0
    """Share of a feed-forward layer's units that is merged: of n units n (2 − keep) are left."""
    ridge: float = 0.01
    """In units of the mean squared input; the larger, the nearer to the average."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    each: ClassVar[Mapping[str, float | None]] = {}
    units: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True
    paper: ClassVar[str] = "P111"

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1 or not self.ridge > 0:
            raise ValueError(f"keep must lie in [0, 1] and ridge above 0, got {self.keep} and {self.ridge}")

    def match(self, similarity: Tensor) -> Blocks:
        """Blocks of two layers' units by their features' inner products [n, n]: the largest sum over pairs. Widths must agree."""
        if similarity.shape[0] != similarity.shape[1]:
            raise LuthierError(
                f"pleas: {similarity.shape[0]} and {similarity.shape[1]} units: only layers of equal widths are matched"
            )
        other = assign(similarity)
        score = similarity[torch.arange(len(other)), other]
        apart = torch.ones(len(other), dtype=torch.bool)
        apart[score.argsort(descending=True)[: round(self.keep * len(other))]] = False
        return Blocks((~apart).nonzero()[:, 0], other[~apart], apart.nonzero()[:, 0], other[apart])

    def solve(self, gram: Tensor, cross: Tensor, start: Tensor, out: Blocks, into: Blocks) -> Tensor:
        """The weight of least squares: gram = ZᵀZ [into.width]² and cross = YᵀZ [out.width, into.width] of the joined
        inputs Z and outputs Y, in float64; start: the average, to which `ridge` draws."""
        result = start.double().clone()
        pull = self.ridge * float(gram.diagonal().mean())
        if not pull:
            return result.to(start.dtype)
        everything = torch.ones(into.width, dtype=torch.bool)
        for k, rows in enumerate(out.parts()):
            reads = everything.clone()
            if k:
                reads[into.parts()[3 - k]] = False
            if rows.stop > rows.start and bool(reads.any()):
                left = gram[reads][:, reads] + pull * torch.eye(int(reads.sum()), dtype=torch.float64)
                right = cross[rows][:, reads] + pull * result[rows][:, reads]
                solved = torch.linalg.solve(left, right.T).T
                result[rows] = result[rows].masked_scatter(reads.expand(len(solved), -1), solved)
        return result.to(start.dtype)

    def merge(self, t: Stack) -> Tensor:
        return (t.tensors[0] + t.tensors[1]) / 2
