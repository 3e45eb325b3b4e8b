"""What the pieces of a delta make of one parameter together, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from luthier.attach.weights import oriented
from luthier.delta import Form, No, Site, State
from luthier.errors import LuthierError

ORDER = {"base": 0, "weight": 1}
"""Where a form sits -> its turn: what moves the base itself, what is added to weights, and last what chains."""


class Touch(NamedTuple):
    """A piece at one site, with its numbers."""

    piece: str
    form: Form
    scale: float
    site: Site
    p: dict[str, Tensor]
    fixed: dict[str, Tensor]


def put_on(
    name: str, base: Tensor, touches: Iterable[Touch], read: Callable[[str], Tensor | None], rounded: bool = False
) -> Tensor:
    """The parameter `name` of a base with all that touch it on, as the model has it: in its own layout, float32 where
    anything was added, else the type that the pieces state.

    Pieces that move the base are exact differences from `base`, whatever else is on; changes of weights see what those
    made; forms that chain see everything before them. `read` gives the base's other parameters by name, None where there
    is none. `rounded`: each change is rounded to the base's type before it is added, as PEFT merges. Errors: a form without
    a weight change; a bias that the base lacks.
    """
    now = base
    rows = sorted(touches, key=lambda t: ORDER.get(t.form.at, 2))
    for t in (t for t in rows if t.form.at == "base"):
        edited: Tensor = t.form.edit(base, State(t.site, t.p, t.fixed, lambda: base))  # pyright: ignore
        alone = now is base and t.scale == 1
        now = edited if alone else now.float() + t.scale * (edited.float() - base.float())
    moved = now
    for t in (t for t in rows if t.form.at != "base"):
        site = t.site
        w_name, b_name = f"{site.name}.{site.parameter}", f"{site.name}.bias"
        seen = moved if t.form.at == "weight" else now
        weight = seen if w_name == name else read(w_name)
        bias = seen if b_name == name and w_name != name else read(b_name)
        assert weight is not None, f"{name}: the base has no {w_name}"
        bias = bias.float() if bias is not None and site.parameter != "bias" else None
        change = t.form.delta(State(site, t.p, t.fixed, lambda w=weight, s=site: oriented(w.float(), s), bias))
        if isinstance(change, No):
            raise LuthierError(f"piece '{t.piece}' at {site.name}: {change.reason}")
        if "bias" in change and bias is None and bool(change["bias"].any()):
            raise LuthierError(
                f"piece '{t.piece}' needs a bias at {site.name}, which the base lacks: 'luthier export' it to a checkpoint "
                "and name that"
            )
        part = "weight" if w_name == name else "bias"
        if part not in change:
            continue
        value = (oriented(change[part], site) if part == "weight" else change[part]) * t.scale
        value = value.reshape(base.shape)
        now = now.float() + value
        now = now.to(base.dtype) if rounded else now
    return now
