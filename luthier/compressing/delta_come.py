"""Delta-CoMe: singular directions in mixed precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import COMPRESSIONS, FORMS, Change, Compression, No, Small
from luthier.parts.packing import pack_codes
from luthier.parts.rounding import hessian, power_of_two, round_groups
from luthier.parts.svd import truncated_svd


@COMPRESSIONS.add("delta-come")
@dataclass(frozen=True)
class DeltaCoMe(Compression):
    """Δ = U S Vᵀ; the strongest directions are kept in many bits, the next in few, the rest not at all.

    V is rounded first, with the errors made good against the calibration inputs X; then U S, against X V̂, from the least
    squares fit of Δ X on X V̂ (our reading: rounding V is so made good by U, too; the paper rounds U S as it is). Each
    direction has a step of its own on either side, where the authors' GPTQ has one for every 128 entries and takes inputs
    in the order of their size. Source: Ping et al. 2024 (P023).
    """

    bits: tuple[int, ...] = (8, 3, 2)
    """Of the groups, strongest first."""
    directions: tuple[int, ...] = (2, 32)
    """In every group but the last, which takes what the budget leaves."""
    budget: float = 1.0
    """Bits a weight of Δ, all in all."""
    damp: float = 0.01
    """Added to the Hessians' diagonals, as a share of their mean."""

    calibrated: ClassVar[bool | No] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding")
    paper: ClassVar[str] = "P023"

    def __post_init__(self) -> None:
        FORMS["mixed-bits"](self.bits, self.directions, self.budget)

    def compress(self, c: Change) -> Small:
        form = FORMS.make("mixed-bits", {"bits": self.bits, "directions": self.directions, "budget": self.budget})
        ranks = form.ranks(c.site)
        scale = power_of_two(c.change.abs().max())
        _, _, vh = truncated_svd(c.change, sum(ranks), generator=c.generator)
        h = hessian(c.inputs, c.change.shape[1], self.damp)
        fixed: dict[str, Tensor] = {}
        v = _packed("v", round_groups(vh, h, ranks, self.bits, across=False), self.bits, fixed)
        seen = v * h if h.dim() == 1 else v @ h
        gram = seen @ v.t()
        damped = gram + gram.diagonal().mean().clamp_min(1e-12) * 1e-4 * torch.eye(len(gram))
        fit = torch.linalg.solve(damped, seen @ c.change.t() / scale)
        _packed("u", round_groups(fit.t(), gram, ranks, self.bits, across=True), self.bits, fixed)
        return Small(form, {"scale": scale[None]}, fixed)


def _packed(
    side: str, found: tuple[Tensor, list[Tensor], list[Tensor]], bits: tuple[int, ...], fixed: dict[str, Tensor]
) -> Tensor:
    """What was rounded; its groups' codes and steps go packed into `fixed`."""
    out, codes, steps = found
    for k, (part, step, b) in enumerate(zip(codes, steps, bits, strict=True)):
        if len(part):
            fixed[f"{side}{k}"], fixed[f"s{side}{k}"] = pack_codes(part, b), step.half()
    return out
