"""Averages of the weights of runs of one task, from a start that half knows it: of several runs, of other starts, with the
start, and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from luthier.delta import MERGES
from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._merging import Weights, merged, put, started, weights
from luthier.effects.lab import Lab, Model
from luthier.practice.world import Record

ABOUT = "averages of runs of one task, from a start that half knows it, do more on longer prompts than the runs, and forget less"
PAPERS = ("P017", "P024", "P080", "P405", "P412", "P430")
BASE = "practice/s"
ARMS = dict.fromkeys(("workers", "together", "recycled", "fast", "slow"), (2.5e-4, 5e-4, 1e-3))
CHOSEN_BY = "target"
CLAIMS = (
    Claim("a uniform soup of four is better on longer lists than a run", "workers:single_far", "workers:soup_far", 0.1),
    Claim("a greedy soup is better on them than the best run", "workers:best_far", "workers:greedy_far", 0.1),
    Claim("Model Stock of two is better on them than the better run", "workers:better_far", "workers:stock_far", 0.1),
    Claim("WiSE-FT at some share is better on them than the run", "workers:first_far", "workers:wise_far", 0.1),
    Claim("and as good on lists as long as those told", "workers:first", "workers:wise", 0.05, 0),
    Claim("four workers averaged are as good as one run on all they saw", "together:target", "workers:soup", 0.05, 0),
    Claim("and better on longer lists", "together:far", "workers:soup_far", 0.1),
    Claim("begun at tunes of other tasks, the soup is better on them", "workers:soup_far", "recycled:soup_far", 0.1),
    Claim("slow weights keep more of a first task than fast ones", "fast:earlier", "slow:earlier", 0.05),
    Claim("and do more of both tasks", "fast:target", "slow:target", 0.05),
)
TASK, LATER, OTHERS = "customs_east", "translate", ("kellish", "sorting", "tagging", "translate")
FIRST, BEGUN, RATE = 150, 480, 1e-3
"""Steps of the start, records of each task in it, and its rate."""
STEPS, RECORDS, ITEMS, CHOICE = 60, 960, 120, 40
SHARES = (0.3, 0.5, 0.7, 0.9)
SLOW = "luthier.training.averages:SlowWeights(momentum=0.98, every=1)"


def measures(lab: Lab, cell: Cell) -> Scores:
    """The start was told a little of lists of two, three and four and of other tasks, the runs of lists of two and three; a
    stream of two tasks, in which something is to be forgotten, starts from the base. target: which of such are done right;
    in the stream half of them, and as many items of the second task; earlier: such lists. far: lists of four,
    log-likelihood of a token of what is right. single: the mean of the runs; first: the first; best: the one that does most
    of other lists; better: the one of the first two that is better on the longer ones."""
    near, far, told = _lists(lab, ITEMS), lab.items(TASK, ITEMS, difficulty=3), _told(lab)
    if cell.arm in ("fast", "slow"):
        return _stream(lab, told[: 2 * RECORDS], near)
    first, start = _started(lab)
    if cell.arm == "together":
        with lab.tuned(told, delta=_on(start), steps=STEPS, batch=64) as model:
            return {"target": model.solves(near), "far": _likely(model, far)}
    runs: list[Weights] = []
    for k in range(4):
        begun = _begun(lab, start, k) if cell.arm == "recycled" else start
        part = told[k * RECORDS : (k + 1) * RECORDS]
        with lab.tuned(part, delta=_on(begun), steps=STEPS, seed=4 * cell.seed + k) as model:
            runs.append(weights(model))
    with lab.untouched() as model:
        return _averaged(lab, model, first, runs, near, far)


def _averaged(
    lab: Lab, model: Model, base: Weights, runs: Sequence[Weights], near: list[Record], far: list[Record]
) -> Scores:
    scores = Scores()
    tasted, beyond = _lists(lab, ITEMS + CHOICE)[ITEMS:], lab.items(TASK, ITEMS + CHOICE, difficulty=3)[ITEMS:]

    def does(new: Weights, asked: list[Record]) -> list[float]:
        put(model, new)
        return _likely(model, asked) if asked is far or asked is beyond else model.solves(asked)

    def soup(each: Mapping[str, list[float]]) -> Weights:
        return merged(base, [w for w, on in zip(runs, each["weight"], strict=True) if on], "linear", {})

    greedy = MERGES.make("greedy_soup", {}).search(len(runs), lambda each: fmean(does(soup(each), tasted)))
    shares = [merged(base, runs[:1], "wise_ft", {"alpha": share}) for share in SHARES]
    whole = fmean(does(runs[0], tasted))
    held = [w for w in shares if fmean(does(w, tasted)) >= whole]
    for name, new in {
        "soup": merged(base, runs, "linear", {}),
        "greedy": soup(greedy),
        "best": max(runs, key=lambda w: fmean(does(w, tasted))),
        "stock": merged(base, runs[:2], "model_stock", {}),
        "wise": max([*held, runs[0]], key=lambda w: fmean(does(w, beyond))),
        "first": runs[0],
    }.items():
        scores[name], scores[f"{name}_far"] = does(new, near), does(new, far)
    alone = [[does(w, asked) for w in runs] for asked in (near, far)]
    scores["target"], scores["single_far"] = ([fmean(s) for s in zip(*each, strict=True)] for each in alone)
    return scores | {"better_far": max(alone[1][:2], key=fmean)}


def _likely(model: Model, asked: list[Record]) -> list[float]:
    return [-loss for loss in model.losses(asked)]


def _stream(lab: Lab, told: list[Record], near: list[Record]) -> Scores:
    callbacks = [SLOW] if lab.cell.arm == "slow" else []
    with lab.tuned(told, delta={"choice": "full"}, steps=2 * STEPS, callbacks=callbacks) as model:
        earlier = model.saved(lab.scratch / "first")
    then = lab.told(LATER, 2 * RECORDS, difficulty=1)
    with lab.tuned(then, delta=_on(earlier), steps=2 * STEPS, callbacks=callbacks) as model:
        kept, later = model.solves(near), model.solves(lab.items(LATER, ITEMS - ITEMS // 2, difficulty=1))
    return {"target": kept[: ITEMS // 2] + later, "earlier": kept}


def _on(folder: str) -> dict[str, str]:
    return {"choice": "full", "start_from": folder}


def _started(lab: Lab) -> tuple[Weights, str]:
    lists = [lab.told(TASK, BEGUN // 3, difficulty=level) for level in (1, 2, 3)]
    return started(lab, [*lists, *(lab.told(f, BEGUN, difficulty=1) for f in OTHERS)], FIRST, RATE)


def _begun(lab: Lab, start: str, k: int) -> str:
    """A tune of another task."""
    with lab.tuned(lab.told(OTHERS[k], RECORDS, difficulty=1), delta=_on(start), steps=STEPS) as model:
        return model.saved(lab.scratch / f"begun-{k}")


def _told(lab: Lab) -> list[Record]:
    """Four times RECORDS lists of two and of three, in turn."""
    return _turns(*(lab.told(TASK, 2 * RECORDS, difficulty=level) for level in (1, 2)))


def _lists(lab: Lab, n: int) -> list[Record]:
    return _turns(*(lab.items(TASK, n - n // 2, difficulty=level) for level in (1, 2)))[:n]


def _turns(one: list[Record], other: list[Record]) -> list[Record]:
    return [r for two in zip(one, other, strict=True) for r in two]
