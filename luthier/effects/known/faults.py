"""Wrong and repeated records hurt; choosing records pays where there is something to weed out."""

from __future__ import annotations

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import Lab
from luthier.practice.draw import Draw
from luthier.practice.oracles.pools import pool
from luthier.practice.world import Record, records

ABOUT = (
    "wrong and repeated records hurt; random selection ties with a selector on a clean pool and loses on a faulty one"
)
PAPERS = ("P129", "P075", "P456", "P331")
BASE = "practice/s"
RATES = (1e-3, 3e-3, 1e-2)
ARMS = {arm: RATES for arm in ("clean", "clean_chosen", "wrong", "wrong_chosen", "repeated")}
CHOSEN_BY = "right"
CLAIMS = (
    Claim("wrong answers in three of ten records hurt", "clean:right", "wrong:right", effect=0.05, sign=-1),
    Claim("a tenth of the records ten times hurts", "clean:right", "repeated:right", effect=0.05, sign=-1),
    Claim("on the clean pool random selection ties with a selector", "clean:right", "clean_chosen:right", 0.1, 0),
    Claim("on the faulty pool random selection loses to it", "wrong:right", "wrong_chosen:right", effect=0.1),
)
FAMILY, LEVEL, POOL, TRUSTED, STEPS, ITEMS = "translate", 2, 800, 100, 300, 200


def measures(lab: Lab, cell: Cell) -> Scores:
    """right: test records solved after tuning on half of a pool of ``POOL`` records, in as many steps in every arm."""
    with lab.tuned(_half(lab, cell), delta={"choice": "full"}, steps=STEPS) as model:
        return {"right": model.solves(lab.items(FAMILY, ITEMS, difficulty=LEVEL))}


def _half(lab: Lab, cell: Cell) -> list[Record]:
    """What an arm is told: of the clean pool, or of the one in which three of ten answers are wrong, a random half or
    the selector's half; ``repeated`` is a tenth of the clean half, ten times each."""
    made = pool(FAMILY, POOL, {"wrong": 0.3}, seed=cell.seed, difficulty=LEVEL)
    pooled = made.faulty if cell.arm.startswith("wrong") else made.clean
    if cell.arm.endswith("chosen"):
        return _chosen(lab, pooled)
    some = Draw(f"luthier/effects/faults/{cell.seed}").some(pooled, POOL // 2)
    return some[: POOL // 20] * 10 if cell.arm == "repeated" else some


def _chosen(lab: Lab, pooled: list[Record]) -> list[Record]:
    """The half with the lowest loss under the base tuned on ``TRUSTED`` clean records of its own (our selector, of the
    kind of P075's: lowest perplexity under a model at hand)."""
    trusted = list(records(FAMILY, "train", TRUSTED, seed=100 + lab.cell.seed, difficulty=LEVEL))
    with lab.tuned(trusted, delta={"choice": "full"}, steps=STEPS // 4, rate=1e-3) as judge:
        losses = judge.losses(pooled)
    order = sorted(range(len(pooled)), key=losses.__getitem__)
    return [pooled[i] for i in order[: len(pooled) // 2]]
