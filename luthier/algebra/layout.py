"""Which tensors a merge writes, and from which tensors of which models each of them comes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from luthier.algebra.sources import Source
from luthier.bases.load import RECOMPUTED
from luthier.bases.roles import role_by_name
from luthier.errors import LuthierError, nearest
from luthier.plan.merge import Input, MergePlan, Parameters, Ref, Slice, SliceInput

NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")
"""The first number in a name is its layer; experts and the like come later."""
FIRST = ("embed", "wte", "wpe", "shared")
"""Parts of names of tensors that stand before the layers; others without a layer stand behind them."""


@dataclass(frozen=True)
class Item:
    """One tensor of the result."""

    name: str
    sources: tuple[int, ...]
    """Which models it is merged from, by their place in the plan's refs()."""
    inputs: tuple[str, ...]
    """Its name in each of them."""
    base: int | None
    """Place of the base among them."""
    scopes: tuple[Parameters | None, ...] = ()
    """Where shared parameters are looked up, innermost first."""
    own: tuple[tuple[Parameters | None, ...], ...] = ()
    """Where each model's parameters are looked up before those."""
    t: float = 0.0
    """Depth within its stretch of layers, 0 to 1."""
    layer: int | None = None
    layers: int = 0
    role: str = ""
    rows: bool = False
    """Whether its rows are tokens."""


@dataclass
class Layout:
    """All tensors of the result, and how many layers each part of the model has."""

    items: list[Item]
    layers: dict[str, int]
    """Part ("default" where there is one only) -> layers."""
    origins: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Part -> (model, its layer) that each layer's settings in a config are taken from."""
    notes: list[str] = field(default_factory=list)
    """What is odd about it, for the report."""


def lay_out(plan: MergePlan, sources: Sequence[Source], listed: bool) -> Layout:
    """The tensors that `plan` makes of `sources` (in the order of its refs()).

    listed: whether a base that is not among the models is an input too, at the last place, as in mergekit's files.
    Errors: a layer that a model lacks, stretches of unequal length, a tensor that one of the models lacks or has alone.
    """
    refs = plan.refs()
    tensors = [_Tensors(source) for source in sources]
    parts = _parts(tensors[0] if plan.base is None else tensors[refs.index(plan.base)])
    stretches = _stretches(plan, tensors, refs, parts, listed)
    layout = Layout([], {})
    for part, slices in stretches.items():
        _part(layout, part, slices, plan, refs, tensors, len(stretches) == 1)
    return layout


class _Tensors:
    """A source's names by part and layer."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.loose: list[str] = []
        self.layers: dict[str, dict[int, dict[str, str]]] = {}
        """Part's prefix -> layer -> name with '#' for the number -> name."""
        for name in source.names():
            if RECOMPUTED.search(name):
                continue
            found = NUMBER.search(name)
            if found is None:
                self.loose.append(name)
                continue
            prefix = name[: found.start()]
            template = f"{prefix}#{name[found.end() :]}"
            self.layers.setdefault(prefix, {}).setdefault(int(found[1]), {})[template] = name
        gaps = [p for p, table in self.layers.items() if max(table) >= len(table)]
        for prefix in (
            gaps if len(gaps) < len(self.layers) else []
        ):  # no layers: places of a sequence, some without tensors
            self.loose += [name for place in self.layers.pop(prefix).values() for name in place.values()]
        self.family = str(source.config.get("model_type", ""))

    def count(self, prefix: str) -> int:
        return 1 + max(self.layers.get(prefix, {}), default=-1)

    def tied_to(self, name: str) -> str | None:
        """The tensor that stands in for one that is not stored: the embedding, for a head."""
        if not is_head(name):
            return None
        return next((n for n in self.loose if n.endswith(EMBEDDINGS)), None)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def is_head(name: str) -> bool:
    """Whether a tensor is a matrix from hidden states to logits."""
    return name.endswith(HEADS)


def has_token_rows(name: str) -> bool:
    """Whether a tensor's rows are tokens: embedding, head and the head's bias."""
    return name.endswith((*EMBEDDINGS, *HEADS, "lm_head.bias"))


def _parts(tensors: _Tensors) -> dict[str, str]:
    """Part's name -> prefix of its layers."""
    prefixes = sorted(tensors.layers)
    if len(prefixes) == 1:
        return {"default": prefixes[0]}
    return {p.rstrip(".") or "default": p for p in prefixes}


def _stretches(
    plan: MergePlan, tensors: Sequence[_Tensors], refs: Sequence[Ref], parts: Mapping[str, str], listed: bool
) -> dict[str, list[Slice]]:
    """Part's prefix -> its slices, whatever the plan states."""

    def whole(models: Sequence[Input], prefix: str) -> list[Slice]:
        rows = list(models)
        if listed and plan.base is not None and all(m.model != plan.base for m in rows):
            rows.append(Input.model_validate({"model": plan.base}))
        counts = {str(m.model): tensors[refs.index(m.model)].count(prefix) for m in rows}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} has {count} layers" for name, count in counts.items())
            raise LuthierError(
                f"{told}: merge models of equally many, or state which go together "
                "(slices: [{sources: [{model: …, layer_range: [0, 1]}, …]}])"
            )
        return [
            Slice.model_construct(
                sources=[
                    SliceInput.model_construct(
                        model=m.model,
                        parameters=m.parameters,
                        layer_range=(0, tensors[refs.index(m.model)].count(prefix)),
                    )
                    for m in rows
                ],
                base_model=None,
                parameters=None,
            )
        ]

    if plan.models is not None:
        return {prefix: whole(plan.models, prefix) for prefix in parts.values()} or {"": whole(plan.models, "")}
    if plan.slices is not None:
        if len(parts) != 1:
            raise LuthierError(f"slices: the model has several parts: state modules: with {', '.join(parts)}")
        return {next(iter(parts.values())): plan.slices}
    out = {}
    for name, module in (plan.modules or {}).items():
        prefix = parts.get(name) or next((p for p in parts.values() if name in p.split(".")), None)
        if prefix is None:
            raise LuthierError(f"modules: the model has no part '{name}': {nearest(name, parts, 'part')}")
        out[prefix] = module.slices or whole(module.models or [], prefix)
        if module.parameters:
            for part in out[prefix]:
                part.parameters = {**module.parameters, **(part.parameters or {})}
    if missing := [n for n, p in parts.items() if p not in out]:
        raise LuthierError(f"modules: {missing[0]} is missing: the model has the parts {', '.join(parts)}")
    return out


