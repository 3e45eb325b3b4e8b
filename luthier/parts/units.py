"""Units of two models and the merged one's: which are pairs, which one model has alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How the units of two models become those of the merged one: first the merged pairs, then A's alone, then B's."""

    pair_a: Tensor
    pair_b: Tensor
    alone_a: Tensor
    alone_b: Tensor

    @property
    def width(self) -> int:
        """Units of the merged layer."""
        return len(self.pair_a) + len(self.alone_a) + len(self.alone_b)

    def parts(self) -> tuple[slice, slice, slice]:
        """Where the pairs, A's alone and B's alone lie among them."""
        n, m = len(self.pair_a), len(self.pair_a) + len(self.alone_a)
        return slice(0, n), slice(n, m), slice(m, self.width)

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """Features [samples, n] of both models, of the same samples, at the merged units: a pair's mean, the others' own."""
        return torch.cat([(a[:, self.pair_a] + b[:, self.pair_b]) / 2, a[:, self.alone_a], b[:, self.alone_b]], 1)


def permuted(order: Tensor) -> Blocks:
    """All units merged, A's unit i with B's unit order[i]."""
    none = torch.arange(0)
    return Blocks(torch.arange(len(order)), order, none, none)


def shared(n: int) -> Blocks:
    """Units that are the same in both models: inputs of the first layer, outputs of the last."""
    return permuted(torch.arange(n))


def averaged(a: Tensor, b: Tensor, out: Blocks, into: Blocks) -> Tensor:
    """The merged weight [out.width, into.width] of two weights: rows of pairs averaged, those of lone units as they are.

    What A has alone and what B has alone never meet.
    """
    wide = a.new_zeros(out.width, into.width)
    rows, columns = out.parts(), into.parts()
    sides = (
        (1, a, (out.pair_a, out.alone_a), (into.pair_a, into.alone_a)),
        (2, b, (out.pair_b, out.alone_b), (into.pair_b, into.alone_b)),
    )
    for own, weight, units, reads in sides:
        for i, mine in ((0, units[0]), (own, units[1])):
            wide[rows[i], columns[0]] += weight[mine][:, reads[0]]
            wide[rows[i], columns[own]] += weight[mine][:, reads[1]]
    wide[rows[0]] /= 2
    return wide
