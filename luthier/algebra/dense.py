"""Any delta that is a change of weights, written as exact differences of the base's own parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from luthier.algebra.changes import OfDelta
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Delta, Piece, made_of
from luthier.delta.seals import project, turned
from luthier.errors import LuthierError
from luthier.parts.bits import encode


def to_dense(delta: Delta, base: Checkpoint, dtype: torch.dtype = torch.float32) -> Delta:
    """The same change in the form `dense`: on the base it gives W + Σ ΔW, summed in float32 and rounded to `dtype` once.

    base: the checkpoint that the delta was made on, read one parameter at a time; the result is held in memory. Raises
    LuthierError for a form that is no change of weights (with its reason), for a change at one use of a tied matrix, and for a bias
    that the base does not have.
    """
    form = FORMS.make("dense", {"dtype": str(dtype)[6:]})
    sites: dict[str, Site] = {}
    bits: dict[str, dict[str, Tensor]] = {}
    seals = {}
    for name, change in _changes(delta, base):
        was = base.tensor(name)
        now = (was.float() + change).to(dtype)
        sites[name] = base.items[name]
        bits[name] = {"bits": encode(now, was)}
        seals[f"dense/{name}"] = project(turned(now.float() - was.float(), base.model.get_submodule(sites[name].name)))
    piece = Piece("dense", form, sites, bits, {n: {} for n in sites})
    return Delta([piece], dict(delta.base), made_of([delta], "dense"), seals=seals, files=dict(delta.files))


def _changes(delta: Delta, base: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(parameter, the sum of all pieces' changes in memory's layout, float32), one parameter at a time."""
    tuned = OfDelta(base, delta)
    for piece in delta.pieces:
        for key in piece.sites if piece.form.at == "base" else ():
            if key not in base.items:
                raise LuthierError(f"the delta changes {key}, which {base.name} does not have: keep the delta as it is")
    for name in tuned.names():
        yield name, tuned.tuned(name).float() - base.tensor(name).float()
