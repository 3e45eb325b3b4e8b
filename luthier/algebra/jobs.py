"""From a merge's plan and its layout to jobs: the method with its settings at every tensor, types and shapes checked."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from luthier.algebra.driver import Job
from luthier.algebra.layout import Item, Layout
from luthier.algebra.sources import Source, Tuned
from luthier.delta import MERGES, Merge
from luthier.errors import LuthierError, nearest
from luthier.plan.merge import MergePlan, Parameters, Where, number, resolve

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
SHARES = {"density", "gamma"}
"""Parameters that are shares in every merge that has them."""
GONE = {"embed_slerp"}
"""Parameters of older mergekits, without effect in today's; some of the field's files still state them."""


class Method:
    """A merge by name, made anew for every tensor with the settings that hold there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cls: type[Merge] = MERGES[name]
        self.fields = {f.name.rstrip("_"): f for f in dataclasses.fields(self.cls)}  # pyright: ignore[reportArgumentType]
        self._made: dict[tuple[Any, ...], Merge] = {}

    def foresee(self, plan: MergePlan) -> None:
        """Raises LuthierError for parameters that no tensor could have: names and settings stated for all, shares."""
        _strangers(plan, self)
        stated = {k: v for k, v in plan.parameters.items() if not isinstance(v, (list, Mapping))}
        MERGES.make(self.name, {self.fields[k].name: v for k, v in stated.items() if k in self.fields})
        for key in SHARES & set(self.cls.each) & set(stated):
            value = number(stated[key])
            if isinstance(value, (int, float)) and not 0 <= value <= 1:
                raise LuthierError(f"{key} {value} is out of range: give a number from 0 to 1")

    def at(self, item: Item) -> Merge:
        """The merge at one tensor."""
        settings = {}
        for key, f in self.fields.items():
            value = resolve(key, item.scopes, Where(item.name, item.t))
            if value is not None:
                settings[f.name] = value
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise LuthierError(f"{self.name}: {key} is missing at {item.name}: state it ({key}=…)")
        mark = tuple(sorted((k, repr(v)) for k, v in settings.items()))
        if mark not in self._made:
            self._made[mark] = MERGES.make(self.name, settings)
        return self._made[mark]

    def each(self, item: Item, names: Sequence[str], without: int | None) -> dict[str, list[float]]:
        """What every model but the base has of its own at one tensor."""
        out: dict[str, list[float]] = {key: [] for key in self.cls.each}
        for key, default in self.cls.each.items():
            for i, name in enumerate(item.inputs):
                if i == without:
                    continue
                value = resolve(key, (*item.own[i], *item.scopes), Where(name, item.t))
                value = default if value is None else value
                if value is None:
                    who = names[item.sources[i]]
                    raise LuthierError(
                        f"{self.name}: {key} is missing for {who} at {name}: state it ({key}=… for all models)"
                    )
                value = number(value)
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise LuthierError(
                        f"{self.name}: {key} of {names[item.sources[i]]} must be a number, got {value!r}"
                    )
                if not math.isfinite(value):
                    raise LuthierError(
                        f"{self.name}: {key} of {names[item.sources[i]]} is {value}: state a finite number"
                    )
                out[key].append(float(value))
        return out

    def inputs(self, item: Item, names: Sequence[str]) -> int | None:
        """Place of the base among the inputs where the merge wants it apart; the number of the others is checked."""
        kind = self.cls.base
        base = item.base if kind != "unused" else None
        if kind == "needed" and base is None:
            raise LuthierError(
                f"{self.name} needs the base that the models were tuned from at {item.name}: state it (base), in slices as one of the sources"
            )
        count = len(item.inputs) - (base is not None)
        if wanted := self.cls.wants(count):
            beside = " besides the base" if base is not None else ""
            raise LuthierError(f"{self.name} takes {wanted} models{beside}, got {count} at {item.name}")
        return base


def make_jobs(
    plan: MergePlan, layout: Layout, sources: Sequence[Source], method: Method, tokens: Any = None
) -> tuple[list[Job], list[str]]:
    """A job for every tensor, and notes on what was stated without effect.

    tokens: vocabularies made one (`rows`, `align`), for tensors whose rows are tokens. Errors: a parameter that no merge
    has, one that is missing or out of place, too few or too many models, tensors of unequal shapes.
    """
    names = [str(r) for r in plan.refs()]
    notes, odds = _strangers(plan, method), Counter[str]()
    jobs: list[Job] = []
    for item in layout.items:
        shapes = [sources[k].shape(n) for k, n in zip(item.sources, item.inputs, strict=True)]
        kinds = [sources[k].dtype(n) for k, n in zip(item.sources, item.inputs, strict=True)]
        aligned = tokens if tokens is not None and item.rows else None
        shape = _shape(item, shapes, names, aligned)
        if not all(k.is_floating_point for k in kinds):
            if len(set(kinds)) > 1:
                raise LuthierError(
                    f"{item.name} is of {' and of '.join(sorted(str(k)[6:] for k in set(kinds)))}: merge like with like"
                )
            jobs.append(Job(item, None, kinds[0], kinds[0], shape, {}))
            continue
        if narrow := next((k for k in kinds if k.itemsize == 1), None):
            raise LuthierError(f"{item.name} is stored as {str(narrow)[6:]}: dequantise the checkpoint first")
        arithmetic = DTYPES[plan.dtype] if plan.dtype else _promoted(kinds)
        base = method.inputs(item, names)
        merge = method.at(item)
        each = method.each(item, names, base)
        if odd := merge.odd(each):
            if not plan.field_file:
                raise LuthierError(f"{method.name}: {odd}")
            odds[odd] += 1
        widened = torch.float32 if type(merge).widens and arithmetic.itemsize == 2 else arithmetic
        written = DTYPES[plan.out_dtype] if plan.out_dtype else widened
        if not plan.out_dtype and not plan.dtype:
            written = _as_stored(item, sources, written)
        jobs.append(Job(item, merge, arithmetic, written, shape, each, base, aligned))
    notes += [f"{method.name}: {odd} ({n} of {len(jobs)} tensors)" for odd, n in odds.items()]
    return jobs, notes + _unread(plan, method, jobs)


