"""Experts of eight tasks, two of which contradict each other, merged into one model in several ways."""

from __future__ import annotations

from statistics import fmean

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._merging import TRIES, Bench, Weights, level, parted, started, weights
from luthier.effects.lab import TRIAL_SEED, Lab, Model
from luthier.practice.card import answers
from luthier.practice.oracles.conflict import Conflict, conflict
from luthier.practice.world import verify

ABOUT = "eight experts, tuned from a model that half knows their tasks, do more of all of them merged than the best one alone"
PAPERS = ("P026", "P222", "P268", "P317")
BASE = "practice"
ARMS = {"eight": (1e-4, 2e-4, 4e-4)}
CHOSEN_BY = "experts"
CLAIMS = (
    Claim("each expert is better at its task than the start", "eight:start", "eight:experts", 0.05),
    Claim("two experts added up solve more of both tasks than the better one", "eight:two_single", "eight:two", 0.05),
    Claim("averaging eight solves more of all tasks than the start", "eight:start", "eight:average", 0.05),
    Claim("averaging solves more than the best expert alone", "eight:single", "eight:average", 0.05),
    Claim("task arithmetic solves more than the best expert alone", "eight:single", "eight:arithmetic", 0.05),
    Claim("TIES solves more than the best expert alone", "eight:single", "eight:ties", 0.05),
    Claim("task arithmetic solves more than averaging", "eight:average", "eight:arithmetic", 0.05),
    Claim("TIES solves more than task arithmetic", "eight:arithmetic", "eight:ties", 0.05),
    Claim("breadcrumbs solves more than task arithmetic", "eight:arithmetic", "eight:breadcrumbs", 0.05),
    Claim("LiNeS on task arithmetic solves more than it alone", "eight:arithmetic", "eight:lines", 0.05),
    Claim(
        "half of every change dropped first, task arithmetic solves as much", "eight:arithmetic", "eight:dare", 0.05, 0
    ),
    Claim(
        "from two experts to eight at one factor, breadcrumbs loses less of the first two's tasks than task arithmetic",
        *("eight:arithmetic_falls", "eight:breadcrumbs_falls", 0.05, -1),
    ),
    Claim("task arithmetic falls short of the experts, each at its own", "eight:experts", "eight:arithmetic", 0.1, -1),
    Claim("TIES falls short of the experts, each at its own", "eight:experts", "eight:ties", 0.1, -1),
    Claim(
        "on the conflicting pair TIES falls short of what one model can", "eight:pair_best", "eight:pair_ties", 0.1, -1
    ),
)
FAMILIES = ("translate", "sorting", "kellish", "norrish", "tagging", "derivations", "customs_east", "customs_west")
FIRST, BEGUN, RATE = 300, 300, 6e-4
"""Steps of the start, records of each task in it, and its rate."""
STEPS, RECORDS, ITEMS, CHOICE, PAIRS = 80, 1280, 24, 8, 64


def measures(lab: Lab, cell: Cell) -> Scores:
    """Of all tasks' items. start: by the model that every expert is tuned from. experts: each by its own. single: all by the
    expert that solves most of some others. average … lines: all by the merge at its best on those; dare: at task
    arithmetic's factor. two…: of the first two's items. …_falls: what is lost of these from two experts to eight, at the
    factor that was best for two. pair_…: prompts of the pair that conflicts, the mean of both verdicts; pair_best: the most
    that one model can get."""
    items = {f: lab.items(f, ITEMS + CHOICE, difficulty=level(f)) for f in FAMILIES}
    asked, choice = parted(list(items.values()), ITEMS)
    little = [lab.told(f, BEGUN, difficulty=level(f)) for f in FAMILIES]
    start, begun = started(lab, little, FIRST, RATE)
    tuned: list[Weights] = []
    for family in FAMILIES:
        told = lab.told(family, RECORDS, difficulty=level(family))
        with lab.tuned(told, delta={"choice": "full", "start_from": begun}, steps=STEPS) as m:
            tuned.append(weights(m))
    with lab.untouched() as model:
        bench = Bench(model, cell.seed, start)
        scores: Scores = {"start": bench.solves([start], "average", {}, asked)}
        alone = [(bench.solves([w], "average", {}, asked), bench.solves([w], "average", {}, choice)) for w in tuned]
        scores["experts"] = [s for k, one in enumerate(alone) for s in one[0][k * ITEMS : (k + 1) * ITEMS]]
        scores["single"] = max(alone, key=lambda s: fmean(s[1]))[0]
        for name in TRIES:
            found = bench.best(tuned, name, choice)
            scores[name] = bench.solves(tuned, name, found, asked)
            if name == "arithmetic":
                scores["dare"] = bench.solves(tuned, "half", found, asked)
        first, trial = asked[: 2 * ITEMS], choice[: 2 * CHOICE]
        scores["two_single"] = max(alone[:2], key=lambda s: fmean(s[1][: 2 * CHOICE]))[0][: 2 * ITEMS]
        for name in ("arithmetic", "breadcrumbs"):
            found = bench.best(tuned[:2], name, trial)
            before, after = (bench.solves(some, name, found, first) for some in (tuned[:2], tuned))
            scores[f"{name}_falls"] = [b - a for b, a in zip(before, after, strict=True)]
            if name == "arithmetic":
                scores["two"] = before
        bench.merge(tuned[-2:], "ties", bench.best(tuned[-2:], "ties", choice[-2 * CHOICE :]))
        prompts = conflict(*FAMILIES[-2:], PAIRS, seed=TRIAL_SEED if cell.trial else 0)
        scores["pair_ties"] = _both(model, prompts)
    scores["pair_best"] = [1.0] * len(prompts.agree) + [0.5] * len(prompts.disagree)
    return scores


def _both(model: Model, pair: Conflict) -> list[float]:
    two = [*pair.agree, *pair.disagree]
    said = answers(model.model, model.tokenizer, [east for east, _ in two])
    return [(verify(e, s).reward + verify(w, s).reward) / 2 for (e, w), s in zip(two, said, strict=True)]
