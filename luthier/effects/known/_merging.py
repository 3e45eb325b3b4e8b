"""Models merged in memory by luthier's own merges, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.effects.lab import Lab, Model
from luthier.practice.world import Record, verify

Weights = dict[str, Tensor]
_LAMBDAS = tuple({"lambda_": by} for by in (0.3, 0.5, 0.7, 1.0))
TRIES: dict[str, tuple[dict[str, Any], ...]] = {
    "average": ({},),
    "arithmetic": _LAMBDAS,
    "ties": tuple({"lambda_": by} for by in (0.7, 1.0, 1.5, 2.2)),
    "breadcrumbs": _LAMBDAS,
    "lines": tuple({"beta": by} for by in (0.5, 0.8, 1.1, 1.4)),
}
"""What is tried of each merge; settings and shares that are not tried stand in ``OF``."""
OF: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "average": ("linear", {}, {}),
    "arithmetic": ("task_arithmetic", {}, {}),
    "ties": ("ties", {}, {"density": 0.2}),
    "breadcrumbs": ("breadcrumbs", {}, {"density": 0.5, "gamma": 0.01}),
    "lines": ("lines", {"of": "task_arithmetic"}, {}),
    "half": ("dare_linear", {"rescale": "by_density"}, {"density": 0.5}),
    "most": ("dare_linear", {"rescale": "by_density"}, {"density": 0.1}),
    "nearly all": ("dare_linear", {"rescale": "by_density"}, {"density": 0.01}),
    "unscaled": ("dare_linear", {"rescale": False}, {"density": 0.5}),
}
"""Name -> the merge, its settings, and those of every model."""


class Bench:
    """A model to put merges into, what they are merged over (the model's weights, unless told otherwise), and the seed of
    what is drawn."""

    def __init__(self, model: Model, seed: int, base: Weights | None = None) -> None:
        self.model, self.seed, self.base = model, seed, base or weights(model)

    def merge(self, tuned: Sequence[Weights], name: str, settings: dict[str, Any]) -> None:
        """The merge of this name and these settings into the model."""
        method, fixed, each = OF[name]
        put(self.model, merged(self.base, tuned, method, fixed | settings, self.seed, **each))

    def solves(self, tuned: Sequence[Weights], name: str, settings: dict[str, Any], asked: list[Record]) -> list[float]:
        """What the merge of this name and these settings solves of the records."""
        self.merge(tuned, name, settings)
        most = max(len(self.model.tokenizer(r["messages"][-1]["content"])["input_ids"]) for r in asked) + 2
        said = self.model.says(asked, most)
        return [verify(r, s).reward for r, s in zip(asked, said, strict=True)]

    def best(self, tuned: Sequence[Weights], name: str, choice: list[Record]) -> dict[str, Any]:
        """Of what is tried, the settings that solve most of the records to choose by."""
        tries = TRIES[name]
        return max(tries, key=lambda s: fmean(self.solves(tuned, name, s, choice))) if tries[1:] else tries[0]


def started(lab: Lab, told: Sequence[Sequence[Record]], steps: int, rate: float) -> tuple[Weights, str]:
    """The base, tuned a little on all of these, in turn as long as there are some: its weights, and the folder of its
    delta, from which others can start."""
    turns = [r for turn in zip_longest(*told) for r in turn if r is not None]
    with lab.tuned(turns, delta={"choice": "full"}, steps=steps, rate=rate) as model:
        return weights(model), model.saved(lab.scratch / "start")


def level(family: str) -> int | None:
    """The easiest, but for the pair that conflicts, whose oracle mixes all."""
    return None if family.startswith("customs") else 1


def parted(items: Sequence[list[Record]], n: int) -> tuple[list[Record], list[Record]]:
    """The first n of each, and the others."""
    return [r for some in items for r in some[:n]], [r for some in items for r in some[n:]]


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
