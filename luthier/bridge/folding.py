"""Folding for a plain checkpoint: tied embeddings come apart where one use alone changes, biases that the config can
carry are made, and a change that rounding swallows is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from luthier.attach import Attached, FoldReport
from luthier.bridge.target import Target
from luthier.delta import No
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError

MAX_LOST = 0.5
"""Largest share of a change that rounding may swallow when it is folded."""
BIASES = {
    "attention_bias": ("attn.q", "attn.k", "attn.v", "attn.o"),
    "mlp_bias": ("ffn.gate", "ffn.up", "ffn.down"),
}
"""Switch in a config -> the roles that then all carry a bias."""


def folded(handle: Attached, max_lost: float = MAX_LOST) -> FoldReport:
    """Folds, and takes it back where rounding swallowed more than the stated share of a change."""
    report = handle.fold()
    if report.lost > max_lost:
        handle.unfold()
        raise LuthierError(
            f"folding loses {report.lost:.0%} of the change at {report.worst} to rounding (allowed {max_lost:.0%}): load the "
            "base with dtype: float32, or keep the delta unfolded"
        )
    return report


def add_biases(on: Target, handle: Attached) -> list[str]:
    """Zero biases at every module of a group whose config switch exists, where a form needs one that the base lacks.

    Gives the switches turned on. A need that no switch covers is left for fold, which refuses it.
    """
    switched = []
    needing = {role for placed in handle.placed.values() for q in placed if (role := _needs(q))}
    for switch, roles in BIASES.items():
        parts = [p for p in on.roles.parts if p.role in roles]
        bare = all(not p.bias for p in parts)
        if not (needing & set(roles)) or getattr(on.model.config, switch, None) is not False or not bare:
            continue
        for part in parts:
            module = on.model.get_submodule(part.name)
            like = module.weight
            module._parameters["bias"] = nn.Parameter(
                torch.zeros(part.d_out, dtype=like.dtype, device=like.device), requires_grad=False
            )
        setattr(on.model.config, switch, True)
        switched.append(switch)
    return switched


def remove_biases(on: Target, switched: Sequence[str]) -> None:
    """Takes `add_biases` back."""
    for switch in switched:
        setattr(on.model.config, switch, False)
        for part in on.roles.parts:
            if part.role in BIASES[switch]:
                on.model.get_submodule(part.name)._parameters["bias"] = None


def _needs(q: Any) -> str:
    """The role of a placed piece's site where it changes a bias that is not there; else ""."""
    site = q.state.site
    if q.state.bias is not None or isinstance(q.form.dense, No) or site.kind not in ("linear", "conv1d"):
        return ""
    change = q.form.delta(q.state)
    return site.role if not isinstance(change, No) and "bias" in change else ""


def tied_sites(on: Target, deltas: Sequence[Delta]) -> list[str]:
    """Modules whose weight is tied and that a piece changes by hooks, so for one of its uses only."""
    tied = {part.name for part in on.roles.parts if part.tied_with}
    return sorted(
        {s.name for d in deltas for q in d.pieces if q.form.at != "base" for s in q.sites.values() if s.name in tied}
    )


def untie(on: Target, deltas: Sequence[Delta]) -> list[tuple[nn.Module, nn.Parameter]]:
    """Gives the head a matrix of its own where folding would move both; what to hand to `retie`. The config says so."""
    if not tied_sites(on, deltas):
        return []
    table: Any = on.model.get_input_embeddings()
    undo = []
    for module in on.model.modules():
        if module is not table and module._parameters.get("weight") is table.weight:
            undo.append((module, table.weight))
            module._parameters["weight"] = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    on.model.config.tie_word_embeddings = False
    return undo


def retie(on: Target, undo: Sequence[tuple[nn.Module, nn.Parameter]]) -> None:
    """Takes `untie` back."""
    for module, weight in undo:
        module._parameters["weight"] = weight
        on.model.config.tie_word_embeddings = True
