"""What one expert's change can do without: entries drawn at random (DARE), and size in the shallow layers (LiNeS)."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.known._merging import Bench, level, parted, weights
from luthier.effects.lab import Lab

ABOUT = "a tune does without nine tenths of its entries, if the others are scaled up, and keeps more with small shallow layers"
PAPERS = ("P222", "P268")
BASE = "practice"
ARMS = {"four": (3e-4, 6e-4, 1.2e-3)}
CHOSEN_BY = "experts"
CLAIMS = (
    Claim("LiNeS keeps more of what was taught than the expert", "four:expert_kept", "four:lines_kept", 0.05),
    Claim("and is as good at the expert's task", "four:experts", "four:lines_alone", 0.05, 0),
    Claim("half of its change dropped, an expert is as good", "four:experts", "four:dropped_half", 0.05, 0),
    Claim("nine tenths dropped, it is as good", "four:experts", "four:dropped_most", 0.05, 0),
    Claim("ninety-nine of a hundred dropped, it is worse", "four:experts", "four:dropped_nearly_all", 0.05, -1),
    Claim("half dropped and not rescaled, it is worse than rescaled", "four:dropped_half", "four:unscaled", 0.05, -1),
)
FAMILIES = ("translate", "customs_east", "kellish", "sorting")
KNOWN = ("facts", "tracking", "lists")
STEPS, RECORDS, ITEMS, CHOICE, KEPT = 80, 1280, 32, 10, 10
SHALLOW = (0.25, 0.5, 0.75)
"""γ of LiNeS: what is left of the first layer's change."""


def measures(lab: Lab, cell: Cell) -> Scores:
    """Each expert at its own task and (…_kept) at what was taught, as it is and changed; γ is the one at which twice the
    task's share and that of what was taught add up to most."""
    items = {f: lab.items(f, ITEMS + CHOICE, difficulty=level(f)) for f in FAMILIES}
    known, watched = parted([lab.items(f, KEPT + CHOICE // 2) for f in KNOWN], KEPT)
    tuned = []
    for family in FAMILIES:
        told = lab.told(family, RECORDS, difficulty=level(family))
        with lab.tuned(told, delta={"choice": "full"}, steps=STEPS) as m:
            tuned.append(weights(m))
    scores: Scores = {}
    with lab.untouched() as model:
        bench = Bench(model, cell.seed)
        for family, w in zip(FAMILIES, tuned, strict=True):
            own, choice = items[family][:ITEMS], items[family][ITEMS:]

            def worth(gamma: float, w: Any = w, choice: Any = choice) -> float:
                solved = bench.solves([w], "lines", {"alpha": gamma}, choice + watched)
                return 2 * fmean(solved[: len(choice)]) + fmean(solved[len(choice) :])

            gamma = {"alpha": max(SHALLOW, key=worth)}
            for measure, name, settings, asked in (
                ("experts", "average", {}, own),
                ("expert_kept", "average", {}, known),
                ("lines_alone", "lines", gamma, own),
                ("lines_kept", "lines", gamma, known),
                ("dropped_half", "half", {}, own),
                ("dropped_most", "most", {}, own),
                ("dropped_nearly_all", "nearly all", {}, own),
                ("unscaled", "unscaled", {}, own),
            ):
                scores.setdefault(measure, []).extend(bench.solves([w], name, settings, asked))
    return scores
