"""A merge whose change grows with depth."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError
from luthier.merging.engine import sizes


@MERGES.add("lines")
@dataclass(frozen=True)
class LiNeS(Merge):
    """W = W₀ + (α + β l / (L − 1)) τ in layer l of L, counted from 0, and W₀ + α τ outside of the layers.

    τ is the change that `of`, any merge with a base, makes. One model: α = γ and β = 1 − γ, so that γ = 1 is the tuned
    model and γ = 0 leaves the first layer at the base. α is by default ‖Σ τᵢ‖₁ / ‖τ‖₁ / N over the whole model; of
    several, β is to be tried. `gamma` is that of breadcrumbs, where `of` names it. A single layer takes α (our reading). Source: Wang et al. 2024 (P222).
    """

    alpha: float | None = None
    """α: the factor at the first layer; None sets it from the norms."""
    beta: float | None = None
    """β: what is added up to the last layer; None is 1 − α for one model, 1 for several."""
    of: str = "task_arithmetic"
    """The merge that makes the change."""
    normalize: bool | None = None
    """Of that merge; None leaves it its default."""
    rescale: bool | Literal["by_density"] | None = None
    """Of that merge."""
    lambda_: float | None = None
    """Of that merge."""

    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0, "density": 1.0, "gamma": 0.01, "epsilon": 0.15}
    draws: ClassVar[bool] = True
    paper: ClassVar[str] = "P222"

    def __post_init__(self) -> None:
        if self.inner.base == "unused" or isinstance(self.inner, LiNeS):
            raise LuthierError(f"lines: '{self.of}' makes no change of a base: name task_arithmetic, ties, dare_ties …")

    @property
    def inner(self) -> Merge:
        """The merge whose change is scaled."""
        stated = {"normalize": self.normalize, "rescale": self.rescale, "lambda_": self.lambda_}
        return MERGES.make(self.of, {k: v for k, v in stated.items() if v is not None})

    @property
    def reads(self) -> Collection[str]:
        return self.inner.each

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        return self.inner.odd(each)

    @property
    def looks(self) -> bool:
        return self.alpha is None

    def measure(self, t: Stack) -> tuple[float, float]:
        """(‖Σ τᵢ‖₁, ‖τ‖₁) of this tensor."""
        return sizes(t, _change(self.of, self.inner, t))

    def factor(self, t: Stack) -> float:
        """What the change of this tensor is multiplied by."""
        alpha = _share(t) if self.alpha is None else self.alpha
        beta = (1 - alpha if len(t.tensors) == 1 else 1.0) if self.beta is None else self.beta
        return alpha if t.layer is None or t.layers < 2 else alpha + beta * t.layer / (t.layers - 1)

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        merged, factor = _change(self.of, self.inner, t), self.factor(t)
        return merged if factor == 1 else t.base + (merged - t.base).mul_(factor)


def _change(name: str, inner: Merge, t: Stack) -> Tensor:
    """What the inner merge makes of this tensor. Raises LuthierError where it takes another number of models."""
    if wanted := inner.wants(len(t.tensors)):
        raise LuthierError(
            f"lines: '{name}' takes {wanted} models, got {len(t.tensors)} at {t.name}: name another merge (of)"
        )
    return inner.merge(replace(t, each={k: t.each[k] for k in inner.each}))


def _share(t: Stack) -> float:
    """‖Σ τᵢ‖₁ / ‖τ‖₁ / N over the whole model; 1 / N where nothing changed."""
    norms = list(t.measured.values())
    summed, apart = sum(n[0] for n in norms), sum(n[1] for n in norms)
    return (summed / apart if apart else 1.0) / len(t.tensors)
