"""Where a delta changed the weights, and how much, by site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Change:
    """What a delta does at one site: the exact change of its weight, or a note why there is none (a form that edits
    activations). `base` is the base's weight there, for the relative size."""

    site: str
    role: str
    layer: int | None
    delta: torch.Tensor | None = None
    base: torch.Tensor | None = None
    note: str | None = None


@dataclass(frozen=True)
class Norm:
    """Frobenius norms of one site; `relative` is the change's over the base's."""

    site: str
    role: str
    layer: int | None
    norm: float | None
    base_norm: float | None
    relative: float | None
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def norms(changes: Iterable[Change]) -> list[Norm]:
    """One row a site, in the given order; holds one site's tensors at a time when handed a generator."""
    return [_norm(change) for change in changes]


def _norm(change: Change) -> Norm:
    if change.delta is None:
        return Norm(change.site, change.role, change.layer, None, None, None, change.note or "activations only")
    size = _frobenius(change.delta)
    base = None if change.base is None else _frobenius(change.base)
    return Norm(change.site, change.role, change.layer, size, base, size / base if base else None, change.note)


def _frobenius(tensor: torch.Tensor) -> float:
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
