"""Soups whose ingredients are chosen by tasting: averages of models tuned from one base with different settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.merging.engine import weighted_sum

Evaluate = Callable[[Mapping[str, list[float]]], float]


@MERGES.add("greedy_soup")
@dataclass(frozen=True)
class GreedySoup(Merge):
    """From the best model on, each in the order of its own score joins the average if the score does not drop.

    So the soup is never worse than its best ingredient on the data it was tasted on. Evaluates each model alone and
    each candidate average: 2 N − 1 times. Source: Wortsman et al. 2022 (P080).
    """

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    pointwise: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    paper: ClassVar[str] = "P080"

    def search(self, models: int, evaluate: Evaluate) -> Mapping[str, list[float]]:
        alone = [evaluate({"weight": [float(i == k) for i in range(models)]}) for k in range(models)]
        order = sorted(range(models), key=lambda k: -alone[k])
        soup, best = {order[0]}, alone[order[0]]
        for k in order[1:]:
            score = evaluate({"weight": [float(i in soup | {k}) for i in range(models)]})
            if score >= best:
                soup, best = soup | {k}, score
        return {"weight": [float(i in soup) for i in range(models)]}

    def merge(self, t: Stack) -> Tensor:
        return weighted_sum(t, True)


@MERGES.add("learned_soup")
@dataclass(frozen=True)
class LearnedSoup(Merge):
    """The weights of the average, positive and adding up to 1, are learned on held-out data.

    The paper follows gradients through the average; here scores alone are asked for (our reading): every weight in turn
    is multiplied and divided by a factor, a better score is kept, and the factor shrinks by its root after a round
    without one. Never worse than the uniform soup where it starts. Source: Wortsman et al. 2022 (P080).
    """

    rounds: int = 4
    """Rounds over all models; each asks for at most 2 N scores."""
    factor: float = 4.0
    """What a weight is first multiplied by."""

    base: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    pointwise: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    paper: ClassVar[str] = "P080"

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")

    def search(self, models: int, evaluate: Evaluate) -> Mapping[str, list[float]]:
        weights, factor = [1 / models] * models, self.factor
        best = evaluate({"weight": weights})
        for _ in range(self.rounds):
            found = False
            for k in range(models):
                for by in (factor, 1 / factor):
                    tried = [w * by if i == k else w for i, w in enumerate(weights)]
                    tried = [w / sum(tried) for w in tried]
                    score = evaluate({"weight": tried})
                    if score > best:
                        weights, best, found = tried, score, True
                        break
            factor = factor if found else math.sqrt(factor)
        return {"weight": weights}

    def merge(self, t: Stack) -> Tensor:
        return weighted_sum(t, True)
