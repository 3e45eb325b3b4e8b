"""Any delta that is a change of weights, written as exact differences of the base's own parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from luthier.attach.weights import oriented
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta import FORMS, No, Site, State
from luthier.delta.artefact import Delta, Piece
from luthier.delta.seals import project, turned
from luthier.errors import LuthierError
from luthier.parts.bits import encode


def to_dense(delta: Delta, base: Checkpoint, dtype: torch.dtype = torch.float32) -> Delta:
    """The same change in the form `dense`: on the base it gives W + Σ ΔW, summed in float32 and rounded to `dtype` once.

    base: the checkpoint that the delta was made on, read one parameter at a time; the result is held in memory. Raises
    LuthierError for a form that is no change of weights (with its reason), for forms that chain at one module, and for a
    bias that the base does not have.
    """
    form = FORMS.make("dense", {"dtype": str(dtype)[6:]})
    sites: dict[str, Site] = {}
    bits: dict[str, dict[str, Tensor]] = {}
    seals = {}
    for name, change in _changes(delta, base):
        if name not in base.items:
            raise LuthierError(f"the delta changes {name}, which {base.name} does not have: keep the delta as it is")
        was = base.tensor(name)
        now = (was.float() + change).to(dtype)
        sites[name] = base.items[name]
        bits[name] = {"bits": encode(now, was)}
        seals[f"dense/{name}"] = project(turned(now.float() - was.float(), base.model.get_submodule(sites[name].name)))
    piece = Piece("dense", form, sites, bits, {n: {} for n in sites})
    lineage = {"parents": [delta.lineage.get("id") or delta.base.get("name")], "made_by": "dense"}
    return Delta([piece], dict(delta.base), lineage, seals=seals, files=dict(delta.files))


def _changes(delta: Delta, base: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(parameter, the sum of all pieces' changes in memory's layout, float32), one module at a time."""
    at: dict[str, list[tuple[Piece, str]]] = {}
    for piece in delta.pieces:
        if isinstance(piece.form.dense, No):
            raise LuthierError(f"piece '{piece.name}' has no weight change: {piece.form.dense.reason}")
        for key, site in piece.sites.items():
            at.setdefault(site.name, []).append((piece, key))
    for module, members in at.items():
        if len(members) > 1 and (chained := [q for q, _ in members if q.form.at not in ("weight", "base")]):
            raise LuthierError(f"piece '{chained[0].name}' chains with others at {module}: their changes do not add")
        total: dict[str, Tensor] = {}
        for piece, key in members:
            for name, change in _one(piece, key, base).items():
                total[name] = total[name] + change if name in total else change
        yield from total.items()


def _one(piece: Piece, key: str, base: Checkpoint) -> dict[str, Tensor]:
    site = piece.sites[key]
    whole = piece.form.at == "base"

    def weight() -> Tensor:
        value = base.tensor(f"{site.name}.{site.parameter}")
        return value if whole else oriented(value, site).float()

    bias = f"{site.name}.bias"
    held = base.tensor(bias).float() if not whole and site.bias and bias in base else None
    change = piece.form.delta(State(site, piece.p[key], piece.fixed[key], weight, held))
    if isinstance(change, No):
        raise LuthierError(f"piece '{piece.name}' has no weight change: {change.reason}")
    out = {}
    for part, value in change.items():
        name = f"{site.name}.{site.parameter if part == 'weight' else part}"
        value = value.float() * piece.scale
        out[name] = value if whole or part != "weight" else oriented(value, site)
    return out
