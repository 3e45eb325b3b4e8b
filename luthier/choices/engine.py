"""Which of the base's own parameters move: score × granularity × strata × budget, drawn for all parameters at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar, Literal

import torch
from torch import Tensor

from luthier.delta import Site
from luthier.errors import LuthierError
from luthier.parts.seeds import generator_of

Items = Mapping[str, Site]
"""Full parameter name -> the site that describes it (`parameter`, `shape` as stored, role, layer, kind)."""
Selection = dict[str, Tensor | None]
"""Parameter name -> None for the whole, or sorted flat entries of the parameter in its own layout."""
Granularity = Literal["entry", "row", "column", "head", "expert", "tensor", "part", "layer"]
Strata = Literal["whole", "kind", "layer", "layer-kind", "tensor"]
ALWAYS = ("embed", "head", "classifier")


@dataclass
class ChoiceContext:
    """What a choice may look at."""

    seed: int = 0
    step: int = 0
    """Optimiser steps done; with `every` it numbers the draws."""
    weight: Callable[[str], Tensor] | None = None
    """Parameter by name, as the model stores it."""
    grad: Callable[[str], Tensor | None] | None = None
    """Its gradient, accumulated over a first window of batches; None where the loss does not reach it."""
    square: Callable[[str], Tensor | None] | None = None
    """The mean over the rows of that window of its gradient's squares: the diagonal of the empirical Fisher information."""


@dataclass(frozen=True)
class Choice:
    """Base of all choices. `every`: optimiser steps between draws, 0 for one draw only. `released`: what a part that is
    no longer chosen does: stay where it got to, or return to the base's value."""

    every: int = 0
    released: Literal["stay", "return"] = "stay"

    paper: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ("all",)
    """Which parameters it is handed unless the plan says otherwise."""

    @property
    def needs_grad(self) -> bool:
        """Whether gradients of a first window must be accumulated before the draw."""
        return False

    @property
    def needs_squares(self) -> bool:
        """Whether their squares must be, row by row."""
        return False

    @property
    def looks(self) -> bool:
        """Whether a first window must be gone through at all."""
        return self.needs_grad or self.needs_squares

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        """The parameters that move in this draw."""
        raise NotImplementedError(f"{type(self).__name__} has no select")

    def generator(self, ctx: ChoiceContext, *names: object) -> torch.Generator:
        """Random numbers of this draw: the same seed, draw and names give the same ones anywhere."""
        draw = ctx.step // self.every if self.every else 0
        return generator_of(ctx.seed, draw, *names)


# -- scores: one number for every entry, larger is picked first


def _needed(value: Callable[[str], Tensor | None] | None, name: str, what: str) -> Tensor:
    found = value(name) if value else None
    if found is None:
        raise LuthierError(
            f"choice: no {what} for {name}: choose among parameters that the loss reaches, or another score"
        )
    return found.detach().float()


def _product(name: str, ctx: ChoiceContext) -> Tensor:
    """w · g, on the weight's device: gradients are collected on the CPU."""
    w = _needed(ctx.weight, name, "weight")
    return w * _needed(ctx.grad, name, "gradient").to(w.device)


def _lowrank(name: str, ctx: ChoiceContext, rank: int) -> Tensor:
    w = _needed(ctx.weight, name, "weight")
    if w.dim() < 2:
        return w.abs()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).abs()


SCORES: dict[str, Callable[[str, ChoiceContext, int], Tensor]] = {
    "magnitude": lambda name, ctx, rank: _needed(ctx.weight, name, "weight").abs(),
    "lowrank-magnitude": _lowrank,
    "gradient": lambda name, ctx, rank: _needed(ctx.grad, name, "gradient").abs(),
    "fisher": lambda name, ctx, rank: _needed(ctx.square, name, "gradient"),
    "movement": lambda name, ctx, rank: -_product(name, ctx),
    "sensitivity": lambda name, ctx, rank: _product(name, ctx).abs(),
}
"""Name -> scores in the parameter's own shape. lowrank-magnitude: |W| after keeping `rank` singular directions;
fisher: mean over rows of the squared gradient; movement: −w·g, positive where w is moving away from zero; sensitivity:
|w·g|."""
WITH_GRADIENT = ("gradient", "movement", "sensitivity")


