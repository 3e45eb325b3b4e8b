"""From what an edit gives to the pieces of a delta: low-rank where it is low-rank, exact entries or whole weights otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.attach.weights import oriented
from luthier.bridge.target import Target
from luthier.delta import FORMS, Form, Small
from luthier.delta.artefact import Piece
from luthier.errors import LuthierError
from luthier.parts.bits import encode

SPARSE = 0.5
"""Share of a parameter's entries up to which they are kept one by one."""


def pieces(name: str, on: Target, changes: Mapping[str, Tensor | Small], base: Mapping[str, Tensor]) -> list[Piece]:
    """One piece for each form. base: the parameters' values as the model stores them, before anything was put on it.

    A weight that came out as it was is left out. Errors: a change that is not finite, and no change at all.
    """
    out: dict[str, Piece] = {}
    for parameter, change in changes.items():
        site = on.items[parameter]
        if isinstance(change, Small):
            tensors = [*change.p.values(), *change.fixed.values()]
            label, form, key = _label(change.form), change.form, site.name
            p, fixed = change.p, change.fixed
            if not any(bool(t.any()) for t in change.p.values()):
                continue
        else:
            tensors = [change]
            tuned, was = oriented(change.detach().float(), site).cpu().contiguous(), base[parameter].float().cpu()
            index = torch.nonzero((tuned != was).flatten()).flatten()
            if not len(index):
                continue
            few, key, fixed = len(index) <= SPARSE * was.numel(), parameter, {}
            label = "entries" if few else "dense"
            form, bits = FORMS.make(label, {"dtype": "float32"}), encode(tuned, was)
            if few:
                site, fixed = dataclasses.replace(site, entries=len(index)), {"index": index}
            p = {"bits": bits.flatten()[index] if few else bits}
        if any(not bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
            raise LuthierError(f"{name}: the change of {parameter} is not finite: choose a smaller lr or fewer steps")
        if label not in out or out[label].form != form:
            label = label if label not in out else f"{label}-{len(out)}"
            out[label] = Piece(name if not out else f"{name}-{label}", form, {}, {}, {})
        piece = out[label]
        piece.sites[key], piece.p[key], piece.fixed[key] = site, dict(p), dict(fixed)
    if not out:
        raise LuthierError(
            f"{name} changed nothing: no state that it may keep lowers the loss; allow more steps, or a wider ball"
        )
    return list(out.values())


def numbers(made: list[Piece]) -> int:
    """Numbers that the pieces hold."""
    return sum(piece.count() for piece in made)


def _label(form: Form) -> str:
    return FORMS.name_of(type(form))
