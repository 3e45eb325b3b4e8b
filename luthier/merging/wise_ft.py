"""A step back towards the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError


@MERGES.add("wise_ft")
@dataclass(frozen=True)
class WiseFT(Merge):
    """W = (1 − α) W₀ + α W₁, all weights alike. Source: Wortsman et al. 2022 (P430).

    At 0 and 1 it is the base and the tuned model bit for bit. Between, α is to be tried on shifted and unshifted data.
    """

    alpha: float = 0.5
    """α: the share of the tuned model, 0 to 1."""

    models: ClassVar[tuple[int, int | None]] = (1, 1)
    each: ClassVar[Mapping[str, float | None]] = {}
    pointwise: ClassVar[bool] = True
    paper: ClassVar[str] = "P430"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise LuthierError(f"wise_ft: alpha {self.alpha} is out of range: give a number from 0 to 1")

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        return torch.lerp(t.base, t.tensors[0], self.alpha)
