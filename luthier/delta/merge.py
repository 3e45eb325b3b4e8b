"""What a merge is: one tensor of every model in, one tensor out, as a pure function of what is handed in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from luthier.parts.spread import Over, alone

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass
class Stack:
    """One tensor of every model to be merged, all of one shape, in the type of the arithmetic."""

    name: str
    """Its name in the checkpoint."""
    tensors: list[Tensor]
    """The tuned models' values (not changes), in the order of the plan. The base is among them only where the merge
    declares `base = "unused"` and the plan lists it."""
    base: Tensor | None = None
    each: Mapping[str, list[float]] = field(default_factory=dict)
    """Settings that each model has of its own, in the same order: {"weight": [0.3, 0.7]}."""
    role: str = ""
    """attn.q, ffn.down, norm, embed …; '' where it is not known."""
    layer: int | None = None
    layers: int = 0
    """How many layers the model has."""
    generator: Generator | None = None
    """For draws; seeded by the plan's seed and the tensor's name, so that the order of work does not matter."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What `measure` said of every tensor, by name, where the merge looks at the whole model first."""
    notes: dict[str, float] = field(default_factory=dict)
    """What `merge` has to say of this tensor, for the report: {"interpolated linearly": 1.0}; averaged over tensors."""
    over: Over = alone
    """Has pieces of the tensor worked on, for merges that can: on all cores where the tensor is alone in memory."""
    room: Callable[[Tensor], Tensor] | None = None
    """Memory that is used again for a result like the tensor given; None takes fresh memory."""

    def blank(self) -> Tensor:
        """A contiguous tensor for the result, of the models' shape and type, its numbers yet to be written."""
        like = self.tensors[0]
        return like.new_empty(like.shape) if self.room is None else self.room(like)

    def changes(self) -> list[Tensor]:
        """Every model's change of the base."""
        assert self.base is not None
        return [t - self.base for t in self.tensors]


class Merge:
    """Base of all merges: a frozen dataclass of settings and one pure method. See docs/add-a-method.md.

    The settings may differ by tensor (by name, role or depth): whoever calls makes the merge anew where they do.
    """

    base: ClassVar[Literal["needed", "optional", "unused"]] = "needed"
    """Whether there must be a common base."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """Fewest and most models besides the base; None for any number."""
    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0}
    """Settings every model has of its own, with their defaults; None has to be stated."""
    ordered: ClassVar[bool] = False
    """Whether the order of the models matters."""
    draws: ClassVar[bool] = False
    """Whether it draws random numbers."""
    pointwise: ClassVar[bool] = False
    """Whether every entry of the result depends on the same entry of the inputs alone: large tensors then come in flat
    pieces, one after the other."""
    widens: ClassVar[bool] = False
    """Whether the result is float32 where the arithmetic is in a 16-bit type; else it is cast to the arithmetic's type."""
    searches: ClassVar[bool] = False
    """Whether `search` finds the models' settings by evaluating merged models."""
    factors: ClassVar[bool] = False
    """Whether it merges the two factors of low-rank changes (`merge_factors`) rather than weights."""
    units: ClassVar[bool] = False
    """Whether it merges whole models unit by unit, from their features on calibration text (`match`, `solve`); `merge` is
    then for what is no linear map."""
    paper: ClassVar[str] = ""

    @classmethod
    def wants(cls, count: int) -> str:
        """How many models besides the base it takes ('at least 2'), where `count` are none of that; else ''."""
        least, most = cls.models
        if count >= least and (most is None or count <= most):
            return ""
        return str(least) if most == least else f"at least {least}" if most is None else f"{least} to {most}"

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        """What is odd about the models' own settings at a tensor, with the remedy; '' where nothing is. Our own plans are
        refused by it; a mergekit file, whose numbers are mergekit's, gets it as a note."""
        return ""

    @property
    def reads(self) -> Collection[str]:
        """Of the models' own settings (`each`), those that these settings make use of."""
        return type(self).each

    @property
    def looks(self) -> bool:
        """Whether these settings need `measure`, a first pass over the whole model."""
        return type(self).measure is not Merge.measure

    def measure(self, t: Stack) -> Any:
        """What a first pass notes of each tensor, for merges that look at the whole model before they merge."""
        return None

    def search(self, models: int, evaluate: Callable[[Mapping[str, list[float]]], float]) -> Mapping[str, list[float]]:
        """Settings of each of the models, found by `evaluate`: settings to the merged model's score, higher is better."""
        raise NotImplementedError(f"{type(self).__name__} has no search")

    def merge_factors(self, pairs: Sequence[tuple[Tensor, Tensor]], t: Stack) -> tuple[Tensor, Tensor]:
        """The merged (A, B) of the models' A [r, d_in] and B [d_out, r] of one site, each change being B A.

        Scalings are in B already. `t.tensors` is empty. What is handed in may not be written to.
        """
        raise NotImplementedError(f"{type(self).__name__} merges no factors")

    def merge(self, t: Stack) -> Tensor:
        """The merged tensor. The tensors handed in may not be written to."""
        raise NotImplementedError(f"{type(self).__name__} has no merge")
