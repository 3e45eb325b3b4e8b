"""Changes without their smallest and their largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier.delta import MERGES, Stack
from luthier.merging.engine import Nothing, TaskVectors, Thin, share
from luthier.parts.trims import Chunk, band


@MERGES.add("breadcrumbs")
@dataclass(frozen=True)
class Breadcrumbs(TaskVectors):
    """Of every change, tensor by tensor, the `density` · n entries below the largest `gamma` · n; λ is the paper's α.

    In the paper's terms β = 1 − density − gamma falls out at the bottom and γ at the top. Where density + gamma
    exceeds 1, fewer of the largest fall out. The authors' code ranks each row of a tensor by itself.
    Source: Davari and Belilovsky 2023 (P026).
    """

    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0, "density": 1.0, "gamma": 0.01}
    paper: ClassVar[str] = "P026"

    def thin(self, t: Stack, i: int, chunk: Chunk) -> Thin | None:
        density, gamma = share(t.name, t.each["density"][i]), share(t.name, t.each["gamma"][i], "gamma")
        if density == 1:
            return None
        n = t.tensors[i].numel()
        kept = int(density * n)
        first = max(0, n - kept - int(gamma * n))
        if not kept:
            return Nothing()
        return band(chunk, n, first, first + kept, lambda w: torch.sort(w).indices[first : first + kept], t.over)


@MERGES.add("breadcrumbs_ties")
@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """Breadcrumbs whose signs have to agree, as in `ties`."""

    consensus: ClassVar[bool] = True
