"""Folding: every change on a model summed in float32 and written into its weights, with what rounding swallowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.attach.point import Placed, Point
from luthier.attach.weights import gathered, module_at, oriented
from luthier.delta import No
from luthier.delta.artefact import Piece
from luthier.errors import LuthierError

Slots = dict[str, tuple[nn.Module, str, Tensor]]
"""Parameter by full name -> its module, its name there, a value."""


@dataclass
class FoldReport:
    """What folding did: parameters written and the largest share of a change that rounding swallowed."""

    written: list[str]
    lost: float
    worst: str


@torch.no_grad()
def folded(model: nn.Module, pieces: Iterable[Piece], points: Iterable[Point]) -> tuple[Slots, FoldReport]:
    """Writes every change into the model's weights, in float32, then rounded to their type.

    Gives what stood there before, by parameter, and the report. Refused, with nothing written, where a form has no
    weight change, or a bias is needed that the module lacks.
    """
    points = list(points)
    for piece in pieces:
        if isinstance(piece.form.dense, No):
            raise LuthierError(f"piece '{piece.name}' cannot be folded: {piece.form.dense.reason}")
    kept: Slots = {}
    sums: Slots = {}
    order = [q for point in points for q in [*point.swaps, *point.adds]]
    late = [q for point in points for q in [*point.chain, *point.inputs]]
    order += [q for k, q in enumerate(late) if not any(q is other for other in [*order, *late[:k]])]
    for q in order:
        _fold_one(model, q, sums)
    lost, worst = 0.0, ""
    for name, (module, part, total) in sums.items():
        parameter: Tensor = module._parameters[part]  # pyright: ignore[reportAssignmentType]
        kept[name] = (module, part, parameter.detach().clone())
        rounded = total.to(parameter.dtype)
        wanted = (total - parameter.float()).norm()
        share = float((rounded.float() - total).norm() / wanted) if wanted > 0 else 0.0
        lost, worst = max((lost, worst), (share, name))
        parameter.copy_(rounded)
    return kept, FoldReport(sorted(sums), lost, worst)


@torch.no_grad()
def exchanged(slots: Slots) -> Slots:
    """Puts these values into their parameters; gives what stood there."""
    stood: Slots = {}
    for name, (module, part, value) in slots.items():
        parameter: Tensor = module._parameters[part]  # pyright: ignore[reportAssignmentType]
        stood[name] = (module, part, parameter.detach().clone())
        parameter.copy_(value)
    return stood


def _fold_one(model: nn.Module, q: Placed, sums: Slots) -> None:
    """Adds one piece's change at its site to the sums; forms that chain meet the sum so far as their base."""
    site = q.state.site
    module = module_at(model, site.name)

    def total(part: str) -> Tensor | None:
        name = f"{site.name}.{part}"
        parameter = module._parameters.get(part)
        return sums[name][2] if name in sums else None if parameter is None else gathered(parameter.detach()).float()

    chained = q.form.at != "weight"
    weight = total(site.parameter)
    if weight is None:
        raise LuthierError(f"piece '{q.piece}' cannot be folded at {site.name}: the module has no {site.parameter}")
    base = weight if chained else module._parameters[site.parameter].detach().float()  # pyright: ignore
    bias = total("bias") if chained else q.state.bias
    state = dataclasses.replace(q.state, W=lambda: oriented(base, site), bias=bias)
    change = q.form.delta(state)
    if isinstance(change, No):
        raise LuthierError(f"piece '{q.piece}' cannot be folded at {site.name}: {change.reason}")
    for part, value in change.items():
        name = site.parameter if part == "weight" else part
        now = total(name)
        if now is None:
            if float(value.abs().max()) == 0:
                continue
            raise LuthierError(
                f"piece '{q.piece}' needs a bias at {site.name}, which this base lacks: keep it as a delta, "
                "or use a base whose config has the bias (attention_bias, mlp_bias)"
            )
        value = (oriented(value, site) if part == "weight" else value) * q.scale
        sums[f"{site.name}.{name}"] = (module, name, now + value)