def _as_stored(item: Item, sources: Sequence[Source], otherwise: torch.dtype) -> torch.dtype:
    """The base's type, where a delta was added in float32 to what a checkpoint holds in another."""
    for k, name in zip(item.sources, item.inputs, strict=True):
        source = sources[k]
        if isinstance(source, Tuned) and not source.rounded and name in source.base.places:
            return source.base.dtype(name)
    return otherwise


def _promoted(kinds: Sequence[torch.dtype]) -> torch.dtype:
    out = kinds[0]
    for kind in kinds[1:]:
        out = torch.promote_types(out, kind)
    return out


def _shape(item: Item, shapes: Sequence[tuple[int, ...]], names: Sequence[str], tokens: Any) -> tuple[int, ...]:
    if tokens is not None:
        if len({s[1:] for s in shapes}) == 1:
            return (tokens.rows, *shapes[0][1:])
    elif len(set(shapes)) == 1:
        return shapes[0]
    told = ", ".join(f"{names[k]} {list(s)}" for k, s in zip(item.sources, shapes, strict=True))
    rows = item.rows and len({s[1:] for s in shapes}) == 1
    remedy = (
        "state tokenizer_source (union, base, or a model)" if rows else "merge models of one architecture and width"
    )
    raise LuthierError(f"{item.name} differs in shape: {told}: {remedy}")


def _strangers(plan: MergePlan, method: Method) -> list[str]:
    """Notes on parameters that this merge does not use; one that no merge has is an error."""
    own, shared = set(method.cls.each), set(method.fields)
    everyone: set[str] | None = None
    notes = []
    for where, scope, inner in _scopes(plan):
        for key in scope or {}:
            if key in own or key in shared and not inner:
                continue
            if key in shared:
                notes.append(
                    f"{where}: {key} holds for all models of {method.name}; state it for all, it was not used here"
                )
                continue
            if everyone is None:
                everyone = {n for name in MERGES for n in (*Method(name).fields, *MERGES[name].each)}
            if key not in everyone | GONE:
                raise LuthierError(
                    f"{where}: merge '{method.name}' has no parameter '{key}': {nearest(key, own | shared, 'parameter')}"
                )
            notes.append(f"{where}: {method.name} has no parameter '{key}'; it was not used")
    return list(dict.fromkeys(notes))


def _unread(plan: MergePlan, method: Method, jobs: Sequence[Job]) -> list[str]:
    """Notes on the models' own settings of this merge that are stated and of which no tensor makes use."""
    unread = set(method.cls.each) - {key for j in jobs if j.merge is not None for key in j.merge.reads}
    stated = [(where, key) for where, scope, _ in _scopes(plan) for key in scope or {} if key in unread]
    return [
        f"{where}: with its other settings {method.name} has no use for '{key}'; it was not used"
        for where, key in stated
    ]


def _scopes(plan: MergePlan) -> list[tuple[str, Parameters | None, bool]]:
    """(where, parameters, whether they are one model's own) of all that is stated."""
    rows: list[tuple[str, Parameters | None, bool]] = [("parameters", plan.parameters, False)]
    slices = [(f"slices.{i}", s) for i, s in enumerate(plan.slices or [])]
    models = [(f"models.{i}", m) for i, m in enumerate(plan.models or [])]
    for name, module in (plan.modules or {}).items():
        rows.append((f"modules.{name}", module.parameters, False))
        slices += [(f"modules.{name}.slices.{i}", s) for i, s in enumerate(module.slices or [])]
        models += [(f"modules.{name}.models.{i}", m) for i, m in enumerate(module.models or [])]
    for where, part in slices:
        rows.append((where, part.parameters, False))
        rows += [(f"{where}.sources.{j}", s.parameters, True) for j, s in enumerate(part.sources)]
    return rows + [(where, m.parameters, True) for where, m in models]


def replaced(jobs: Sequence[Job], each: Mapping[str, Sequence[float]]) -> list[Job]:
    """The jobs with other settings of the models, the same at every tensor."""
    return [
        j if j.merge is None else dataclasses.replace(j, each={**j.each, **{k: list(v) for k, v in each.items()}})
        for j in jobs
    ]
