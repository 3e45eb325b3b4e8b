"""Experts of four tasks, and of one that contradicts another's, merged into one model in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._merging import Weights, merged, put, weights
from luthier.effects.lab import TRIAL_SEED, Lab, Model
from luthier.practice.card import answers
from luthier.practice.oracles.conflict import Conflict, conflict
from luthier.practice.world import Record, verify

ABOUT = "two experts added up do more than either; of four, breadcrumbs, LiNeS and DARE keep what plain sums lose"
PAPERS = ("P026", "P222", "P268", "P317")
BASE = "practice"
ARMS = {"four": (3e-4, 6e-4, 1.2e-3)}
CHOSEN_BY = "experts"
CLAIMS = (
    Claim("two experts added up solve more of both tasks than the better one", "four:two_single", "four:two", 0.05),
    Claim("averaging four solves more of all tasks than the best expert alone", "four:single", "four:average", 0.05),
    Claim("task arithmetic solves more than the best expert alone", "four:single", "four:arithmetic", 0.05),
    Claim("TIES solves more than the best expert alone", "four:single", "four:ties", 0.05),
    Claim("task arithmetic solves more than averaging", "four:average", "four:arithmetic", 0.05),
    Claim("TIES solves more than task arithmetic", "four:arithmetic", "four:ties", 0.05),
    Claim("breadcrumbs solves more than task arithmetic", "four:arithmetic", "four:breadcrumbs", 0.05),
    Claim("LiNeS on task arithmetic solves more than it alone", "four:arithmetic", "four:lines", 0.05),
    Claim(
        "half of every change dropped first, task arithmetic solves as much", "four:arithmetic", "four:dare", 0.05, 0
    ),
    Claim(
        "from two experts to four at one factor, breadcrumbs loses less of the first two's tasks than task arithmetic",
        *("four:arithmetic_falls", "four:breadcrumbs_falls", 0.05, -1),
    ),
    Claim("LiNeS keeps more of what was taught than the expert", "four:expert_kept", "four:lines_kept", 0.05),
    Claim("and is as good at the expert's task", "four:experts", "four:lines_alone", 0.05, 0),
    Claim("half of its change dropped, an expert is as good", "four:experts", "four:dropped_half", 0.05, 0),
    Claim("nine tenths dropped, it is as good", "four:experts", "four:dropped_most", 0.05, 0),
    Claim("ninety-nine of a hundred dropped, it is worse", "four:experts", "four:dropped_nearly_all", 0.05, -1),
    Claim("half dropped and not rescaled, it is worse than rescaled", "four:dropped_half", "four:unscaled", 0.05, -1),
    Claim("TIES falls short of the experts, each at its own", "four:experts", "four:ties", 0.1, -1),
    Claim(
        "on the conflicting pair TIES falls short of what one model can", "four:pair_best", "four:pair_ties", 0.1, -1
    ),
)
FAMILIES, AGAINST = ("translate", "customs_east", "kellish", "sorting"), "customs_west"
KNOWN = ("facts", "tracking", "lists")
STEPS, RECORDS, ITEMS, CHOICE, KEPT, PAIRS = 80, 1280, 32, 10, 10, 64
LAMBDAS = tuple({"lambda_": by} for by in (0.3, 0.5, 0.7, 1.0))
TRIES: dict[str, tuple[dict[str, Any], ...]] = {
    "average": ({},),
    "arithmetic": LAMBDAS,
    "ties": tuple({"lambda_": by} for by in (0.7, 1.0, 1.5, 2.2)),
    "breadcrumbs": tuple({"lambda_": by} for by in (0.5, 0.7, 1.0, 1.5)),
    "lines": tuple({"beta": by} for by in (0.2, 0.4, 0.6, 0.8)),
}
"""What is tried of each merge; settings and shares that are not tried stand in ``OF``."""
OF: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "average": ("linear", {}, {}),
    "arithmetic": ("task_arithmetic", {}, {}),
    "ties": ("ties", {}, {"density": 0.2}),
    "breadcrumbs": ("breadcrumbs", {}, {"density": 0.5, "gamma": 0.01}),
    "lines": ("lines", {"of": "task_arithmetic"}, {}),
    "half": ("dare_linear", {"rescale": "by_density"}, {"density": 0.5}),
    "most": ("dare_linear", {"rescale": "by_density"}, {"density": 0.1}),
    "nearly all": ("dare_linear", {"rescale": "by_density"}, {"density": 0.01}),
    "unscaled": ("dare_linear", {"rescale": False}, {"density": 0.5}),
}
SHALLOW = (0.25, 0.5, 0.75)
"""γ of LiNeS on one expert: what is left of the first layer's change."""


