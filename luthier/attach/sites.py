"""From a base's parts to the sites of forms and choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from luthier.attach.weights import module_at
from luthier.bases.part import Part
from luthier.bases.roles import Roles
from luthier.delta import Form, Site
from luthier.errors import LuthierError

WHOLE = ("attention", "feed-forward", "layer", "model")
"""Kinds of site that are no part with a weight."""
MODULES = {"attn.module": "attention", "ffn.module": "feed-forward"}
"""Patterns of the whole self-attention and feed-forward modules, for forms that can sit on these and on parts."""


def sites_of(
    roles: Roles,
    patterns: str | Sequence[str],
    except_: Sequence[str] = (),
    layers: Iterable[int] | None = None,
    kinds: Sequence[str] | None = None,
    *,
    optional: bool = False,
) -> list[Site]:
    """The sites that match any pattern and no exception, in model order; patterns as in `Roles.select`.

    Where `kinds` (a form's own) names attention, layer or model, patterns choose among layers instead: the kind's name,
    'all', or a glob over module names. 'all' passes over parts of other kinds; any other pattern that meets one is an
    error of the form's own at building. optional: patterns that this base has no part for are left out, as long as
    one matches (for a form's default sites). layers: as in `Roles.select`. A form that takes parts and whole modules is
    put on the latter by "attn.module" and "ffn.module".
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    whole = [k for k in kinds or () if k in WHOLE]
    if whole and set(whole) == set(kinds or ()):
        return _whole(roles, whole[0], patterns, except_, layers)
    modules = [q for q in patterns if MODULES.get(q) in whole]
    if modules:
        parts = [q for q in patterns if q not in modules]
        found = [s for q in modules for s in _whole(roles, MODULES[q], [q], except_, layers)]
        return found + (sites_of(roles, parts, except_, layers, kinds, optional=optional) if parts else [])
    if optional:
        patterns = [q for q in patterns if _matches(roles, q)] or patterns
    parts = roles.select(patterns, except_, layers)
    found = [site_of(roles, part) for part in parts]
    if kinds is not None and "all" in patterns:
        named = {p.name for q in patterns if q != "all" for p in roles.select([q], (), layers)}
        found = [s for s, p in zip(found, parts, strict=True) if s.kind in kinds or p.name in named]
    return found


def sites_for(
    roles: Roles,
    form: Form,
    patterns: str | Sequence[str] | None = None,
    except_: Sequence[str] = (),
    layers: Iterable[int] | None = None,
) -> list[Site]:
    """The sites of one form: the stated patterns, or by default the form's own as far as this base has them."""
    own = patterns is None
    return sites_of(roles, form.sites if patterns is None else patterns, except_, layers, form.kinds, optional=own)


def site_of(roles: Roles, part: Part) -> Site:
    """The site at a part's weight; a part without a weight (a lone bias) is described by what it holds."""
    leaf = part.parameters[0].rpartition(".")[2]
    if part.kind == "fused-experts" and part.transposed:
        raise LuthierError(
            f"{part.name} stores its experts as (expert, in, out), which forms cannot address: leave it out"
        )
    shape = {
        "linear": (part.d_out, part.d_in),
        "conv1d": (part.d_in, part.d_out),
        "embedding": (part.d_in, part.d_out),
        "norm": (part.d_in,),
        "fused-experts": (part.experts, part.d_out, part.d_in),
    }.get(part.kind, (part.d_out, part.d_in) if part.d_out != part.d_in else (part.d_out,))
    return Site(
        name=part.module,
        role=part.role,
        layer=part.layer,
        kind="offset-norm" if part.offset else part.kind,
        d_in=part.d_in,
        d_out=part.d_out,
        bias=part.bias and leaf != "bias",
        parameter=leaf,
        shape=shape,
        experts=part.experts,
        layers=roles.layer_count,
    )


def parameter_items(roles: Roles, model: nn.Module | None = None) -> dict[str, Site]:
    """Every parameter of the base by its full name, with a site that describes it: what choices choose from.

    A bias is an item of its own (parameter='bias', shape (d_out,)). Of tied parameters only the first name is an item.
    model: where given, shapes are read there; else they follow from the parts, which cannot tell a square unnamed
    matrix from a vector.
    """
    items: dict[str, Site] = {}
    seen: set[str] = set()
    for part in roles.parts:
        if seen & set(part.tied_with) and part.kind in ("embedding", "linear"):
            items |= {n: _item(roles, part, n, model) for n in part.parameters[1:]}
            continue
        seen.add(part.name)
        items |= {n: _item(roles, part, n, model) for n in part.parameters}
    return items


def _item(roles: Roles, part: Part, name: str, model: nn.Module | None) -> Site:
    site = site_of(roles, dataclasses.replace(part, transposed=False))
    path, _, leaf = name.rpartition(".")
    shape = site.shape if name == part.parameters[0] and leaf != "bias" else (part.d_out,)
    if part.experts and leaf.endswith("bias"):
        shape = (part.experts, part.d_out)
    if model is not None:
        shape = tuple(module_at(model, path)._parameters[leaf].shape)  # pyright: ignore[reportOptionalMemberAccess]
    kind = "norm" if site.kind == "offset-norm" else site.kind
    kind = "other" if leaf.endswith("bias") and kind not in ("norm",) else kind
    return dataclasses.replace(site, name=path, parameter=leaf, shape=shape, kind=kind, bias=False)


def _whole(
    roles: Roles, kind: str, patterns: Sequence[str], except_: Sequence[str], layers: Iterable[int] | None
) -> list[Site]:
    if kind == "model":
        return [Site("", "model", None, kind, roles.hidden, roles.hidden, layers=roles.layer_count)]
    wanted = None if layers is None else {n % roles.layer_count for n in layers}
    sites = []
    for at in roles.layers:
        inside = {"attention": roles.attention, "feed-forward": roles.feed_forward}.get(kind)
        name = at if inside is None else inside.get(at, "")
        number = int(next(word for word in reversed(at.split(".")) if word.isdigit()))

        def hit(patterns: Sequence[str], name: str = name) -> bool:
            own = (kind, "all", *(() if kind == "feed-forward" else ("attn",)))
            return any(q in own or MODULES.get(q) == kind or fnmatchcase(name, q) for q in patterns)

        if name and (wanted is None or number in wanted) and hit(patterns) and not hit(except_):
            size = (roles.n_kv_heads, roles.head_dim) if kind == "attention" else (0, 0)
            role = {"attention": "attn", "feed-forward": "ffn"}.get(kind, "layer")
            sites.append(
                Site(
                    name, role, number, kind, roles.hidden, roles.hidden,
                    kv_heads=size[0], head_dim=size[1], layers=roles.layer_count,
                )
            )  # fmt: skip
    if not sites:
        own = "its parts, as ffn.down" if kind == "feed-forward" else f"'{kind}' or a glob of names"
        raise LuthierError(f"sites: {', '.join(patterns)} matches no {kind} module of this base; state {own}")
    return sites


def _matches(roles: Roles, pattern: str) -> bool:
    try:
        return bool(roles.select([pattern]))
    except LuthierError:
        return False
