"""Models merged in memory by luthier's own merges, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.effects.lab import Model

Weights = dict[str, Tensor]


def weights(model: Model) -> Weights:
    """A copy of a model's parameters by name, with what full tuning has made of them."""
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def put(model: Model, new: Weights) -> None:
    """These weights into the model."""
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            p.copy_(new[name])


def merged(base: Weights, tuned: Sequence[Weights], method: str, settings: Mapping[str, Any], **each: float) -> Weights:
    """``method`` with its settings over all models; ``each`` are settings that every model has (weight=0.3)."""
    merge = MERGES.make(method, settings)
    own: dict[str, list[float]] = {}
    for name, default in merge.each.items():
        value: float = each[name] if name in each else default
        own[name] = [value] * len(tuned)
    origin: Weights | None = None if merge.base == "unused" else base
    return {
        name: merge.merge(Stack(name, [t[name] for t in tuned], None if origin is None else origin[name], own))
        for name in base
    }
