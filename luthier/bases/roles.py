"""Architecture-independent roles for the parts of any model, and their selection by patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from luthier.bases.families import COMMON, FAMILIES, FUSED, ROLES
from luthier.bases.inspection import EXPERT, Inspector, layer_prefixes
from luthier.bases.part import Part, Raw, raw_parts
from luthier.errors import LuthierError, nearest

LINEAR = ("attn", "cross", "ffn", "shared")
SYNONYMS = {"all-linear": "linear", "mlp": "ffn", "attention": "attn", "embeddings": "embed", "lm_head": "head"}


class Roles:
    """The parts of one model with their roles. Every parameter name of the model belongs to exactly one part."""

    def __init__(self, model: nn.Module, stated: Mapping[str, str] | None = None) -> None:
        """model: any transformers model, also on the meta device. stated: module-name pattern -> role (base.roles).

        Raises LuthierError where a part has no role, naming what to state.
        """
        self.config: Any = model.config.get_text_config() if hasattr(model, "config") else None  # pyright: ignore
        self.layers: list[str] = layer_prefixes(model)
        self.parts: list[Part] = _parts(model, self.layers, stated or {})
        self.owner: dict[str, Part] = {name: part for part in self.parts for name in part.parameters}

    @property
    def layer_count(self) -> int:
        """Layers of one stack; the longer one's in encoder–decoder models."""
        return 1 + max((p.layer for p in self.parts if p.layer is not None), default=-1)

    @cached_property
    def hidden(self) -> int:
        """Width of the hidden states."""
        final = [p.d_in for p in self.parts if p.role.startswith("norm") and p.layer is not None and p.role[5:] != "q"]
        stated = getattr(self.config, "hidden_size", None) or getattr(self.config, "d_model", None)
        return int(stated or final[0])

    @cached_property
    def head_dim(self) -> int:
        """Width of one attention head."""
        stated = getattr(self.config, "head_dim", None) or getattr(self.config, "d_kv", None)
        return int(stated or self.hidden // self.n_heads)

    @cached_property
    def n_heads(self) -> int:
        """Query heads."""
        return int(self._setting("num_attention_heads", "n_head", "num_heads"))

    @cached_property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.n_heads)

    @property
    def d_kv(self) -> int:
        """Width of the keys of one layer, all heads together."""
        return self.n_kv_heads * self.head_dim

    @cached_property
    def attention(self) -> dict[str, str]:
        """Layer module name -> name of the module that computes its self-attention (it owns the query)."""
        query = [p for p in self.parts if p.role in ("attn.q", "attn.qkv", "attn.q_down")]
        return {at: p.module.rpartition(".")[0] for p in query for at in self.layers if p.name.startswith(at + ".")}

    @cached_property
    def feed_forward(self) -> dict[str, str]:
        """Layer module name -> name of the one module that is its dense feed-forward part. Layers whose part is no module
        of its own (OPT's, BERT's) or is made of experts are not in it."""
        dense = [p for p in self.parts if p.role.startswith("ffn.") and p.kind in ("linear", "conv1d")]
        out = {}
        for at in self.layers:
            around = {p.module.rpartition(".")[0] for p in dense if p.name.startswith(at + ".")} - {at}
            if len(around) == 1:
                out[at] = around.pop()
        return out

    def _setting(self, *names: str) -> Any:
        found = next((v for n in names if (v := getattr(self.config, n, None)) is not None), None)
        if found is None:
            raise LuthierError(f"the model's config states none of {', '.join(names)}; add it to config.json")
        return found

    def by_role(self, role: str) -> list[Part]:
        """Parts that play exactly this role."""
        return [p for p in self.parts if p.role == role]

    def select(
        self, patterns: str | Sequence[str], except_: Sequence[str] = (), layers: Iterable[int] | None = None
    ) -> list[Part]:
        """The parts that match any of the patterns and none of the exceptions, in model order.

        A pattern is a role or its beginning ("attn", "attn.q"), a glob over roles ("*.q"), one of "linear" (every
        matrix of attention, feed-forward and shared experts), "all"; or a module name, its end ("q_proj"), a glob over
        names ("*.mlp.*"), or "re:" and a regular expression for the whole name. "decoder:attn" looks at one stack.
        A fused part answers to the roles it holds. layers: only parts in these layers; negative from the end.
        Raises LuthierError for a pattern without a match, or a layer that is not there.
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        chosen = {part.name for pattern in patterns for part in self._matching(pattern)}
        chosen -= {part.name for pattern in except_ for part in self._matching(pattern)}
        wanted = None if layers is None else {self._layer(n) for n in layers}
        return [p for p in self.parts if p.name in chosen and (wanted is None or p.layer in wanted)]

    def _layer(self, number: int) -> int:
        if not -self.layer_count <= number < self.layer_count:
            raise LuthierError(f"layers: no layer {number}; the base has layers 0 to {self.layer_count - 1}")
        return number % self.layer_count

    def _matching(self, pattern: str) -> list[Part]:
        stack, _, rest = pattern.rpartition(":") if pattern.startswith(("encoder:", "decoder:")) else ("", "", pattern)
        rest = SYNONYMS.get(rest, rest)
        found = [p for p in self.parts if (not stack or p.stack == stack) and matches(p, rest)]
        if not found:
            known = {p.role for p in self.parts} | {p.role.partition(".")[0] for p in self.parts}
            known |= {p.leaf for p in self.parts if not p.leaf.isdigit()} | {"linear", "all"}
            raise LuthierError(f"sites: '{pattern}' matches no part of this base; {nearest(rest, known, 'site')}")
        return found

    def rows(self, part: Part, role: str) -> torch.Tensor:
        """Which outputs of a part play a role: indices (n,) along its d_out; all of them where it is not fused.

        GPT-NeoX and BLOOM interleave query, key and value head by head; GPT-2 and Phi-3 hold them one after another.
        """
        if part.role == role:
            return torch.arange(part.d_out)
        if role not in FUSED.get(part.role, ()):
            raise LuthierError(f"{part.name} plays {part.role}, which does not hold {role}")
        at = FUSED[part.role].index(role)
        if part.role.endswith("gate_up"):
            return torch.arange(part.d_out).view(2, -1)[at]
        if part.role == "attn.kv":
            raise LuthierError(f"{part.name}: how keys and values lie in it is not known; select the whole part")
        model_type = getattr(self.config, "model_type", "")
        if model_type in ("gpt_neox", "bloom"):
            return torch.arange(part.d_out).view(self.n_heads, 3, self.head_dim)[:, at].reshape(-1)
        sizes = [self.n_heads * self.head_dim, self.d_kv, self.d_kv]
        if sum(sizes) != part.d_out or model_type not in FAMILIES:
            raise LuthierError(f"{part.name}: how q, k and v lie in it is not known; select the whole part")
        return torch.arange(part.d_out).split(sizes)[at]


def matches(part: Part, pattern: str) -> bool:
    """Whether one pattern, as in Roles.select but without stack or synonyms, matches a part."""
    if pattern == "all":
        return True
    if pattern == "linear":
        return part.kind in ("linear", "conv1d") and part.role.split(".")[0] in LINEAR
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], part.name) is not None
        except re.error as error:
            raise LuthierError(f"sites: '{pattern}' is no regular expression ({error}); correct it") from error
    roles = (part.role, *FUSED.get(part.role, ()))
    if any(r == pattern or r.startswith(pattern + ".") or fnmatchcase(r, pattern) for r in roles):
        return True
    names = (part.name, *part.parameters)
    return any(n == pattern or n.endswith("." + pattern) or fnmatchcase(n, pattern) for n in names)


def _parts(model: nn.Module, layers: list[str], stated: Mapping[str, str]) -> list[Part]:
    for pattern, role in stated.items():
        if role not in ROLES:
            raise LuthierError(f"base.roles: '{pattern}: {role}' is no role; {nearest(role, ROLES, 'role')}")
    family = getattr(getattr(model, "config", None), "model_type", "")
    text = getattr(model.config.get_text_config(), "model_type", "") if hasattr(model, "config") else ""  # pyright: ignore
    table = _compiled(FAMILIES.get(family) or FAMILIES.get(text, {}))
    common = _compiled(COMMON)
    inspector = Inspector(model, layers)
    two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    ties = _ties(model)
    parts, unknown, used = [], [], set()
    for raw in raw_parts(model):
        own = next((p for p in stated if _stated(p, raw.name)), None)
        used |= {own} if own else set()
        role = stated[own] if own else _row(table, raw.name) or inspector.role(raw) or _row(common, raw.name)
        role = role or ("norm.other" if raw.kind == "norm" else None)
        if role is None:
            unknown.append(raw)
            continue
        parts.append(_part(raw, role, layers, two_stacks, ties))
    if unknown:
        raise LuthierError(_unknown_text(model, unknown))
    if idle := [p for p in stated if p not in used]:
        raise LuthierError(
            f"base.roles: '{idle[0]}' matches no module; {nearest(idle[0], [p.name for p in parts][:40])}"
        )
    return parts


def _part(raw: Raw, role: str, layers: list[str], two_stacks: bool, ties: Mapping[str, list[str]]) -> Part:
    inside = any(raw.name.startswith(at + ".") for at in layers)
    number = re.search(r"\.(\d+)\.", raw.name) if inside else None
    expert = EXPERT.search(raw.name)
    words = raw.name.split(".")
    stack = next((w for w in words if w in ("encoder", "decoder")), None) if two_stacks else None
    tied = sorted({_owner(n, raw.kind) for p in raw.parameters for n in ties.get(p, [])} - {raw.name})
    return Part(
        name=raw.name,
        role=role,
        layer=int(number[1]) if number else None,
        stack=stack,
        kind=raw.kind,
        parameters=raw.parameters,
        d_in=int(raw.d_in),
        d_out=int(raw.d_out),
        bias=raw.bias,
        expert=int(expert[2]) if expert else None,
        tied_with=tuple(tied),
        experts=int(raw.experts),
        transposed=raw.transposed,
        offset=raw.offset,
    )


def _owner(parameter: str, kind: str) -> str:
    return parameter if kind == "fused-experts" else parameter.rpartition(".")[0]


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> every name of the same tensor, for tensors with several names."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return {n: same for same in names.values() if len(same) > 1 for n in same}


def _compiled(table: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(r"(^|\.)" + re.escape(p).replace(r"\#", r"\d+") + "$"), role) for p, role in table.items()]


def _row(table: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    return next((role for pattern, role in table if pattern.search(name)), None)


def role_by_name(family: str, name: str) -> str:
    """Role of the module or parameter called `name` in a family (transformers' model_type), by the table of names alone;
    "" where the family has no table or the name no row."""
    table = _compiled(FAMILIES.get(family, {}))
    return _row(table, name) or _row(table, name.rpartition(".")[0]) or ""


def _stated(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def _unknown_text(model: nn.Module, unknown: list[Raw]) -> str:
    kinds = {re.sub(r"\.\d+(?=\.|$)", ".*", raw.name): None for raw in unknown}
    shown = ", ".join(list(kinds)[:6]) + (f" and {len(kinds) - 6} more" if len(kinds) > 6 else "")
    example = next(iter(kinds))
    example = f"*{example[example.index('.*') + 2 :]}" if ".*" in example else example
    return (
        f"{type(model).__name__}: no role known for {shown}; state it in the plan, as in "
        f"base: {{roles: {{'{example}': other}}}} (docs/bases.md lists the roles: attn.q, ffn.up, norm.attn, mixer …)"
    )
