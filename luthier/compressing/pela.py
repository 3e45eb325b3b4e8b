"""PELA: every matrix as two thin ones, brought back to what it gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from luthier.delta import COMPRESSIONS, FORMS, Change, Compression, Small, State


@COMPRESSIONS.add("pela")
@dataclass(frozen=True)
class PELA(Compression):
    """The base itself, smaller: W ≈ B A by SVD, a `factor`-th of the numbers, then A and B tuned on text so that all hidden
    states are the base's (mean squared error, plus the form's penalty on drift). Fine-tune it as it stands afterwards.

    Differs: the authors add the loss of the pre-training task, and weigh features by 0.1 to 1 beside it; here text alone is
    asked for. Source: PELA (P343), as the authors' code has it.
    """

    factor: float = 2.0
    """Of compression: 2, or 1.5 for Swin."""
    penalty_weight: float = 1.0
    eps: float = 1e-3
    """The drift that the penalty aims at."""

    alone: ClassVar[bool] = True
    tunes: ClassVar[Literal["", "scales", "features"]] = "features"
    paper: ClassVar[str] = "P343"

    def __post_init__(self) -> None:
        FORMS["factored"](self.factor, self.penalty_weight, self.eps)

    def compress(self, c: Change) -> Small:
        settings = {"factor": self.factor, "penalty_weight": self.penalty_weight, "eps": self.eps}
        form = FORMS.make("factored", settings | {"matrices": c.beside})
        p, _ = form.start(State(c.site, {}, {}, lambda: c.base))
        return Small(form, dict(p))
