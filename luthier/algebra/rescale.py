"""A delta whose change is multiplied by a factor of its own at every site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from luthier.delta import MERGES, No, Site, Stack
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError


def rescaled(delta: Delta, factor: Callable[[Site], float]) -> Delta:
    """The same numbers under other scales; a piece whose sites differ in their factor becomes one piece a factor.

    Seals and probes do not come along: they were taken of the change as it was. Errors: a form that cannot be scaled.
    """
    pieces: list[Piece] = []
    for piece in delta.pieces:
        groups: dict[float, list[str]] = {}
        for key, site in piece.sites.items():
            groups.setdefault(factor(site), []).append(key)
        if isinstance(piece.form.scales, No) and set(groups) != {1.0}:
            raise LuthierError(f"piece '{piece.name}' cannot be scaled: {piece.form.scales.reason}")
        for number, (scale, keys) in enumerate(groups.items()):
            name = piece.name if len(groups) == 1 else f"{piece.name}-{number}"
            p, fixed = ({k: table[k] for k in keys} for table in (piece.p, piece.fixed))
            pieces.append(Piece(name, piece.form, {k: piece.sites[k] for k in keys}, p, fixed, piece.scale * scale))
    return dataclasses.replace(delta, pieces=pieces, seals={}, probes={}, files=dict(delta.files))


def by_depth(first: float, layers: int) -> Callable[[Site], float]:
    """LiNeS for one delta: `first` at the first layer, rising evenly to 1 at the last; outside of the layers `first`.

    Source: Wang et al. 2024 (P222); the arithmetic is that of the merge of this name.
    """
    rule = MERGES.make("lines", {"alpha": first, "beta": 1.0 - first})
    return lambda site: float(rule.factor(Stack(site.name, [], layer=site.layer, layers=layers)))
