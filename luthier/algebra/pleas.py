"""Models of different bases merged layer by layer: units matched, some kept apart, weights solved for (PLeaS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.parts.assignment import assign

# Functions of one layer, for whoever walks a model: the layers of a chain are matched one after the other, a layer's
# output units being the next one's input units. Source: Nasery et al. 2024 (P111).


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


def shared(n: int) -> Blocks:
    """Units that are the same in both models: inputs of the first layer, outputs of the last."""
    every, none = torch.arange(n), torch.arange(0)
    return Blocks(every, every, none, none)


def match(a: Tensor, b: Tensor, keep: float = 1.0) -> Blocks:
    """Blocks of two layers' units by their features [samples, n] (or weights, transposed).

    B's units are assigned to A's so that the sum of the inner products of their features is largest; the best matched
    share `keep` is merged and the rest of both stays: n + (1 − keep) n units in all. Errors: LuthierError for unequal
    widths or a share out of range.
    """
    if a.shape[1] != b.shape[1] or not 0 <= keep <= 1:
        raise LuthierError(f"pleas: {a.shape[1]} and {b.shape[1]} units, keep {keep}: match equal widths, keep 0 to 1")
    similarity = a.double().T @ b.double()
    other = assign(similarity)
    score = similarity[torch.arange(len(other)), other]
    best = score.argsort(descending=True)[: round(keep * len(other))].sort().values
    apart = torch.ones(len(other), dtype=torch.bool)
    apart[best] = False
    rest = apart.nonzero()[:, 0]
    return Blocks(best, other[best], rest, other[rest])


def placed(x: Tensor, blocks: Blocks, which: str) -> Tensor:
    """Features [samples, n] of model 'a' or 'b' at the merged layer's units, 0 where the unit is the other model's."""
    pair, alone = (blocks.pair_a, blocks.alone_a) if which == "a" else (blocks.pair_b, blocks.alone_b)
    before, after = (0, len(blocks.alone_b)) if which == "a" else (len(blocks.alone_a), 0)
    empty = x.new_zeros(x.shape[0], before), x.new_zeros(x.shape[0], after)
    return torch.cat([x[:, pair], empty[0], x[:, alone], empty[1]], 1)


def average(a: Tensor, b: Tensor, out: Blocks, into: Blocks) -> Tensor:
    """The merged weight [out.width, into.width] without data: pairs averaged, units kept apart as they are.

    A unit of one model that reads or feeds a pair keeps its weight; A's alone and B's alone never meet.
    """
    wide_a, wide_b = (placed(placed(w, into, which).T, out, which).T for w, which in ((a, "a"), (b, "b")))
    pairs = torch.zeros(out.width, into.width, dtype=torch.bool)
    pairs[: len(out.pair_a), : len(into.pair_a)] = True
    return torch.where(pairs, (wide_a + wide_b) / 2, wide_a + wide_b)


def solve(
    features: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    out: Blocks,
    into: Blocks,
    start: Tensor,
    ridge: float = 1e-6,
) -> Tensor:
    """The weight W [out.width, into.width] for which the merged layer best gives both models' outputs on their inputs.

    features, targets: inputs [samples, in] and outputs [samples, out] of A's layer and of B's. For each model's samples
    W reads that model's inputs at the merged units and is held to its outputs there; ridge draws W to `start`
    (`average`), in units of the mean squared input. So where samples leave W open it is the average.
    """
    owns = {"a": _owned(out, "a"), "b": _owned(out, "b")}
    rows = {}
    for x, y, which in zip(features, targets, "ab", strict=True):
        reads, wants = placed(x, into, which).double(), placed(y, out, which).double()
        rows[which] = (reads.T @ reads, wants.T @ reads)
    result = start.double().clone()
    for members in {tuple(v.tolist()) for v in (owns["a"] & owns["b"], owns["a"] & ~owns["b"], owns["b"] & ~owns["a"])}:
        chosen = torch.tensor(members)
        used = [w for w in "ab" if bool((chosen & owns[w]).any())]
        if not used:
            continue
        gram, cross = sum(rows[w][0] for w in used), sum(rows[w][1][chosen] for w in used)
        pull = (
            ridge
            * torch.as_tensor(gram).diagonal().mean().clamp(min=1e-30)
            * torch.eye(into.width, dtype=torch.float64)
        )
        left, right = torch.as_tensor(gram) + pull, torch.as_tensor(cross) + start[chosen].double() @ pull
        result[chosen] = torch.linalg.solve(left, right.T).T
    return result.to(start.dtype)


def _owned(blocks: Blocks, which: str) -> Tensor:
    """Flags of the merged units that are the model's: its pairs and those it has alone."""
    flags = torch.zeros(blocks.width, dtype=torch.bool)
    flags[: len(blocks.pair_a)] = True
    first = len(blocks.pair_a) + (0 if which == "a" else len(blocks.alone_a))
    flags[first : first + len(blocks.alone_a if which == "a" else blocks.alone_b)] = True
    return flags
