"""Changes of which a random share is dropped and the rest enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from luthier.delta import MERGES, Stack
from luthier.merging.engine import TaskVectors, Thin, fixed, share
from luthier.parts.draws import Coin
from luthier.parts.trims import Chunk


@MERGES.add("dare_linear")
@dataclass(frozen=True)
class DareLinear(TaskVectors):
    """Drop and rescale: every entry of a change stays with probability `density` = 1 − p. Source: Yu et al. 2023 (P268).

    With `normalize`, DARE with averaging; without, with task arithmetic. `rescale: by_density` is the paper's: what stays
    is multiplied by 1 / (1 − p), so that the expectation is the change. `rescale: true` restores the change's absolute
    sum instead, as the field's files do: where few entries hold much of it, the expectation is another. In bfloat16 the
    density is rounded to that type, as mergekit does; the draws are not mergekit's.
    """

    rescale: bool | Literal["by_density"] = True  # pyright: ignore[reportIncompatibleVariableOverride]
    """true: the absolute sum is restored; by_density: divided by the density; false: what stays is left as it is."""
    draws: ClassVar[bool] = True
    paper: ClassVar[str] = "P268"

    def thin(self, t: Stack, i: int, chunk: Chunk) -> Thin | None:
        assert t.generator is not None
        kept = _kept(t, i)
        return None if kept == 1 else Coin(kept, t.generator)

    def scale(self, t: Stack, i: int) -> float | None:
        kept = _kept(t, i)
        return 1 / kept if self.rescale == "by_density" and kept else super().scale(t, i)


@MERGES.add("dare_ties")
@dataclass(frozen=True)
class DareTies(DareLinear):
    """DARE whose signs have to agree, as in `ties`."""

    consensus: ClassVar[bool] = True


def _kept(t: Stack, i: int) -> float:
    """The share of model i's entries that stay, as the type of its numbers holds it."""
    density = share(t.name, t.each["density"][i])
    return fixed(density, torch.bfloat16) if t.tensors[i].dtype == torch.bfloat16 else density
