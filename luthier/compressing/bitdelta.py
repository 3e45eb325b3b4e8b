"""BitDelta: one bit a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from luthier.delta import COMPRESSIONS, FORMS, Change, Compression, Small
from luthier.parts.packing import pack_bits


@COMPRESSIONS.add("bitdelta")
@dataclass(frozen=True)
class BitDelta(Compression):
    """Δ̂ = α sign(Δ) with α = mean |Δ|, which is the least squared error for these signs; then every matrix's α is tuned on
    calibration text so that the logits are the tuned model's (mean squared error).

    A zero counts as plus. Our reading: every α's rate is a share of its size and falls linearly, for 100 steps of 4 rows; the
    authors' is 1e-4 for all and falls as a cosine. Source: Liu et al. 2024 (P088).
    """

    tunes: ClassVar[Literal["", "scales", "features"]] = "scales"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")
    paper: ClassVar[str] = "P088"

    def compress(self, c: Change) -> Small:
        return Small(
            FORMS.make("signs", {}), {"scale": c.change.abs().mean()[None]}, {"bits": pack_bits(c.change >= 0)}
        )
