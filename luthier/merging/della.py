"""Changes of which small entries are likelier to be dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.errors import LuthierError
from luthier.merging.engine import Nothing, TaskVectors, Thin, share
from luthier.parts.draws import Draw
from luthier.parts.spread import SPAN
from luthier.parts.trims import Chunk


class MagPrune(Draw):
    """Keeps entries with probabilities that rise with their rank in their row, from density − ε to density + ε."""

    def __init__(self, shape: tuple[int, ...], density: float, epsilon: float, dtype: torch.dtype, t: Stack) -> None:
        assert t.generator is not None
        super().__init__(t.generator)
        self.shape = shape
        work = dtype if dtype == torch.bfloat16 else torch.float32
        ranks = torch.arange(shape[1]).to(work) + 1
        rise = ((ranks - ranks.min()) / (ranks.max() - ranks.min())).clamp(0, 1) if shape[1] > 1 else ranks - 0.5
        self.table = (density - epsilon) + rise * 2 * epsilon

    def apply(self, a: int, d: Tensor) -> Tensor:
        rows = d.view(-1, *self.shape[1:])
        order = torch.argsort(rows.abs(), dim=1)
        table = self.table.view(1, -1, *[1] * (rows.dim() - 2)).expand_as(rows)
        p = torch.empty(rows.shape, dtype=table.dtype).scatter_(1, order, table)
        rows.mul_((self.uniform(a, d.numel()).view(rows.shape) < p).to(d.dtype))
        return d


@MERGES.add("della")
@dataclass(frozen=True)
class Della(TaskVectors):
    """DELLA: MagPrune (`density` ± `epsilon` by the rank of the magnitude in its row), signs that agree, rescaled.

    Rows are those of the first axis; ranks run over the second one. A row of one entry has probability `density`
    (our reading). Our reading: as in the field's files, `rescale` restores the change's absolute sum; the paper divides
    each kept entry by the probability with which it was kept. Source: Deep et al. 2024 (arXiv 2406.11617).
    """

    normalize: bool = True
    rescale: bool = True
    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0, "density": 1.0, "epsilon": 0.15}
    consensus: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        turned = min(each["epsilon"]) < 0
        return super().odd(each) or ("an epsilon below 0 drops large entries first: state at least 0" if turned else "")

    def span(self, t: Stack) -> int:
        row = t.tensors[0].numel() // _rows(t.tensors[0])[0]
        return row * max(1, SPAN // row)

    def thin(self, t: Stack, i: int, chunk: Chunk) -> Thin | None:
        density, epsilon, x = share(t.name, t.each["density"][i]), t.each["epsilon"][i], t.tensors[i]
        if density == 1:
            return None
        if density == 0:
            return Nothing()
        if density + epsilon >= 1 or density - epsilon <= 0:
            raise LuthierError(
                f"della: density {density} ± epsilon {epsilon} at {t.name} leaves (0, 1): lower epsilon below "
                f"{min(density, 1 - density):g}"
            )
        return MagPrune(_rows(x), density, epsilon, x.dtype, t)


def _rows(x: Tensor) -> tuple[int, ...]:
    return (1, x.numel()) if x.dim() < 2 else tuple(x.shape)


@MERGES.add("della_linear")
@dataclass(frozen=True)
class DellaLinear(Della):
    """DELLA whose signs need not agree."""

    normalize: bool = False
    consensus: ClassVar[bool] = False