def _part(
    layout: Layout,
    prefix: str,
    slices: Sequence[Slice],
    plan: MergePlan,
    refs: Sequence[Ref],
    tensors: Sequence[_Tensors],
    alone: bool,
) -> None:
    first = not layout.items
    places = [[refs.index(s.model) for s in part.sources] for part in slices]
    for part in slices:
        met = [s.model.place for s in part.sources]
        if twice := next((s.model for s in part.sources if met.count(s.model.place) > 1), None):
            raise LuthierError(f"{twice} is named twice for the same layers: name each model once")
    if first or alone:
        layout.items += _loose(slices[0], places[0], plan, refs, tensors, before=True)
    number = 0
    total = sum(s.sources[0].layer_range[1] - s.sources[0].layer_range[0] for s in slices)
    origins: list[tuple[int, int]] = []
    for part, where in zip(slices, places, strict=True):
        lengths = [s.layer_range[1] - s.layer_range[0] for s in part.sources]
        if len(set(lengths)) > 1 or lengths[0] < 0 or lengths[0] == 0 and plan.slices:
            raise LuthierError(
                f"layer_range: {', '.join(f'{s.model} {list(s.layer_range)}' for s in part.sources)}: the models of a "
                "stretch must give equally many layers, at least one"
            )
        for s, k in zip(part.sources, where, strict=True):
            if s.layer_range[0] < 0 or s.layer_range[1] > tensors[k].count(prefix):
                raise LuthierError(
                    f"layer_range: {s.model} has {tensors[k].count(prefix)} layers, {list(s.layer_range)} is asked for"
                )
        for i in range(lengths[0]):
            t = i / (lengths[0] - 1) if lengths[0] > 1 else 1.0
            layers = [
                tensors[k].layers[prefix].get(s.layer_range[0] + i, {})
                for s, k in zip(part.sources, where, strict=True)
            ]
            for template in dict.fromkeys(t for layer in layers for t in layer):
                found = [layer.get(template) for layer in layers]
                name = template.replace("#", str(number), 1)
                _all_there(name, found, [refs[k] for k in where])
                item = _item(name, where, [str(f) for f in found], part, plan, refs, tensors, t)
                layout.items.append(_at(item, number, total))
            base = refs.index(plan.base) if plan.base in [s.model for s in part.sources] else where[0]
            origins.append((base, part.sources[where.index(base)].layer_range[0] + i))
            number += 1
    if first or alone:
        most = len(places[0]) if plan.field_file else len(places[-1])
        if most < len(places[-1]):
            layout.notes.append(
                f"the tensors behind the layers are merged from the first {most} models of the last stretch, as mergekit does, "
                "which takes as many as the first stretch has: name as many in both"
            )
        layout.items += _loose(slices[-1], places[-1][:most], plan, refs, tensors, before=False)
    layout.layers[prefix] = number
    layout.origins[prefix] = origins


def _at(item: Item, layer: int, layers: int) -> Item:
    return Item(**{**item.__dict__, "layer": layer, "layers": layers})


def _loose(
    part: Slice, where: Sequence[int], plan: MergePlan, refs: Sequence[Ref], tensors: Sequence[_Tensors], before: bool
) -> Iterator[Item]:
    """The tensors outside the layers: those in front of them, or those behind."""
    own = [tensors[k] for k in where]
    for name in dict.fromkeys(n for each in own for n in each.loose):
        if any(f in name for f in FIRST) != before:
            continue
        found = [name if name in each.source else each.tied_to(name) for each in own]
        _all_there(name, found, [refs[k] for k in where])
        yield _item(name, where, [str(f) for f in found], part, plan, refs, tensors, 0.0)


def _all_there(name: str, found: Sequence[str | None], refs: Sequence[Ref]) -> None:
    if lacking := [str(r) for r, f in zip(refs, found, strict=True) if f is None]:
        has = next(str(r) for r, f in zip(refs, found, strict=True) if f is not None)
        raise LuthierError(
            f"{lacking[0]} lacks {name}, which {has} has: merge models of one architecture, or copy it again"
        )


def _item(
    name: str,
    where: Sequence[int],
    inputs: Sequence[str],
    part: Slice,
    plan: MergePlan,
    refs: Sequence[Ref],
    tensors: Sequence[_Tensors],
    t: float,
) -> Item:
    base = part.base_model or plan.base
    at = refs.index(base) if base is not None else None
    return Item(
        name,
        tuple(where),
        tuple(inputs),
        list(where).index(at) if at is not None and at in where else None,
        (part.parameters, plan.parameters),
        tuple((s.parameters,) for s in part.sources[: len(where)]),
        t,
        None,
        0,
        _role(tensors[where[0]].family, name),
        has_token_rows(name),
    )


@lru_cache(maxsize=65536)
def _role(family: str, name: str) -> str:
    return role_by_name(family, name)
