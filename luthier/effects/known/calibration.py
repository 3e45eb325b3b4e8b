"""Many passes over few records leave a model surer than the exact posterior; one pass over many does not."""

from __future__ import annotations

from itertools import islice

import torch

from luthier.effects.contract import Cell, Claim, Scores
from luthier.effects.lab import TRIAL_SEED, Lab, Model
from luthier.practice.families.classify import GUILDS
from luthier.practice.oracles.posterior import posterior, resampled
from luthier.practice.world import Record, records

ABOUT = "many passes over few records, rather than one over many, end further from the posterior and surer than right"
PAPERS = ("P484", "P125")
BASE = "practice/s"
ARMS = {"base": (), "many": (3e-4, 1e-3, 3e-3), "few": (3e-4, 1e-3, 3e-3)}
CHOSEN_BY = "right"
CLAIMS = (
    Claim("one pass over many records comes nearer to the posterior", "base:near", "many:near", effect=0.1),
    Claim("many passes over few end further from it", "many:near", "few:near", effect=0.1, sign=-1),
    Claim("many passes over few make surer than right", "many:surer", "few:surer", effect=0.1),
)
STEPS, BATCH, PASSES, ITEMS = 300, 16, 20, 200


def measures(lab: Lab, cell: Cell) -> Scores:
    """near: minus the Kullback-Leibler divergence of the model's shares from the exact posterior, in nats. right: the
    posterior of the guild it holds likeliest, which is its expected accuracy. surer: its share of that guild less that.

    Labels told are drawn from the posterior; both arms take as many steps, on all records once or on one in ``PASSES``.
    """
    if cell.arm == "base":
        with lab.untouched() as model:
            return _scores(lab, model)
    n = STEPS * BATCH // (PASSES if cell.arm == "few" else 1)
    told = [resampled(r, cell.seed) for r in _notes("train", n, 1 + 10 * cell.seed)]
    with lab.tuned(told, delta={"choice": "full"}, steps=STEPS, batch=BATCH) as model:
        return _scores(lab, model)


def _notes(split: str, n: int, seed: int) -> list[Record]:
    """n notes that ask for a guild, not for a house."""
    found = (r for r in records("classify", split, seed=seed, difficulty=2) if r["answer"] in GUILDS)
    return list(islice(found, n))


def _scores(lab: Lab, model: Model) -> Scores:
    asked = _notes("test", ITEMS, TRIAL_SEED if lab.cell.trial else 0)
    shares = model.shares(asked, [f"{guild.capitalize()}." for guild in GUILDS]).double().clamp_min(1e-12)
    true = torch.tensor([[*posterior(r)[0].values()] for r in asked], dtype=torch.float64)
    right = true.gather(1, shares.argmax(1, keepdim=True))[:, 0]
    near = -(torch.special.xlogy(true, true) - true * shares.log()).sum(1)
    return {"near": near.tolist(), "right": right.tolist(), "surer": (shares.amax(1) - right).tolist()}
