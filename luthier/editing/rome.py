"""ROME: one fact, one rank-one change of one feed-forward matrix, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.delta import EDITS, Small
from luthier.editing.engine import (
    FactEdit,
    Request,
    Settle,
    Subject,
    damped,
    fact_key,
    fact_values,
    key,
    layer_at,
    lowrank,
    one_site,
    settled,
)


def insert(k: Tensor, moment: Tensor) -> Tensor:
    """a [d_in] = C⁻¹k / (kᵀ C⁻¹ k): ΔW = (v − W k) aᵀ is the closed form of min ‖ΔW C^½‖ with (W + ΔW) k = v."""
    u = torch.linalg.solve(moment.double(), k.double())
    return (u / (u @ k.double())).to(k.dtype)


@EDITS.add("rome")
@dataclass(frozen=True)
class ROME(FactEdit):
    """k: input of one layer's down projection at the subject's last token, mean over openings. v = W k + δ, δ found by
    descent (`Reach`). Then ΔW = (v − W k)(C⁻¹k)ᵀ / (kᵀC⁻¹k) with C the second moment of that input over general text.

    Several requests are inserted one after the other: a change of rank n. Then all values settle together (`Settle`,
    ours; settle: 0 leaves the published form). Differs from the paper: v is taken at the mean key, so that the residual is
    δ itself and W'k = v exactly; the layer is a share of the depth, not a causal trace; decay is 0.5
    there and weighs ‖δ‖ / ‖y‖², the norm of δ not squared.
    Source: Meng et al. 2022, Locating and Editing Factual Associations in GPT.
    """

    layer: int | None = None
    """Which; default the last within 0.19 of the depth (layer 5 of GPT-J and of Llama 7 B, as published)."""

    decay: float = 0.05

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        layer = int(0.19 * (s.layers - 1)) if self.layer is None else layer_at(self.layer, s, 0)
        site = one_site(s, self.role, layer)
        moment, w = damped(s.moment(site), self.ridge), s.weight(site)
        # A matrix does not feed into its own input: keys stay what they are while it changes.
        a = torch.stack([insert(fact_key(s, site.name, [q.new, *q.prefixed], {}), moment) for q in requests])
        b = w.new_zeros(w.shape[0], len(requests))
        for n, request in enumerate(requests):
            b[:, n] = fact_values(s, site.name, [request], {key(site): w + b @ a}, self.reach)[0]
        b = settled(s, {key(site): (w, b, a)}, requests, Settle(self.settle))[key(site)]
        return {key(site): lowrank(b, a)}
