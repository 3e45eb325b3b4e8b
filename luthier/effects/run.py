"""Runs an effect: sweep, pilot, power, the runs that count, verdicts. Every cell's scores are kept in a file and not run again."""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from luthier.effects import origin
from luthier.effects.contract import Cell, Claim, Effect, Scores, effect_named, waiting
from luthier.errors import LuthierError
from luthier.measuring.protocol import Arm, Plan, gentlest, judge, paired, spread

SEEDS = 5
PROTOCOL = 2
"""How rates are chosen and verdicts reached, by number; results by another are to be had again."""
TRIALS = range(1000, 1002)
"""Trial seeds, none of which counts: the first sweeps the rates, all of them at the best rate are the pilot."""


def text_digest(name: str) -> str:
    """Of an effect's own text, that of what it shares with others, of the bench and of what it takes from the world
    (``origin``): what its results hang on but for the base. A change of training is not seen: another --out runs anew."""
    return _text(name).hexdigest()


def digest(name: str) -> str:
    """What a cell is kept by: the effect's text and the content of its base, and of its ``LARGE`` one. Cells of two builds
    of a base are not mixed."""
    from luthier.bases.load import load_base
    from luthier.plan.schema import BaseSpec

    effect: Any = effect_named(name)
    told = _text(name)
    for base in filter(None, (effect.BASE, getattr(effect, "LARGE", None))):
        told.update(str(load_base(BaseSpec(name=base)).fingerprint).encode())  # pyright: ignore[reportCallIssue]
    return told.hexdigest()


def _text(name: str) -> blake2b:
    from luthier.effects import known, lab

    effect: Any = effect_named(name)
    told = blake2b(digest_size=8)
    text = inspect.getsource(effect)
    shared = [f"{known.__name__}.{m.name}" for m in pkgutil.iter_modules(known.__path__) if m.name.startswith("_")]
    own = (effect, lab, *(importlib.import_module(name) for name in shared if name in text))
    texts = [inspect.getsource(part) for part in own]
    for part in (*texts, origin.digest(texts)):
        told.update(part.encode())
    return told


def cell_scores(name: str, cell: Cell, key: str, out: Path) -> Scores:
    """The scores of one cell, from its file or from a run."""
    import torch

    from luthier.effects.lab import Lab

    path = out / name / f"{cell.key}.json"
    if path.is_file():
        held = json.loads(path.read_text())
        if held["key"] == key:
            return held["scores"]
    effect = effect_named(name)
    torch.manual_seed(cell.seed)
    scratch = out / name / f"{cell.key}.scratch"
    began = time.process_time()
    scores = effect.measures(Lab(effect.BASE, cell, scratch), cell)
    told = {"key": key, "seconds": round(time.process_time() - began, 1), "scores": scores}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told) + "\n")
    os.replace(part, path)
    shutil.rmtree(scratch, ignore_errors=True)
    return scores


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _map(name: str, cells: Sequence[Cell], key: str, out: Path, workers: int) -> dict[Cell, Scores]:
    """All cells' scores. Cells run in processes of one thread each, which two cores do faster than two threads in one."""
    wanted = list(dict.fromkeys(cells))
    if workers == 1:
        return {cell: cell_scores(name, cell, key, out) for cell in wanted}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        made = [pool.submit(cell_scores, name, cell, key, out) for cell in wanted]
        return {cell: job.result() for cell, job in zip(wanted, made, strict=True)}


