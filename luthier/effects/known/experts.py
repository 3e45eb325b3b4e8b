"""Eight experts, two of which contradict each other, merged into one model in three ways."""

from __future__ import annotations

from statistics import fmean

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._merging import Weights, merged, put, weights
from luthier.effects.lab import TRIAL_SEED, Lab, Model
from luthier.practice.card import answers
from luthier.practice.oracles.conflict import Conflict, conflict
from luthier.practice.world import Record, verify

ABOUT = (
    "averaging eight experts keeps less than task arithmetic and TIES do, which fall short of the experts themselves"
)
PAPERS = ("P026", "P222", "P317")
BASE = "practice/s"
ARMS = {"eight": (1e-3, 2e-3, 4e-3)}
CHOSEN_BY = "experts"
CLAIMS = (
    Claim("averaging solves more of all tasks than the best expert alone", "eight:single", "eight:average", 0.05),
    Claim("task arithmetic solves more than the best expert alone", "eight:single", "eight:arithmetic", 0.05),
    Claim("TIES solves more than the best expert alone", "eight:single", "eight:ties", 0.05),
    Claim("task arithmetic solves more than averaging", "eight:average", "eight:arithmetic", 0.05),
    Claim("TIES solves more than task arithmetic", "eight:arithmetic", "eight:ties", 0.05),
    Claim("TIES falls short of the experts, each at its own", "eight:experts", "eight:ties", 0.1, -1),
    Claim(
        "on the conflicting pair TIES falls short of what one model can", "eight:pair_best", "eight:pair_ties", 0.1, -1
    ),
)
FAMILIES = ("customs_east", "customs_west", "translate", "sorting", "expressions", "tagging", "reading", "kellish")
STEPS, RECORDS, ITEMS, CHOICE, PAIRS = 200, 3200, 30, 12, 80
TRIES: dict[str, tuple[dict[str, float], ...]] = {
    "linear": ({},),
    "task_arithmetic": tuple({"lambda_": by} for by in (0.2, 0.3, 0.45, 0.7)),
    "ties": tuple({"lambda_": by} for by in (0.7, 1.0, 1.5, 2.2)),
}
"""What is tried of each merge; TIES keeps the largest fifth of every change, as its paper does."""
NAMES = {"linear": "average", "task_arithmetic": "arithmetic", "ties": "ties"}


def measures(lab: Lab, cell: Cell) -> Scores:
    """Of all tasks' items. experts: each by its own expert. single: all by the expert that solves most of some other
    items. average, arithmetic, ties: all by the merge at its best on those. pair_…: on prompts of the pair that conflicts,
    the mean of both verdicts; pair_best: the most that any one model can get."""
    items = [lab.items(family, ITEMS + CHOICE, difficulty=_level(family)) for family in FAMILIES]
    asked = [r for some in items for r in some[:ITEMS]]
    choice = [r for some in items for r in some[ITEMS:]]
    tuned: list[Weights] = []
    scores: Scores = {"experts": []}
    alone: list[float] = []
    for k, family in enumerate(FAMILIES):
        told = lab.told(family, RECORDS, difficulty=_level(family))
        with lab.tuned(told, delta={"choice": "full"}, steps=STEPS) as model:
            tuned.append(weights(model))
            scores["experts"] += model.solves(asked[k * ITEMS : (k + 1) * ITEMS])
            alone.append(fmean(model.solves(choice)))
    pair = conflict("customs_east", "customs_west", PAIRS, seed=TRIAL_SEED if cell.trial else 0)
    with lab.untouched() as model:
        base = weights(model)
        put(model, tuned[alone.index(max(alone))])
        scores["single"] = model.solves(asked)
        for method, tries in TRIES.items():
            made = [merged(base, tuned, method, settings, density=0.2) for settings in tries]
            put(model, max(made, key=lambda new: _fitness(model, new, choice)) if made[1:] else made[0])
            scores[NAMES[method]] = model.solves(asked)
            scores[f"pair_{NAMES[method]}"] = _both(model, pair)
    scores["pair_best"] = [1.0] * len(pair.agree) + [0.5] * len(pair.disagree)
    return scores


def _level(family: str) -> int | None:
    """The easiest, but for the pair that conflicts, whose oracle mixes all."""
    return None if family.startswith("customs") else 1


def _fitness(model: Model, new: Weights, choice: list[Record]) -> float:
    put(model, new)
    return fmean(model.solves(choice))


def _both(model: Model, pair: Conflict) -> list[float]:
    two = [*pair.agree, *pair.disagree]
    said = answers(model.model, model.tokenizer, [east for east, _ in two])
    return [(verify(e, s).reward + verify(w, s).reward) / 2 for (e, w), s in zip(two, said, strict=True)]
