"""tune: a plan in, a delta out, with what it gained and what it cost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.attach import Above
from luthier.attach.weights import module_at
from luthier.bases.fingerprint import base_tensors
from luthier.bridge.target import logits_of
from luthier.delta import No
from luthier.delta.artefact import Delta
from luthier.delta.probes import check_probes, record_probes
from luthier.delta.seals import seals_of
from luthier.errors import LuthierError
from luthier.measuring.audit import Audit, audit
from luthier.measuring.cost import folder_bytes
from luthier.measuring.norms import Change, norms
from luthier.measuring.report import write_report
from luthier.measuring.sources import Prepared, known, prepare_checks
from luthier.plan import Plan
from luthier.plan.load import load_plan
from luthier.training.certificate import versions
from luthier.training.checkpoint import finished, latest
from luthier.training.lock import locked
from luthier.training.run import Interrupted, Training, build, interruptible, plain, signals
from luthier.verbs.push import check_push, push

WRITTEN = ("README.md", "report.html", "report.json", "log.jsonl")
"""What a run writes over in its folder, beside the delta."""


@dataclass
class Run:
    """What a tune gave: the delta, where it lies, and the report as a dictionary."""

    delta: Delta
    out: Path
    report: dict[str, Any]
    stopped: str | None = None
    """Why it ended before its last step or its report, if it did."""

    @property
    def remedy(self) -> str:
        """What to do about a run that was stopped."""
        if finished(self.out):
            return f"the delta is whole: measure it with luthier audit {self.out}"
        return f"go on with --resume --out {self.out}"

    @property
    def verdict(self) -> str:
        """What was gained and lost, in one line."""
        told = (self.report.get("audit") or {}).get("verdict")
        return told["line"] if told else "not measured"


def tune(
    plan: Plan | dict[str, Any] | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    out: str | os.PathLike[str] = "out",
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Any:
    """Trains the plan's deltas on its base and data, and measures before and after.

    plan: a Plan, its dictionary, or a YAML file; `overrides` are 'key.path=value'. out: folder for the delta,
    checkpoints and report; one in use is refused. resume: goes on from its newest checkpoint. dry_run: nothing is
    loaded or trained; gives what would happen (see verbs.dry_run). Gives a Run. A run that was asked to stop (Ctrl-C,
    SIGTERM) has saved a checkpoint and gives a Run with `stopped` set, without measurements; asked while it measures, it
    leaves its delta whole.
    """
    named = plan if isinstance(plan, str | os.PathLike) else "plan"
    plan = load_plan(plan, overrides)
    if not os.fspath(out).strip():
        raise LuthierError("out is empty: name the folder for the delta and the report")
    if dry_run:
        from luthier.verbs.dry_run import dry_run as predict

        return predict(plan)
    if plan.audit.enabled:
        known(plan.audit, named)
    if plan.push_to:
        check_push(plan.push_to)
    folder = Path(out)
    begun = folder.is_dir()
    for name in ("config.json", "adapter_config.json", "assembly.json"):
        if (folder / name).exists():
            raise LuthierError(f"{folder} holds another model ({name}): choose another --out")
    if finished(folder):
        unmeasured = (
            "" if (folder / "report.json").exists() else f" (without a report: luthier audit {folder} measures it)"
        )
        raise LuthierError(f"{folder} holds a finished delta{unmeasured}: choose another --out, or remove it")
    if not (folder / ".lock").exists() and (theirs := next((n for n in WRITTEN if (folder / n).exists()), None)):
        raise LuthierError(f"{folder} holds a {theirs} that is of no run: choose another --out")
    first = int(os.environ.get("RANK", "0")) == 0
    with locked(folder) if first else nullcontext():
        have = latest(folder / "checkpoints")
        if have and not resume:
            raise LuthierError(
                f"{folder} holds checkpoints of an earlier run: add --resume to go on, or choose another --out"
            )
        too_early = (
            resume and begun and have is None
        )  # killed before its first checkpoint: the same run, from its start
        training = build(plan, folder, resume=resume and not too_early, progress=progress)
        if too_early:
            training.base.notes.append(f"--resume found no checkpoint in {folder}: the run began at its first step")
        checks = _checks(training)
        with signals(training.events.stop):
            state = training.train()
        if state.stopped and not state.stopped.startswith("early"):
            result = Run(training.delta(), folder, {}, state.stopped)
        else:
            result = _finish(training, folder, checks)
        training.machine.close()
        return result


def _checks(training: Training) -> list[Prepared]:
    """What the audit will measure, read before the training that a wrong path or metric would else be told after."""
    plan = training.plan
    try:
        return prepare_checks(training.base, plan.audit, plan.data, plan.train.seed) if plan.audit.enabled else []
    except LuthierError:
        training.events.close(training.loop)
        raise


def _finish(training: Training, folder: Path, checks: Sequence[Prepared]) -> Run:
    """Seals, probes, the delta on disk, the audit and the report."""
    delta = training.delta()
    base, handle, plan = training.base, training.handle, training.plan
    parameters = sum(t.numel() for _, t in base_tensors(base.model))
    training.machine.unshard()  # after the state dict above, which would shard again
    delta.seals = seals_of(handle)
    delta.probes = _probes(training)
    if not training.machine.first:
        return Run(delta, folder, {})
    delta.files |= _tokenizer_files(training)
    delta.save(folder)
    found = Audit()
    if plan.audit.enabled and not training.machine.sharded:
        switch = Above(handle, training.pieces.parents)
        try:
            with interruptible():
                found = audit(base, switch, plan.audit, data=plan.data, seed=plan.train.seed, checks=checks)
        except Interrupted as asked:
            return Run(delta, folder, {}, f"{asked} while measuring")
    elif plan.audit.enabled:
        base.notes.append("not measured: the model is sharded; run 'luthier audit' on the delta")
    report = _report(training, delta, found, folder, parameters)
    delta.audit = {k: report["audit"][k] for k in ("verdict",) if k in report["audit"]}
    delta.save(folder)
    write_report(folder, report)
    if plan.push_to:
        push(folder, plan.push_to)
    return Run(delta, folder, report, training.loop.progress.stopped)


def _probes(training: Training) -> dict[str, Tensor]:
    """Base and tuned logits on fixed inputs, and on the beginnings of the first records; without autocast, as the model is
    used once it is loaded."""
    from luthier.training.proof import first_rows

    model, handle = training.base.model, training.handle
    model.eval()
    run = logits_of(model)

    def off(ids: Tensor) -> Tensor:
        with handle.off():
            return run(ids)

    prompts = [row.ids.tolist()[:20] for row in first_rows(training.data, 3)]
    return record_probes(off, run, training.base.tokenizer, prompts, training.plan.train.seed)


def _changes(training: Training) -> Iterator[Change]:
    """Every site's change by this run, for the norms; a form without a weight change says so."""
    handle, model, parents = training.handle, training.base.model, training.pieces.parents
    for name, placed in handle.placed.items():
        for q in placed if name not in parents else ():
            site = q.state.site
            weight = getattr(module_at(model, site.name), site.parameter, None) if site.name else None
            base = weight.detach() if isinstance(weight, Tensor) else None
            change: Any = q.form.dense if isinstance(q.form.dense, No) else q.form.delta(q.state)
            if isinstance(change, No) or "weight" not in change:
                reason = change.reason if isinstance(change, No) else "changes no weight"
                yield Change(f"{name}:{site.name}", site.role, site.layer, None, None, reason)
            else:
                yield Change(f"{name}:{site.name}", site.role, site.layer, change["weight"].detach() * q.scale, base)
    for name, table in handle.edits.items():
        for key, edit in table.items() if name not in parents else ():
            site = training.pieces.sites[key]
            yield Change(
                f"{name}:{key}",
                site.role,
                site.layer,
                edit.parameter.detach().float() - edit.original.float(),
                edit.original,
            )


