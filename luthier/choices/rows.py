"""Published choices: rows of settings over the engine, or a few lines of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from luthier.choices.engine import ALWAYS, Choice, ChoiceContext, Items, Pick, Selection, kind_of, layer_of, matches
from luthier.delta import CHOICES
from luthier.errors import LuthierError

CHOICES.add("pick")(Pick)


@CHOICES.add("full")
@dataclass(frozen=True)
class Full(Choice):
    """Everything moves."""

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        return dict.fromkeys(items)


@CHOICES.add("hft")
@dataclass(frozen=True)
class HFT(Choice):
    """Half of every layer: 2 of 4 attention projections, 1 of 2 norms, and of 3 feed-forward matrices 1 in a random half
    of the layers and 2 in the other half; embeddings and head always.

    Stated once for any architecture: of an even number of matrices of a kind half, of an odd number half rounded down in
    a random half of the layers and up in the rest. A matrix holding query, key and value counts as its own half: it
    moves in a random half of the layers, the output projection in the others. Biases go with their matrix.
    Source: Hui et al. 2024 (P089): one draw a run; `every` redraws, as between its rounds.
    """

    odd: Literal["down", "up"] = "down"
    """With an odd number of layers: whether the half that moves more is the smaller (down) or the larger one."""
    outside: bool = False
    """Whether what lies outside the layers besides embeddings and head (the last norm) moves too; the paper is silent."""
    always: tuple[str, ...] = ALWAYS

    paper: ClassVar[str] = "P089"

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        chosen: Selection = {n: None for n, s in items.items() if matches(n, s, self.always)}
        tables: dict[str, dict[str, dict[str, list[str]]]] = {}  # kind -> layer -> part -> parameters
        for name, site in items.items():
            layer = layer_of(name, site)
            if layer:
                part = f"{site.name}.{site.parameter}" if site.experts else site.name
                tables.setdefault(kind_of(site), {}).setdefault(layer, {}).setdefault(part, []).append(name)
            elif self.outside:
                chosen[name] = None
        for kind, layers in tables.items():
            shuffled = torch.randperm(len(layers), generator=self.generator(ctx, kind)).tolist()
            half = (len(layers) + (self.odd == "up")) // 2
            more = {list(layers)[k] for k in shuffled[:half]}
            for layer, parts in layers.items():
                for part in self._half(kind, layer, parts, layer in more, items, ctx):
                    chosen |= dict.fromkeys(parts[part])
        return chosen

    def _half(
        self, kind: str, layer: str, parts: dict[str, list[str]], more: bool, items: Items, ctx: ChoiceContext
    ) -> list[str]:
        fused = [p for p in parts if items[parts[p][0]].role == "attn.qkv"]
        if fused:
            return fused if more else [p for p in parts if p not in fused]
        count = len(parts) // 2 + (len(parts) % 2 and more)
        order = torch.randperm(len(parts), generator=self.generator(ctx, kind, layer)).tolist()
        return [list(parts)[k] for k in order[:count]]


@CHOICES.add("lisa")
@dataclass(frozen=True)
class LISA(Choice):
    """Every `every` steps `layers_active` random layers move and the others rest; embeddings and head always move.

    What a released layer has learned stays. Source: Pan et al. 2024 (P193).
    """

    every: int = 20
    layers_active: int = 2
    always: tuple[str, ...] = ALWAYS

    paper: ClassVar[str] = "P193"

    def __post_init__(self) -> None:
        if self.every < 1 or self.layers_active < 1:
            raise ValueError(f"every and layers_active must be at least 1, got {self.every} and {self.layers_active}")

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        layers = list(dict.fromkeys(layer for n, s in items.items() if (layer := layer_of(n, s))))
        if self.layers_active > len(layers):
            raise LuthierError(f"choice lisa: layers_active is {self.layers_active}, the base has {len(layers)} layers")
        order = torch.randperm(len(layers), generator=self.generator(ctx)).tolist()
        active = {layers[k] for k in order[: self.layers_active]}
        return {n: None for n, s in items.items() if layer_of(n, s) in active or matches(n, s, self.always)}


@CHOICES.add("bias")
@dataclass(frozen=True)
class Bias(Choice):
    """Every bias, or those at the roles named in `roles`, and the classifier if there is one.

    The paper's smaller set is {attn.q, ffn.up}. Source: Ben Zaken et al. 2022 (P221).
    """

    roles: tuple[str, ...] = ("all",)
    always: tuple[str, ...] = ("classifier",)

    paper: ClassVar[str] = "P221"

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        biases = [n for n, s in items.items() if s.parameter.endswith("bias") and matches(n, s, self.roles)]
        if not biases:
            raise LuthierError(
                "choice bias: this base has no such bias; use the form scale-shift, which adds a shift to every output, "
                "or a base whose config has biases"
            )
        return dict.fromkeys(biases) | {n: None for n, s in items.items() if matches(n, s, self.always)}


@CHOICES.add("norm")
@dataclass(frozen=True)
class Norm(Choice):
    """Gains and biases of the norms; with `fraction` only that share of their entries, by the Fisher information's diagonal,
    the mean of squared gradients; and the classifier if there is one. Source: ValizadehAslani and Liang 2024 (P141)."""

    fraction: float = 1.0
    by: Literal["fisher", "random"] = "fisher"
    """How a share is found; random is what the paper's choice is compared with."""
    always: tuple[str, ...] = ("classifier",)

    paper: ClassVar[str] = "P141"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")

    @property
    def needs_squares(self) -> bool:
        return self.fraction < 1 and self.by == "fisher"

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        score = "fisher" if self.needs_squares else "random"
        return Pick(
            score=score, granularity="entry", fraction=self.fraction, of=("norm",), always=self.always
        ).select(items, ctx)  # fmt: skip


@dataclass(frozen=True)
class Entries(Choice):
    """A share of single entries of every matrix; what the rows below have in common."""

    fraction: float = 0.01
    of: tuple[str, ...] = ("attn", "cross", "ffn", "shared", "expert")
    score: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")

    @property
    def needs_grad(self) -> bool:
        return self.score == "gradient"

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        matrices = {n: s for n, s in items.items() if len(s.shape) > 1}
        pick = Pick(
            self.every, score=self.score, granularity="entry", within="tensor", fraction=self.fraction, of=self.of
        )
        return pick.select(matrices, ctx)


@CHOICES.add("random-entries")
@dataclass(frozen=True)
class RandomEntries(Entries):
    """Drawn at random: the baseline of the other two."""


@CHOICES.add("top-magnitude")
@dataclass(frozen=True)
class TopMagnitude(Entries):
    """The largest weights."""

    score: ClassVar[str] = "magnitude"


@CHOICES.add("top-gradient")
@dataclass(frozen=True)
class TopGradient(Entries):
    """The entries of the largest gradient, accumulated over a first window of batches."""

    score: ClassVar[str] = "gradient"