@dataclass(frozen=True)
class Pick(Choice):
    """The engine itself: the best units of every stratum by a score, within a budget, and what always moves besides.

    Exactly one of fraction (of a stratum's units, rounded, at least one), count (units) and parameters (numbers; units
    are taken in order while they fit) is stated.
    """

    score: str = "random"
    """random, or a key of SCORES; of a unit it is the mean over its entries."""
    granularity: Granularity = "tensor"
    """part: a module's weight with its bias; row, column: an output, an input of a matrix; head: rows of q, k, v or
    columns of o; expert: a slice of a fused parameter. Parameters that have no such units are not picked among."""
    within: Strata = "whole"
    """Each of these has the budget for itself; kind is attn, ffn, norm, embed, head …"""
    fraction: float | None = None
    count: int | None = None
    parameters: int | None = None
    of: tuple[str, ...] = ("all",)
    """Roles (or their beginnings) and name patterns picked among."""
    always: tuple[str, ...] = ()
    """Roles and name patterns that move whole, outside the budget."""
    largest: bool = True
    rank: int = 16
    """Singular directions kept by lowrank-magnitude."""
    head_dim: int = 0
    """Width of a head, for granularity head."""

    def __post_init__(self) -> None:
        if sum(v is not None for v in (self.fraction, self.count, self.parameters)) != 1:
            raise ValueError("state exactly one of fraction, count and parameters")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")
        if self.score != "random" and self.score not in SCORES:
            raise ValueError(f"no score is called '{self.score}'; there are random, {', '.join(SCORES)}")
        if self.granularity == "head" and not self.head_dim:
            raise ValueError("granularity head needs head_dim")

    @property
    def needs_grad(self) -> bool:
        return self.score in WITH_GRADIENT

    @property
    def needs_squares(self) -> bool:
        return self.score == "fisher"

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        chosen: Selection = {n: None for n, s in items.items() if matches(n, s, self.always)}
        pool = {n: s for n, s in items.items() if n not in chosen and matches(n, s, self.of)}
        if not pool:
            raise LuthierError(f"choice: {', '.join(self.of)} matches no parameter that is not already always chosen")
        pool = {n: s for n, s in pool.items() if has_units(s, self.granularity)}
        if not pool:
            raise LuthierError(f"choice: no parameter of {', '.join(self.of)} is made of {self.granularity}s")
        strata: dict[tuple[object, ...], dict[str, Site]] = {}
        for name, site in pool.items():
            strata.setdefault(stratum(name, site, self.within), {})[name] = site
        for key, members in strata.items():
            units = units_of(members, self.granularity, self.head_dim)
            chosen |= units.selection(taken(self, scored(self, units, ctx, key), units.sizes))
        return chosen


def scored(how: Pick, units: Units, ctx: ChoiceContext, stratum: tuple[object, ...]) -> Tensor:
    """A number for every unit of a stratum [units]; the largest are taken."""
    if how.score == "random":
        return torch.rand(units.count, generator=how.generator(ctx, *stratum))
    return units.score(lambda n: SCORES[how.score](n, ctx, how.rank)) * (1 if how.largest else -1)


def taken(how: Pick, scores: Tensor, sizes: Tensor | None) -> Tensor:
    """A mask of the units within the budget, best first; ties go to the earlier unit (among entries, to any)."""
    k = how.count if how.count is not None else max(round((how.fraction or 0) * len(scores)), 1)
    if how.parameters is None and k > len(scores):
        raise LuthierError(f"choice: {k} {how.granularity}s are asked for where there are {len(scores)}")
    if sizes is None:  # one number each, maybe billions: no sorting
        most = min(k if how.parameters is None else how.parameters, len(scores))
        best = scores.topk(most, sorted=False).indices
    else:
        order = scores.argsort(descending=True, stable=True)
        best = order[: k if how.parameters is None else int((sizes[order].cumsum(0) <= how.parameters).sum())]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill(0, best, True)


# -- units: what a stratum is made of, numbered one after another over its parameters


@dataclass(frozen=True)
class Units:
    """The units of one stratum."""

    count: int
    sizes: Tensor | None
    """[count] numbers in each; None where it is one."""
    score: Callable[[Callable[[str], Tensor]], Tensor]
    """From the scores of a parameter by name, in its shape, to those of the units [count]: means over their entries."""
    selection: Callable[[Tensor], Selection]
    """From a mask [count] of the units taken to what moves."""


def units_of(members: Mapping[str, Site], granularity: Granularity, head_dim: int = 0) -> Units:
    """The units of a stratum's parameters."""
    if granularity in ("tensor", "part", "layer"):
        return _wholes(members, granularity)
    return _entries(members) if granularity == "entry" else _slices(members, granularity, head_dim)


def _wholes(members: Mapping[str, Site], granularity: str) -> Units:
    """Units of whole parameters."""
    groups: dict[str, list[str]] = {}
    for name, site in members.items():
        groups.setdefault(_group(name, site, granularity), []).append(name)

    def score(of: Callable[[str], Tensor]) -> Tensor:
        found = ([of(n) for n in names] for names in groups.values())
        return torch.stack([torch.stack([v.sum() for v in u]).sum().cpu() / sum(v.numel() for v in u) for u in found])

    def selection(mask: Tensor) -> Selection:
        return {n: None for names, on in zip(groups.values(), mask.tolist(), strict=True) if on for n in names}

    sizes = torch.tensor([sum(_numel(members[n]) for n in names) for names in groups.values()])
    return Units(len(groups), sizes, score, selection)


