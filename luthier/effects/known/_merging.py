"""Models merged in memory by luthier's own merges, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

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


def merged(
    base: Weights, tuned: Sequence[Weights], method: str, settings: Mapping[str, Any], seed: int = 0, **each: float
) -> Weights:
    """``method`` with its settings over all models; ``each`` are settings that every model has (weight=0.3). ``seed`` is
    that of merges that draw."""
    merge = MERGES.make(method, settings)
    own: dict[str, list[float]] = {}
    for name, default in merge.each.items():
        value: float = each[name] if name in each else default
        own[name] = [value] * len(tuned)
    origin: Weights | None = None if merge.base == "unused" else base
    places = {name: int(found[1]) for name in base if (found := re.search(r"\blayers\.(\d+)\.", name))}
    depth = 1 + max(places.values(), default=-1)

    def stack(name: str, measured: Mapping[str, Any]) -> Stack:
        draws = torch.Generator().manual_seed(crc32(f"{seed}|{name}".encode()))
        place = {"layer": places.get(name), "layers": depth, "generator": draws, "measured": measured}
        return Stack(name, [t[name] for t in tuned], None if origin is None else origin[name], own, **place)

    seen = {name: merge.measure(stack(name, {})) for name in base} if merge.looks else {}
    return {name: merge.merge(stack(name, seen)) for name in base}
