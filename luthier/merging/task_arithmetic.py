"""Weighted sums of changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from luthier.delta import MERGES
from luthier.merging.engine import TaskVectors


@MERGES.add("task_arithmetic")
@dataclass(frozen=True)
class TaskArithmetic(TaskVectors):
    """W = W₀ + λ Σ wᵢ (Wᵢ − W₀). Source: Ilharco et al. 2023. With weights found per group, decouple-then-merge (P403)."""

    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0}
    pointwise: ClassVar[bool] = True
