"""ComPEFT: the largest entries, all of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from luthier.delta import COMPRESSIONS, FORMS, Change, Compression, Small


@COMPRESSIONS.add("compeft")
@dataclass(frozen=True)
class ComPEFT(Compression):
    """Δ̂ = α std(Δ) sign(Δ) at the share `density` of entries that are largest in size, 0 elsewhere; Golomb coded on disk.

    The same α at every matrix, the one of `alphas` with the least loss on calibration text; without text `alpha`.
    Differs from the paper, which takes threshold and deviation over the whole change: here they are each matrix's own, so
    that a model goes through matrix by matrix. Source: Yadav et al. 2023 (P084).
    """

    density: float = 0.05
    """Share of entries kept, fewer where fewer are not 0; the paper tries 0.05 to 0.5."""
    alpha: float = 1.0
    """Factor on the standard deviation, where no text tells a better one."""
    alphas: tuple[float, ...] = (0.5, 1, 2, 3, 4, 5, 6, 8, 10)
    """What is tried on calibration text."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")
    paper: ClassVar[str] = "P084"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.alpha <= 0 or any(a <= 0 for a in self.alphas):
            raise ValueError(f"alpha must be positive, got {min([self.alpha, *self.alphas])}")

    def factors(self) -> Sequence[float]:
        return [a / self.alpha for a in self.alphas]

    def compress(self, c: Change) -> Small:
        form = FORMS.make("ternary", {"density": self.density})
        flat = c.change.flatten()
        kept = min(form.kept(c.site), int(flat.count_nonzero()))
        index = flat.abs().topk(kept, sorted=False).indices.sort().values
        sign = torch.where(flat[index] < 0, -1, 1).to(torch.int8)
        place = index.to(torch.int32 if len(flat) < 2**31 else torch.int64)
        return Small(form, {"scale": (self.alpha * flat.std())[None]}, {"index": place, "sign": sign})
