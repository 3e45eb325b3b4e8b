"""Changes of which a random share is dropped and the rest enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier.delta import MERGES, Stack
from luthier.merging.engine import TaskVectors, Thin, fixed, share
from luthier.parts.draws import Coin
from luthier.parts.trims import Chunk


@MERGES.add("dare_linear")
@dataclass(frozen=True)
class DareLinear(TaskVectors):
    """Drop and rescale: every entry of a change stays with probability `density` = 1 − p. Source: Yu et al. 2023 (P268).

    With `normalize`, DARE with averaging; without, with task arithmetic. The paper multiplies what stays by
    1 / (1 − p); as in the field's files, `rescale` restores the change's absolute sum instead: a factor that depends on
    the draw, so that the expectation is the change itself only nearly, in large tensors. In bfloat16 the density is rounded to that type, as mergekit does; the draws are not mergekit's.
    """

    rescale: bool = True
    draws: ClassVar[bool] = True
    paper: ClassVar[str] = "P268"

    def thin(self, t: Stack, i: int, chunk: Chunk) -> Thin | None:
        density = share(t.name, t.each["density"][i])
        assert t.generator is not None
        kept = fixed(density, torch.bfloat16) if t.tensors[i].dtype == torch.bfloat16 else density
        return None if kept == 1 else Coin(kept, t.generator)


@MERGES.add("dare_ties")
@dataclass(frozen=True)
class DareTies(DareLinear):
    """DARE whose signs have to agree, as in `ties`."""

    consensus: ClassVar[bool] = True
