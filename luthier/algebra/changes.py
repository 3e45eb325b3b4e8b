"""What a tuned model changed of its base, one parameter at a time: from a delta, or from two checkpoints."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from luthier.algebra.pairs import one_vocabulary
from luthier.algebra.pieces import Touch, put_on
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta import No, Site
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError


class Tuned(Protocol):
    """The tuned model's side. Parameters go by their full names in memory and lie as the model lays them out."""

    def moved(self, name: str) -> bool:
        """Whether a parameter may differ from the base's."""
        ...

    def tuned(self, name: str) -> Tensor:
        """A parameter's tuned values: exact where they are stored so, else float32."""
        ...


class Pair:
    """Two checkpoints of one architecture."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.other = base, tuned
        missing = sorted(set(base.shapes) - set(tuned.shapes))
        if missing:
            raise LuthierError(f"{tuned.folder} has no {missing[0]}, which {base.folder} has: another architecture")
        for name in base.items:
            if base.shapes[name] != tuned.shapes[name]:
                raise LuthierError(
                    f"{name} is {base.shapes[name]} in {base.folder} and {tuned.shapes[name]} in {tuned.folder}: give a "
                    "tuned checkpoint of this base with its own vocabulary"
                )
        one_vocabulary(base, tuned)

    def moved(self, name: str) -> bool:
        return True

    def tuned(self, name: str) -> Tensor:
        return self.other.tensor(name)


class Itself:
    """No tuned model: the base as it is."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base

    def moved(self, name: str) -> bool:
        return True

    def tuned(self, name: str) -> Tensor:
        return self.base.tensor(name)


class OfDelta:
    """A base with a delta on it; every form that has a weight change."""

    def __init__(self, base: Checkpoint, delta: Delta) -> None:
        self.base, self.delta = base, delta
        self._at: dict[str, list[tuple[Piece, str, Site]]] = {}
        for piece in delta.pieces:
            if isinstance(piece.form.dense, No):
                raise LuthierError(f"piece '{piece.name}' has no weight change to compress: {piece.form.dense.reason}")
            for key, site in piece.sites.items():
                own = key if piece.form.at == "base" else f"{site.name}.{site.parameter}"
                tied = base.aliases(own)
                if tied and piece.form.at != "base":
                    raise LuthierError(
                        f"piece '{piece.name}' changes one use of the tied {own}: 'luthier export' it to a checkpoint and "
                        "compress that"
                    )
                names = {own, *tied}
                if piece.form.at != "base" and site.parameter != "bias":
                    names.add(f"{site.name}.bias")
                for name in names:
                    self._at.setdefault(name, []).append((piece, key, site))

    def names(self) -> list[str]:
        """The base's parameters that the delta may change."""
        return [name for name in self._at if name in self.base.items]

    def moved(self, name: str) -> bool:
        return name in self._at

    def tuned(self, name: str) -> Tensor:
        rows = self._at.get(name, ())
        touches = [Touch(q.name, q.form, q.scale, s, q.p.get(k, {}), q.fixed.get(k, {})) for q, k, s in rows]
        return put_on(name, self.base.tensor(name), touches, self._read)

    def _read(self, name: str) -> Tensor | None:
        return self.base.tensor(name) if name in self.base else None


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, all of whose numbers must be finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise LuthierError(f"{name} holds NaN or infinity in the tuned model: train or copy it again")
    return tensor