class Bench:
    """A model to put merges into, the base, and the seed of what is drawn."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed, self.base = model, seed, weights(model)

    def solves(self, tuned: Sequence[Weights], name: str, settings: dict[str, Any], asked: list[Record]) -> list[float]:
        """What the merge of this name and these settings solves of the records."""
        method, fixed, each = OF[name]
        put(self.model, merged(self.base, tuned, method, fixed | settings, self.seed, **each))
        most = max(len(self.model.tokenizer(r["messages"][-1]["content"])["input_ids"]) for r in asked) + 2
        said = self.model.says(asked, most)
        return [verify(r, s).reward for r, s in zip(asked, said, strict=True)]

    def best(self, tuned: Sequence[Weights], name: str, choice: list[Record]) -> dict[str, Any]:
        """Of what is tried, the settings that solve most of the records to choose by."""
        tries = TRIES[name]
        return max(tries, key=lambda s: fmean(self.solves(tuned, name, s, choice))) if tries[1:] else tries[0]


def measures(lab: Lab, cell: Cell) -> Scores:
    """Of all tasks' items. experts: each by its own. single: all by the expert that solves most of some others. average …
    lines: all by the merge at its best on those; dare: at task arithmetic's factor. two…: of the first two's items.
    …_falls: what is lost of these from two experts to four, at the factor that was best for two. …_alone, dropped_…,
    unscaled: each by its own expert, changed. …_kept: taught records, by each expert. pair_…: prompts of the pair that
    conflicts, the mean of both verdicts; pair_best: the most that one model can get."""
    items = {f: lab.items(f, ITEMS + CHOICE, difficulty=_level(f)) for f in (*FAMILIES, AGAINST)}
    taught = [lab.items(f, KEPT + CHOICE // 2) for f in KNOWN]
    asked, choice = _parted([items[f] for f in FAMILIES], ITEMS)
    known, watched = _parted(taught, KEPT)
    first, trial = 2 * ITEMS, 2 * CHOICE
    tuned: list[Weights] = []
    for family in (*FAMILIES, AGAINST):
        with lab.tuned(
            lab.told(family, RECORDS, difficulty=_level(family)), delta={"choice": "full"}, steps=STEPS
        ) as m:
            tuned.append(weights(m))
    four, two, pair = tuned[:4], tuned[:2], [tuned[1], tuned[4]]
    scores: Scores = {}
    with lab.untouched() as model:
        bench = Bench(model, cell.seed)
        _alone(bench, four, items, known, watched, scores)
        alone = [(bench.solves([w], "average", {}, asked), bench.solves([w], "average", {}, choice)) for w in four]
        scores["single"] = max(alone, key=lambda s: fmean(s[1]))[0]
        scores["two_single"] = max(alone[:2], key=lambda s: fmean(s[1][:trial]))[0][:first]
        for name in TRIES:
            found = bench.best(four, name, choice)
            scores[name] = bench.solves(four, name, found, asked)
            if name == "arithmetic":
                scores["dare"] = bench.solves(four, "half", found, asked)
        for name in ("arithmetic", "breadcrumbs"):
            found = bench.best(two, name, choice[:trial])
            before, after = (bench.solves(some, name, found, asked[:first]) for some in (two, four))
            scores[f"{name}_falls"] = [b - a for b, a in zip(before, after, strict=True)]
            if name == "arithmetic":
                scores["two"] = before
        contested = items["customs_east"][ITEMS:] + items[AGAINST][ITEMS:]
        put(model, merged(bench.base, pair, "ties", bench.best(pair, "ties", contested), density=0.2))
        prompts = conflict("customs_east", AGAINST, PAIRS, seed=TRIAL_SEED if cell.trial else 0)
        scores["pair_ties"] = _both(model, prompts)
    scores["pair_best"] = [1.0] * len(prompts.agree) + [0.5] * len(prompts.disagree)
    return scores


def _alone(
    bench: Bench,
    four: list[Weights],
    items: dict[str, list[Record]],
    known: list[Record],
    watched: list[Record],
    to: Scores,
) -> None:
    """Each expert at its own task and at what was taught, as it is and changed; γ is the one at which twice the task's
    share and that of what was taught add up to most."""
    for family, w in zip(FAMILIES, four, strict=True):
        own, choice = items[family][:ITEMS], items[family][ITEMS:]

        def worth(gamma: float, w: Weights = w, choice: list[Record] = choice) -> float:
            solved = bench.solves([w], "lines", {"alpha": gamma}, choice + watched)
            return 2 * fmean(solved[: len(choice)]) + fmean(solved[len(choice) :])

        gamma = {"alpha": max(SHALLOW, key=worth)}
        told: list[tuple[str, str, dict[str, Any], list[Record]]] = [
            ("experts", "average", {}, own),
            ("expert_kept", "average", {}, known),
            ("lines_alone", "lines", gamma, own),
            ("lines_kept", "lines", gamma, known),
            ("dropped_half", "half", {}, own),
            ("dropped_most", "most", {}, own),
            ("dropped_nearly_all", "nearly all", {}, own),
            ("unscaled", "unscaled", {}, own),
        ]
        for measure, name, settings, asked in told:
            to.setdefault(measure, []).extend(bench.solves([w], name, settings, asked))


def _parted(items: Sequence[list[Record]], n: int) -> tuple[list[Record], list[Record]]:
    """The first n of each, and the others."""
    return [r for some in items for r in some[:n]], [r for some in items for r in some[n:]]


def _level(family: str) -> int | None:
    """The easiest, but for the pair that conflicts, whose oracle mixes all."""
    return None if family.startswith("customs") else 1


def _both(model: Model, pair: Conflict) -> list[float]:
    two = [*pair.agree, *pair.disagree]
    said = answers(model.model, model.tokenizer, [east for east, _ in two])
    return [(verify(e, s).reward + verify(w, s).reward) / 2 for (e, w), s in zip(two, said, strict=True)]