def _slices(members: Mapping[str, Site], granularity: str, head_dim: int) -> Units:
    """Units within a parameter: rows, columns, heads, experts."""
    found = {n: layout(s, granularity, head_dim) for n, s in members.items()}
    tables = {n: t for n, t in found.items() if t is not None}
    counts = [t.shape[0] for t in tables.values()]

    def score(of: Callable[[str], Tensor]) -> Tensor:
        return torch.cat([of(n).flatten().cpu()[t].mean(1) for n, t in tables.items()])

    def selection(mask: Tensor) -> Selection:
        out: Selection = {}
        for (name, table), mine in zip(tables.items(), mask.split(counts), strict=True):
            if mine.all() and table.numel() == _numel(members[name]):
                out[name] = None
            elif mine.any():
                out[name] = table[mine].flatten().sort().values
        return out

    sizes = torch.cat([torch.full((t.shape[0],), t.shape[1]) for t in tables.values()])
    return Units(sum(counts), sizes, score, selection)


def _entries(members: Mapping[str, Site]) -> Units:
    """Single entries, without a table of them: these may be billions."""
    counts = [_numel(s) for s in members.values()]

    def score(of: Callable[[str], Tensor]) -> Tensor:
        return torch.cat([of(n).flatten().cpu() for n in members])

    def selection(mask: Tensor) -> Selection:
        found = zip(members, mask.split(counts), strict=True)
        return {n: None if mine.all() else mine.nonzero()[:, 0] for n, mine in found if mine.any()}

    return Units(sum(counts), None, score, selection)


# -- strata, groups, layouts


def matches(name: str, site: Site, patterns: tuple[str, ...]) -> bool:
    """Whether a role (or its beginning) or a name pattern matches; 'all' matches everything."""
    return any(q == "all" or f"{site.role}.".startswith(f"{q}.") or fnmatch(name, q) for q in patterns)


def kind_of(site: Site) -> str:
    """attn, ffn, norm, embed, head … : the first word of the role."""
    return site.role.partition(".")[0]


def layer_of(name: str, site: Site) -> str:
    """The layer's own path, so that encoder and decoder layers differ; '' outside the layers."""
    return "" if site.layer is None else f"{name.partition(f'.{site.layer}.')[0]}.{site.layer}"


def stratum(name: str, site: Site, within: Strata) -> tuple[object, ...]:
    """The stratum a parameter belongs to."""
    return {
        "whole": (),
        "kind": (kind_of(site),),
        "layer": (layer_of(name, site),),
        "layer-kind": (layer_of(name, site), kind_of(site)),
        "tensor": (name,),
    }[within]


def _group(name: str, site: Site, granularity: str) -> str:
    if granularity == "part":
        return f"{site.name}.{site.parameter}" if site.experts else site.name
    return name if granularity == "tensor" else layer_of(name, site) or site.name


def _numel(site: Site) -> int:
    return int(torch.Size(site.shape).numel())


def has_units(site: Site, granularity: str) -> bool:
    """Whether a parameter is made of such units."""
    if granularity == "expert":
        return site.experts > 0 and len(site.shape) > 1
    if granularity == "head":
        return len(site.shape) == 2 and site.role in ("attn.q", "attn.k", "attn.v", "attn.o")
    return len(site.shape) == 2 if granularity in ("row", "column") else True


def layout(site: Site, granularity: str, head_dim: int = 0) -> Tensor | None:
    """Flat entries of a parameter by unit, [units, entries of each]; None where it has no such units."""
    if not has_units(site, granularity):
        return None
    flat = torch.arange(_numel(site)).view(site.shape)
    if granularity == "entry":
        return flat.view(-1, 1)
    if granularity == "expert":
        return flat.flatten(1)
    rows = flat.t() if site.kind == "conv1d" else flat  # [d_out, d_in]
    if granularity == "head" and (width := rows.shape[site.role == "attn.o"]) % head_dim:
        raise LuthierError(
            f"granularity head: {site.name} is {width} wide, which heads of head_dim {head_dim} do not divide; state the base's own"
        )
    if granularity == "head" and site.role != "attn.o":
        return rows.reshape(rows.shape[0] // head_dim, -1)
    if granularity == "head":
        return rows.t().reshape(rows.shape[1] // head_dim, -1)
    return rows if granularity == "row" else rows.t()
