"""A chain of stages run in order, each handing its folder on to the next; one that is done is not run again."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.delta.folder import refuse_existing
from luthier.delta.header import read_header
from luthier.errors import LuthierError
from luthier.measuring.report import replace_text
from luthier.plan.stages import Stage, load_stages, references, resolved
from luthier.training.checkpoint import finished
from luthier.training.lock import locked
from luthier.verbs.foresee import foresee
from luthier.verbs.launch import launched, words_of
from luthier.verbs.tune import tune

RECORD = "stages.json"
"""File of the chain's folder that says which stages are done, with their settings and what they took."""


@dataclass
class Chain:
    """What a chain gave."""

    out: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    """name, verb, folder, seconds and, where it measured, the verdict of each stage."""
    stopped: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    """Of the last stage that measured."""


def run_stages(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    out: str | os.PathLike[str] = "out",
    resume: bool = False,
    progress: bool = True,
    launcher: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Chain:
    """Runs the stages of a chain into `out`/<name>. Gives a Chain.

    resume: stages that are done with the same settings, on stages that did not change, are passed over, and a run that
    was cut short goes on from its checkpoint. launcher: the command that starts every run on several processes, such as
    'torchrun --nproc_per_node 2'; the other verbs are done by this one. Errors: whatever the plan or a stage refuses, with
    the stage's name; a folder that holds a chain already; a stage's folder that this chain did not write; a chain that was
    itself started on several processes.
    """
    stages = load_stages(source, overrides)
    foresee(stages)
    folder = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LuthierError(
            "a chain was started on several processes: start it once, with --launcher 'torchrun --nproc_per_node N' (or "
            "another), which starts every run"
        )
    if launcher is not None:
        words_of(launcher)
    with locked(folder):
        held = _record(folder)
        if any("seconds" in row for row in held.values()) and not resume:
            raise LuthierError(f"{folder} holds a chain already: add --resume to go on, or choose another --out")
        for stage in stages:
            if stage.name not in held:
                refuse_existing(folder / stage.name)
        rows = _still_good(stages, held)
        kept = set(rows)
        chain = Chain(folder)
        folders: dict[str, Path] = {}
        for stage in stages:
            settings = resolved(stage.settings, folders)
            folders[stage.name] = folder / stage.name
            if stage.name in kept:
                continue
            if "seconds" in held.get(stage.name, {}):
                shutil.rmtree(folders[stage.name], ignore_errors=True)
            rows[stage.name] = _row(stage)
            _write(folder, stages, rows, held)
            say(f"stage {stage.name}: {stage.verb}")
            began = time.perf_counter()
            result = _run(stage, settings, stages, folders, resume, progress, launcher)
            if getattr(result, "stopped", None) and not getattr(result, "report", None):
                chain.stopped = result.stopped
                break
            report = dict(getattr(result, "report", None) or {})
            verdict = (report.get("audit") or {}).get("verdict")
            seconds = round(time.perf_counter() - began, 2)
            rows[stage.name] |= {"seconds": seconds, "verdict": (verdict or {}).get("line")}
            chain.report = report or chain.report
            _write(folder, stages, rows, held)
        chain.stages = [rows[s.name] for s in stages if "seconds" in rows.get(s.name, {})]
        return chain


def _row(stage: Stage) -> dict[str, Any]:
    """What decides a stage beside those it stands on; a row without seconds is of one that has begun."""
    return {"name": stage.name, "verb": stage.verb, "settings": stage.settings}


def _still_good(stages: Sequence[Stage], held: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of stages that are done with the same settings, on stages that are too."""
    good: dict[str, dict[str, Any]] = {}
    first_run = [s.name for s in stages if s.verb == "tune"][:1]
    for stage in stages:
        row = _row(stage)
        old = held.get(stage.name, {})
        stands_on = {*references(stage.settings), *(first_run if stage.verb == "audit" else ())}
        if "seconds" in old and {k: old[k] for k in row} == row and stands_on <= set(good):
            good[stage.name] = old
    return good


def _run(
    stage: Stage,
    settings: dict[str, Any],
    stages: Sequence[Stage],
    folders: Mapping[str, Path],
    resume: bool,
    progress: bool,
    launcher: str | None,
) -> Any:
    """One stage by its verb. A verb that writes a fresh folder finds none of an earlier, broken try."""
    out = folders[stage.name]
    try:
        if stage.verb != "tune" or finished(out):  # finished: the chain stopped before it took note of it
            shutil.rmtree(out, ignore_errors=True)
        if stage.verb == "tune":
            again = resume and out.exists()
            if launcher is not None:
                return launched(launcher, settings, out, resume=again, progress=progress)
            return tune(settings, out=out, resume=again, progress=progress)
        if stage.verb == "audit":
            return _audit(settings, stages, folders, out)
        if stage.verb == "diff":
            return _diff(settings, out)
        return getattr(importlib.import_module(f"luthier.verbs.{stage.verb}"), stage.verb)(settings, out=out)
    except LuthierError as e:
        raise LuthierError(f"stage '{stage.name}': {e}") from e


def _diff(settings: Mapping[str, Any], out: Path) -> Any:
    """The delta between two checkpoints; the settings are the verb's own."""
    from luthier.verbs.diff import diff

    return diff(**settings, out=out)


def _audit(settings: dict[str, Any], stages: Sequence[Stage], folders: Mapping[str, Path], out: Path) -> Any:
    """Measures `delta`, with the other keys as the audit section; base and data as in the chain's first run."""
    from luthier.verbs.audit import audit

    spec = dict(settings)
    delta = spec.pop("delta")
    plan = next((resolved(s.settings, folders) for s in stages if s.verb == "tune"), None)
    if "plan" in spec:
        plan = spec.pop("plan")
    elif plan is not None and (Path(delta) / "delta.json").exists():  # a port leaves the first run's base
        stated = plan.get("base", {})
        table = {"name": stated} if isinstance(stated, str) else stated
        plan = {**plan, "base": {**table, "name": read_header(delta)["base"].get("name", "practice")}}
    if plan is None:
        raise LuthierError("audit: no run in the chain says what base and data are: state plan:")
    return audit(delta, {**plan, "audit": spec}, out=out)


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError) as e:
        raise LuthierError(f"{path} is not what a chain writes ({e}): remove it, or choose another --out") from e


def _write(
    folder: Path, stages: Sequence[Stage], rows: Mapping[str, dict[str, Any]], held: Mapping[str, dict[str, Any]]
) -> None:
    """The rows, in the chain's order; of stages still to be run again, that their folders are the chain's own."""
    begun = {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in held.items()}
    told = [(rows.get(s.name) or begun.get(s.name)) for s in stages]
    text = json.dumps([row for row in told if row], indent=1, ensure_ascii=False, default=str) + "\n"
    replace_text(folder / RECORD, text)
