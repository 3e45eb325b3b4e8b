"""DeltaZip: two of four weights, in a few bits, chosen and rounded so that the layer's output stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import COMPRESSIONS, FORMS, Change, Compression, No, Small
from luthier.parts.packing import TWO_OF_FOUR, pack_codes, pack_sixths
from luthier.parts.rounding import best_step, from_codes, hessian, power_of_two, surgeon, to_codes


@COMPRESSIONS.add("deltazip")
@dataclass(frozen=True)
class DeltaZip(Compression):
    """Of every four inputs the two whose loss costs most are kept, rounded to `bits` bits with a step for every `group`,
    and each column's error is made good by the columns to its right (second-order, on calibration inputs).

    Layers go in order, each fed by base + compressed change of those before. Cost of dropping w_j: w_j² / [H⁻¹]_jj.
    Our reading: codes are symmetric without a zero (a kept weight is never zero), the step is the one of least squared
    error on the entries that magnitude alone would keep. Without inputs this is 2:4 by magnitude and plain rounding.
    Source: Yao et al. 2025 (P142).
    """

    bits: int = 2
    """Of a kept weight; the paper uses 4 and 2."""
    group: int = 128
    """Inputs that share a step; a multiple of 4."""
    damp: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""

    calibrated: ClassVar[bool | No] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")
    paper: ClassVar[str] = "P142"

    def __post_init__(self) -> None:
        FORMS["two-four"](self.bits, self.group)

    def compress(self, c: Change) -> Small:
        form = FORMS.make("two-four", {"bits": self.bits, "group": self.group})
        _, fours, groups = form.sizes(c.site)
        wide, columns = 4 * fours, c.change.shape[1]
        w = F.pad(c.change, (0, wide - columns))
        h = hessian(c.inputs, columns, self.damp)
        h = F.pad(h, (0, wide - columns), value=1.0) if h.dim() == 1 else torch.block_diag(h, torch.eye(wide - columns))
        scale = power_of_two(w.abs().max())
        steps = torch.zeros(len(w), groups)
        kept = torch.zeros(len(w), wide, dtype=torch.bool)
        codes = torch.zeros(len(w), wide, dtype=torch.uint8)

        def column(j: int, now: Tensor, d: Tensor) -> Tensor:
            k = j // self.group
            if j % self.group == 0:
                part = now[:, j : j + self.group]
                step = best_step(part, self.bits, _largest(part.abs()))
                steps[:, k : k + 1] = (step / scale).half().float() * scale
            if j % 4 == 0:
                kept[:, j : j + 4] = _largest((now[:, j : j + 4] / d[j : j + 4]).abs())
            step = steps[:, k]
            codes[:, j] = to_codes(now[:, j], step, self.bits)
            return from_codes(codes[:, j], step, self.bits) * kept[:, j]

        surgeon(w, h, column, block=self.group)
        places = kept.unflatten(1, (-1, 4)).to(torch.uint8).topk(2, 2).indices.sort(2).values
        table = torch.zeros(16, dtype=torch.uint8)
        table[TWO_OF_FOUR @ torch.tensor([4, 1])] = torch.arange(6, dtype=torch.uint8)
        number = table[4 * places[..., 0] + places[..., 1]]
        packed = {
            "codes": pack_codes(codes.unflatten(1, (-1, 4)).gather(2, places).flatten(1), self.bits),
            "places": pack_sixths(number),
            "steps": (steps / scale).half(),
        }
        return Small(form, {"scale": scale[None]}, packed)


def _largest(size: Tensor) -> Tensor:
    """True at the two largest of every four, [r, n] with n a multiple of 4."""
    fours = size.unflatten(1, (-1, 4))
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, 2).indices, True).flatten(1)
