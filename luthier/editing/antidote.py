"""Antidote: the weights that harmful answers lean on most are set to zero, once, after tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import EDITS, Small
from luthier.editing.engine import Edit, Request, Subject, key
from luthier.errors import LuthierError


@EDITS.add("antidote")
@dataclass(frozen=True)
class Antidote(Edit):
    """score_ij = |W_ij| · ‖X_j‖₂ with X the inputs of the weight over the harmful texts (all tokens); the highest `alpha`
    of the n entries ranked together become zero: exactly round(alpha · n), ties to the first. No training. As `records`
    give the texts that the model should not produce, with the answers that it does; `deltas` are what the tuning left.

    Our reading: the share holds in every matrix (within: tensor); 'whole' ranks all matrices together, 'row' each row by
    itself, as the authors' code does. Their scripts have alpha 0.01 to 0.2 by the task.
    Source: Huang et al. 2024 (P351); score of Sun et al. 2023 (Wanda).
    """

    alpha: float = 0.01
    """Share of the entries that become zero."""
    within: Literal["row", "tensor", "whole"] = "tensor"
    """Which entries are ranked together."""
    roles: tuple[str, ...] = ("linear",)
    layers: tuple[int, ...] | None = None

    task: ClassVar[Literal["edit", "forget"]] = "forget"
    folds: ClassVar[bool] = True
    paper: ClassVar[str] = "P351"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}")

    def edit(self, s: Subject, requests: Sequence[Request]) -> dict[str, Tensor | Small]:
        sites, texts = s.sites(self.roles, self.layers), [q.new for q in requests]
        if odd := [key(site) for site in sites if site.kind not in ("linear", "conv1d")]:
            raise LuthierError(f"antidote: {odd[0]} is no matrix between two hidden states: state other roles")
        squared = {site.name: torch.zeros(site.d_in, device=s.weight(site).device) for site in sites}
        with torch.no_grad():
            for at in s.batches(texts):
                part = [texts[n] for n in at]
                seen = s.run(part, keep=list(squared))
                for name, x in seen.inputs.items():
                    squared[name] += sum(x[n, : len(t.ids)].float().square().sum(0) for n, t in enumerate(part))
        scores = {key(site): s.weight(site).abs() * squared[site.name].sqrt() for site in sites}
        out: dict[str, Tensor | Small] = {}
        for group in [sites] if self.within == "whole" else [[site] for site in sites]:
            flat = torch.cat([scores[key(site)].flatten() for site in group])
            lines = flat.view(group[0].d_out if self.within == "row" else 1, -1)
            best = lines.argsort(dim=1, descending=True, stable=True)[:, : round(self.alpha * lines.shape[1])]
            mask = torch.zeros_like(lines, dtype=torch.bool).scatter_(1, best, True).flatten()
            for site, own in zip(group, mask.split([site.d_in * site.d_out for site in group]), strict=True):
                w = s.weight(site)
                out[key(site)] = w.masked_fill(own.view_as(w), 0.0)
        return out
