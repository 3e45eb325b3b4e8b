"""A whole delta onto a model: all of its pieces or none, on its own base or not at all."""

from __future__ import annotations

import torch
from torch import nn

from luthier.attach.attached import Attached, attached
from luthier.bases.fingerprint import base_tensors, compare, fingerprint
from luthier.delta.artefact import Delta, supply_attacher
from luthier.errors import LuthierError


def apply(model: nn.Module, delta: Delta, *, strict: bool = True) -> Attached:
    """Attaches every piece of a delta, or none. With `strict`, a model that is not the delta's base is an error, whatever else
    is on it.

    Fresh heads and rows of new tokens are not in a fingerprint: a base that has them is left to `luthier.load`.
    """
    handle = attached(model)
    grown = delta.base.get("new_tokens") or delta.base.get("kind") == "classify"
    if strict and delta.base.get("fingerprint") and not grown:
        with handle.off():
            _same_base(model, delta)
    done = []
    try:
        for piece in delta.pieces:
            done.append(piece.name)
            handle.add(piece)
    except Exception:
        for name in reversed(done):
            if name in handle.pieces:
                handle.detach(name)
        raise
    return handle


def _same_base(model: nn.Module, delta: Delta) -> None:
    stated, here = delta.base["fingerprint"], fingerprint(model)
    same = compare(stated, here)
    exact = any(piece.form.at == "base" for piece in delta.pieces)
    if same == "different":
        raise LuthierError(
            f"the delta was made on base {stated}, this base is {here}: load the right base or port the delta"
        )
    if same != "same" and exact and not _holds(model, getattr(torch, stated.rpartition(":")[2])):
        raise LuthierError(
            f"the delta holds exact differences from base {stated}, this base is {here} (the same in another type): "
            f"load the base with dtype: {stated.rpartition(':')[2]}"
        )


def _holds(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a model in a wider type holds nothing but values of this one, as one read from a checkpoint in it does."""
    return all(
        torch.promote_types(t.dtype, dtype) == t.dtype and torch.equal(t.to(dtype).to(t.dtype), t)
        for _, t in base_tensors(model)
        if t.is_floating_point()
    )


def _detach(model: nn.Module, delta: Delta) -> None:
    handle = attached(model)
    for piece in reversed(delta.pieces):
        handle.detach(piece.name)


supply_attacher(apply=apply, detach=_detach)
