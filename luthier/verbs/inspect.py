"""inspect: what a delta folder or an assembly holds, without a base and without a model."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from luthier.delta import FORMS
from luthier.delta.artefact import Delta, Piece
from luthier.delta.wiring import is_assembly


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Pieces with their forms, settings, sites by role and by layer, counts, bytes and size of the change by layer; base,
    lineage and audit. Plain values throughout.

    The size of a change is the root mean square of ΔW estimated from the seals; for changes that are no weight's, of the
    form's numbers. None where the delta carries no seals. Of an assembly its members, their parts and the fusion.
    """
    folder = Path(folder)
    if is_assembly(folder):
        from luthier.verbs.assemble import inspect_assembly

        return inspect_assembly(folder)
    delta = Delta.load(folder)
    return {
        "folder": str(folder),
        "base": delta.base,
        "numbers": delta.count(),
        "bytes": delta.nbytes(),
        "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        "pieces": [_piece(piece, delta) for piece in delta.pieces],
        "lineage": delta.lineage,
        "audit": delta.audit,
        "seals": len(delta.seals),
        "probes": len(delta.probes.get("lengths", ())),
    }


def _piece(piece: Piece, delta: Delta) -> dict[str, Any]:
    sites = piece.sites.values()
    return {
        "name": piece.name,
        "form": FORMS.name_of(type(piece.form)),
        "settings": {k: v for k, v in piece.form.__dict__.items()},
        "scale": piece.scale,
        "sites": len(piece.sites),
        "roles": dict(sorted(Counter(s.role for s in sites).items())),
        "layers": dict(sorted(Counter(s.layer for s in sites if s.layer is not None).items())),
        "numbers": piece.count(),
        "bytes": sum(
            t.numel() * t.element_size() for g in (piece.p, piece.fixed) for p in g.values() for t in p.values()
        ),
        "size_by_layer": _sizes(piece, delta),
        "size_by_role": _sizes(piece, delta, "role"),
    }


def _sizes(piece: Piece, delta: Delta, by: str = "layer") -> dict[Any, float] | None:
    """Layer (or role) -> root mean square of the change over its sites."""
    groups: dict[Any, list[float]] = {}
    for key, site in piece.sites.items():
        seal = delta.seals.get(f"{piece.name}/{key}")
        if seal is None:
            return None
        groups.setdefault(getattr(site, by), []).append(math.fsum(v * v for v in seal) / len(seal))
    ordered = sorted(groups.items(), key=lambda item: (item[0] is None, item[0]))
    return {k: math.sqrt(sum(v) / len(v)) for k, v in ordered}
