"""What a compression is: one weight's change in, the same change in a smaller form out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from luthier.delta.form import Form, No, Site

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass
class Change:
    """One weight's change, and what may be known of it."""

    site: Site
    base: Tensor
    """The base's weight [d_out, d_in], float32."""
    change: Tensor
    """tuned − base [d_out, d_in], float32; of an embedding the table's, [vocabulary, hidden]."""
    inputs: Tensor | None = None
    """Inputs of the site on the calibration text [N, d_in], as the model under compression gives them."""
    generator: Generator | None = None
    beside: int = 1
    """How many matrices a layer has that are compressed, this one among them; where layers differ, the most."""


@dataclass
class Small:
    """A compressed change: a form and its numbers at this site, as in a delta's piece."""

    form: Form
    p: dict[str, Tensor] = field(default_factory=dict)
    """Numbers that may be tuned further (scales)."""
    fixed: dict[str, Tensor] = field(default_factory=dict)
    """Packed numbers: bytes, indices, codes."""
    note: str = ""
    """What of the settings had no effect at this weight; the same words at several weights are told once, with their number."""


class Compression:
    """Base of all compressions: a frozen dataclass of settings and one pure method. See docs/add-a-method.md.

    The result is an ordinary form (`luthier/forms/`), so that a compressed delta is a delta: it saves, loads, attaches,
    folds, merges and is audited like any other.
    """

    calibrated: ClassVar[bool | No] = False
    """Whether it needs `inputs`: then layers are done in order, each fed by the compressed layers before it."""
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    """Kinds of site it compresses; the change of others is kept as it is, or dropped where the plan says so."""
    tunes: ClassVar[Literal["", "scales", "features"]] = ""
    """What is tuned on calibration text afterwards: `p["scale"]`, so that the logits are the tuned model's; or all of `p`,
    so that all hidden states are."""
    alone: ClassVar[bool] = False
    """Whether there is no tuned model: it makes the base itself smaller, and `change` is zero."""
    paper: ClassVar[str] = ""

    def factors(self) -> Sequence[float]:
        """Factors on every matrix's scale, of which the one with the least loss on calibration text is kept."""
        return ()

    def compress(self, c: Change) -> Small:
        """The change in its smaller form. What is handed in may not be written to."""
        raise NotImplementedError(f"{type(self).__name__} has no compress")
