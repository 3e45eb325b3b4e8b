"""Changes trimmed to their largest entries, agreeing on a sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier.delta import MERGES, Stack
from luthier.merging.engine import Nothing, TaskVectors, Thin, share
from luthier.parts.trims import Chunk, band


@MERGES.add("ties")
@dataclass(frozen=True)
class Ties(TaskVectors):
    """Of every change the largest `density` · n entries by magnitude; of these, those with the sign of the weighted sum.

    At least one entry stays unless the density is 0. Source: Yadav et al. 2023 (arXiv 2306.01708).
    """

    normalize: bool = True
    consensus: ClassVar[bool] = True

    def thin(self, t: Stack, i: int, chunk: Chunk) -> Thin | None:
        density, n = share(t.name, t.each["density"][i]), t.tensors[i].numel()
        if density == 1:
            return None
        if density == 0:
            return Nothing()
        k = max(1, int(density * n))
        return band(chunk, n, n - k, n, lambda w: torch.argsort(w, descending=True)[:k], t.over)