def _report(training: Training, delta: Delta, found: Audit, folder: Path, parameters: int) -> dict[str, Any]:
    base, state, record = training.base, training.loop.progress, training.record
    own = [q for q in delta.pieces if q.name not in training.pieces.parents]
    moved = sum(q.count() for q in own)
    progress = plain(state)
    proof: dict[str, Any] = {
        "fingerprints": {k: delta.base.get(k) for k in ("fingerprint", "tokenizer", "template")}
        | {"data": training.data.fingerprint},
        "known_answers": record["known_answers"],
        "rehearsal": record.get("rehearsal"),
        "precision": record["precision"],
        "seals": {"ok": bool(delta.seals), "sites": len(delta.seals)},
    }
    if "resume_certificate" in record:
        proof["resume_certificate"] = record["resume_certificate"]
    if delta.probes:
        verdict = check_probes(delta.probes, logits_of(base.model))
        proof["probes"] = {"ok": verdict.ok, "reason": verdict.reason, "gap": verdict.gap}
    return {
        "plan": training.plan.model_dump(mode="json", by_alias=True),
        "base": {"name": base.name, "fingerprint": base.fingerprint, "parameters": parameters},
        "delta": {
            "pieces": [
                {"name": q.name, "form": type(q.form).__name__, "sites": len(q.sites), "parameters": q.count()}
                for q in own
            ],
            "moved": moved,
            "share": moved / parameters,
            "bytes": (folder / "delta.safetensors").stat().st_size,
        },
        "ledger": training.data.ledger.to_dict() | _held_out(training),
        "curve": progress["curve"],
        "evals": progress["evals"],
        "audit": found.to_dict(),
        "norms": [n.to_dict() for n in norms(_changes(training))],
        "cost": {
            "tokens": state.tokens,
            "supervised_tokens": state.supervised,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
            "peak_memory_bytes": record["peak_memory"],
            "parameters_moved": moved,
            "bytes_on_disk": folder_bytes(folder),
            "steps": state.step,
            "skipped_steps": state.skipped,
            "processes": record["world"],
            "audit_seconds": found.seconds,
        },
        "proof": proof,
        "versions": versions(),
        "warnings": [*base.notes, *(f"{k} ({n} records)" for k, n in training.data.ledger.notes.items())],
    }


def _held_out(training: Training) -> dict[str, Any]:
    ledger = training.data.eval_ledger
    return {"held_out": ledger.to_dict()} if ledger else {}


def _tokenizer_files(training: Training) -> dict[str, bytes]:
    """The tokenizer travels with the delta where the plan added tokens to it."""
    if not training.plan.base.new_tokens:
        return {}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        training.base.tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