def run(
    name: str,
    out: Path,
    workers: int = 2,
    seeds: int = SEEDS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Everything about one effect as a dictionary: rates tried, power stated before the runs, verdicts of its claims.

    An arm of one rate or none is not swept. Raises LuthierError for an unknown effect and one whose scores do not pair."""
    effect = effect_named(name)
    if why := waiting(effect):
        return {"about": effect.ABOUT, "papers": list(effect.PAPERS), "waiting": why, "claims": _planned(effect)}
    (out / name).mkdir(parents=True, exist_ok=True)
    key, began = digest(name), time.monotonic()
    first = [Cell(arm, rate, TRIALS[0], True) for arm, rates in effect.ARMS.items() for rate in rates or (None,)]
    say(f"{name}: {len(first)} trial runs over the rates")
    tried = _map(name, first, key, out, workers)
    arms: dict[str, Arm] = {}
    for arm, rates in effect.ARMS.items():
        scores = {rate: tried[Cell(arm, rate, TRIALS[0], True)][effect.CHOSEN_BY] for rate in rates}
        arms[arm] = Arm(arm, {r: float(np.mean(s)) for r, s in scores.items()}, gentlest(scores) if scores else None)
    best = {arm: found.chosen for arm, found in arms.items()}
    say(f"{name}: best rates {best}; {len(TRIALS)} trial seeds tell the spread")
    pilot = _scores(effect, name, best, TRIALS, True, key, out, workers)
    plans = [_plan(claim, pilot, seeds) for claim in effect.CLAIMS]
    for claim, plan in zip(effect.CLAIMS, plans, strict=True):
        say(f"{name}: {claim.says}: power {plan.power():.2f} for {claim.effect:g} with {seeds} seeds")
    final = _scores(effect, name, best, range(seeds), False, key, out, workers)
    claims = [_judged(claim, plan, final, arms) for claim, plan in zip(effect.CLAIMS, plans, strict=True)]
    held = [json.loads(p.read_text()) for p in (out / name).glob("*.json")]
    spent = sum(cell["seconds"] for cell in held if cell["key"] == key)
    return {
        "about": effect.ABOUT,
        "papers": list(effect.PAPERS),
        "base": effect.BASE,
        "key": key,
        "text": text_digest(name),
        "protocol": PROTOCOL,
        "seeds": seeds,
        "arms": {a: {"tried": {f"{r:g}": s for r, s in arm.tried.items()}, "rate": best[a]} for a, arm in arms.items()},
        "means": {side: round(float(final[side].mean()), 4) for side in sorted(final)},
        "claims": claims,
        "processor_seconds": round(spent),
        "seconds": round(time.monotonic() - began),
    }


def _planned(effect: Effect) -> list[dict[str, Any]]:
    return [{"says": c.says, "effect": c.effect, "sign": c.sign, "of": [c.baseline, c.method]} for c in effect.CLAIMS]


def _scores(
    effect: Effect,
    name: str,
    best: dict[str, float | None],
    seeds: range,
    trial: bool,
    key: str,
    out: Path,
    workers: int,
) -> dict[str, np.ndarray]:
    """'arm:measure' -> [seeds, items]. What is not tuned is run once and stands for every seed."""
    cells = {
        (arm, s): Cell(arm, rate, s if rate is not None else seeds[0], trial)
        for arm, rate in best.items()
        for s in seeds
    }
    found = _map(name, list(cells.values()), key, out, workers)
    table = {}
    for arm in best:
        for measure in found[cells[arm, seeds[0]]]:
            table[f"{arm}:{measure}"] = np.array([found[cells[arm, s]][measure] for s in seeds], dtype=np.float64)
    return table


def _side(scores: dict[str, np.ndarray], side: str, claim: Claim) -> np.ndarray:
    if side not in scores:
        raise LuthierError(f"effects: claim {claim.says!r} is about {side}, which no run measured; {', '.join(scores)}")
    return scores[side]


def _plan(claim: Claim, pilot: dict[str, np.ndarray], seeds: int) -> Plan:
    one, two = _side(pilot, claim.baseline, claim), _side(pilot, claim.method, claim)
    return Plan(claim.effect, seeds, one.shape[1], spread(one, two), claim.sign)


def _judged(claim: Claim, plan: Plan, scores: dict[str, np.ndarray], arms: dict[str, Arm]) -> dict[str, Any]:
    one, two = _side(scores, claim.baseline, claim), _side(scores, claim.method, claim)
    found = paired(one, two)
    compared = [arms[arm] for arm in dict.fromkeys(side.partition(":")[0] for side in (claim.baseline, claim.method))]
    tuned = [arm for arm in compared if arm.tried]
    verdict = judge(plan, found, tuned)
    return {
        "says": claim.says,
        "of": [claim.baseline, claim.method],
        "smallest": claim.effect,
        "sign": claim.sign,
        "items": found.items,
        "power": round(plan.power(), 3),
        "effect": found.effect,
        "interval": [found.low, found.high],
        "errors": found.errors,
        "verdict": verdict.verdict,
        "reason": str(verdict),
    }
