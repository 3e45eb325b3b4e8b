"""A low-rank adapter out of any change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luthier.delta import COMPRESSIONS, FORMS, Change, Compression, Small
from luthier.parts.svd import balanced, svd_to


@COMPRESSIONS.add("svd")
@dataclass(frozen=True)
class SVD(Compression):
    """Δ̂ = B A, the best approximation of its rank, as an ordinary LoRA (alpha = rank) that PEFT and vLLM serve.

    By Eckart and Young 1936; from a full tune to an adapter as in mergekit's extraction.
    """

    rank: int | None = None
    """Directions at every matrix; with `energy` the most there may be. Default 16 where nothing is stated."""
    energy: float | None = None
    """Share of ‖Δ‖² that each matrix's rank keeps at least, in (0, 1)."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"energy must lie in (0, 1), got {self.energy}")

    def compress(self, c: Change) -> Small:
        rank = 16 if self.rank is None and self.energy is None else self.rank
        change = c.change.t() if c.site.kind == "embedding" else c.change
        a, b = balanced(*svd_to(change, rank=rank, energy=self.energy, generator=c.generator))
        most = min(change.shape)
        note = f"rank {rank} is more than a matrix has: {most} are kept" if (rank or 0) > most else ""
        return Small(FORMS.make("lora", {"rank": len(a), "alpha": float(len(a))}), {"A": a, "B": b}, note=note)
