"""MEMIT: many facts at once, spread over several layers, each by least squares."""

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
    at_subject,
    damped,
    fact_key,
    fact_values,
    key,
    layer_at,
    lowrank,
    one_site,
    settled,
)


def spread(keys: Tensor, residuals: Tensor, moment: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(b [d_out, n], a [n, d_in]) of ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹: the least-squares change that takes the keys K
    (rows of keys [n, d_in]) to the residuals R (rows of residuals [n, d_out]) and general keys to nothing."""
    k = keys.double()
    gram = weight * moment.double() + k.t() @ k
    return residuals.t(), torch.linalg.solve(gram, k.t()).t().to(keys.dtype)


@EDITS.add("memit")
@dataclass(frozen=True)
class MEMIT(FactEdit):
    """For every fact the hidden state z that the last of `layers` should have at the subject is found by descent; then,
    from the first layer to the last, ΔW = R Kᵀ(λ C + K Kᵀ)⁻¹ with K the layer's keys and R an equal share of what is
    still missing to z. Keys and what is missing are measured anew at every layer, on the changed model.

    Differs from the paper: λ is 15,000 there, for thousands of facts in models of 6 B and more; the default here suits
    few facts, where such a weight would leave nearly all of R undone. Source: Meng et al. 2023, Mass-Editing Memory.
    """

    layers: tuple[int, ...] | None = None
    """Which, in any order; default the five up to 0.26 of the depth, or as many as there are."""
    weight: float = 10.0
    """λ: how many keys' worth the general text counts."""
    decay: float = 0.01
    ridge: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        last = layer_at(None, s, 0.26)
        layers = sorted({layer_at(n, s, 0) for n in self.layers or range(max(0, last - 4), last + 1)})
        top = s.layer(layers[-1])
        wanted = self.hidden(s, top, requests, {}) + fact_values(s, top, requests, {}, self.reach)
        now: dict[str, Tensor] = {}
        pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for n, number in enumerate(layers):
            site = one_site(s, self.role, number)
            keys = torch.stack([fact_key(s, site.name, [q.new, *q.prefixed], now) for q in requests])
            share = (wanted - self.hidden(s, top, requests, now)) / (len(layers) - n)
            b, a = spread(keys, share, damped(s.moment(site), self.ridge), self.weight)
            pairs[key(site)] = (s.weight(site), b, a)
            now[key(site)] = s.weight(site) + b @ a
        values = settled(s, pairs, requests, Settle(self.settle))
        return {name: lowrank(values[name], a) for name, (_, _, a) in pairs.items()}

    @torch.no_grad()
    def hidden(self, s: Subject, module: str, requests: Sequence[Request], weights: dict[str, Tensor]) -> Tensor:
        """[n, d]: the layer's output at each subject, mean over openings."""
        out = []
        for q in requests:
            texts = [q.new, *q.prefixed]
            out.append(at_subject(s.run(texts, weights, keep=[module]).outputs[module], texts).mean(0))
        return torch.stack(out)
