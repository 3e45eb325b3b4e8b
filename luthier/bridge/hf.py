"""Plain Hugging Face checkpoints of a tuned model: folded, written, and read back before they count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.attach import Attached, FoldReport
from luthier.bases.load import quiet
from luthier.bridge.folding import MAX_LOST, add_biases, folded, remove_biases, retie, tied_sites, untie
from luthier.bridge.proof import Check, other_type, refuse, seals_hold
from luthier.bridge.target import Target, logits_of, target
from luthier.delta.artefact import Delta
from luthier.delta.folder import new_folder, refuse_existing
from luthier.delta.probes import ModelFn, check_probes, probe_inputs
from luthier.delta.seals import seals_of
from luthier.errors import LuthierError


def export_hf(
    base: Any,
    delta: Delta | Attached,
    folder: str | os.PathLike[str],
    max_shard_size: str = "5GB",
    *,
    max_lost: float = MAX_LOST,
    read_back: bool = True,
) -> list[Check]:
    """Writes the tuned model as a checkpoint that plain transformers loads: weights, config, generation config, tokenizer
    and card. Gives what was checked.

    base: a model, what load_base gives, or a name. delta: a Delta, or the handle of one that is attached already. The base
    is afterwards as it was. The folder must be new or empty, and appears whole or not at all. read_back: load the written
    folder with transformers and compare its logits. max_lost: share of a change that rounding may swallow.
    """
    folder = refuse_existing(folder)
    on = target(base)
    handle = delta if isinstance(delta, Attached) else delta.apply(on.model)
    own = delta if isinstance(delta, Delta) else handle.delta(on.items)
    checks: list[Check] = []
    undo, switched = [], []
    try:
        rows = _rows(on)
        tuned = [logits_of(on.model)(row) for row in rows]
        other = other_type(own, on) if own.probes else None
        if other is not None:
            other = _told_now(other, own)
            checks.append(seals_hold(own, seals_of(handle), next(on.model.parameters()).dtype))
        tied = tied_sites(on, [own])
        undo = untie(on, [own])
        if tied:
            checks.append(
                Check("tied", None, f"{', '.join(tied)} changes alone: config says tie_word_embeddings: false")
            )
        switched = add_biases(on, handle)
        if switched:
            checks.append(Check("biases", None, f"the change needs biases: config says {', '.join(switched)}: true"))
        report = folded(handle, max_lost)
        checks.append(_rounding(report))
        try:
            _write(on, own, folder, max_shard_size, checks, tuned, rows if read_back else [], other)
        finally:
            handle.unfold()
    finally:
        remove_biases(on, switched)
        retie(on, undo)
        if isinstance(delta, Delta):
            delta.detach(on.model)
    return checks


def _rows(on: Target) -> list[Tensor]:
    words = on.tokenizer if on.tokenizer is not None else on.model.get_input_embeddings().weight.shape[0]
    return [torch.tensor([row]) for row in probe_inputs(words)]


def _rounding(report: FoldReport) -> Check:
    where = f", most at {report.worst}" if report.lost else ""
    return Check("rounding", True, f"{len(report.written)} parameters written, at most {report.lost:.1%} lost{where}")


def _write(
    on: Target,
    delta: Delta,
    folder: Path,
    max_shard_size: str,
    checks: list[Check],
    tuned: list[Tensor],
    rows: list[Tensor],
    other: ModelFn | None,
) -> None:
    with new_folder(folder) as new:
        with quiet():
            on.model.save_pretrained(new, max_shard_size=max_shard_size)
        if on.tokenizer is not None:
            on.tokenizer.save_pretrained(new)
        (new / "README.md").write_text(_card(delta, on, checks), encoding="utf-8")
        if rows:
            model = reload(on, new)
            checks.append(_read_back(on, model, tuned, rows))
            if delta.probes:
                checks.append(_probes(on, model, delta, other))
            del model
            refuse(checks, str(folder))


def reload(on: Target, folder: Path) -> Any:
    """The written model by plain transformers; keys that do not fit are an error."""
    cls = type(on.model)
    with quiet():
        model, info = cls.from_pretrained(folder, dtype=next(on.model.parameters()).dtype, output_loading_info=True)
    bad = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if bad:
        raise LuthierError(f"{folder}: the written checkpoint does not load whole ({bad[0]}): keep the delta instead")
    return model.eval().to(next(on.model.parameters()).device)


def _read_back(on: Target, model: Any, tuned: list[Tensor], rows: list[Tensor]) -> Check:
    """The folder's logits against the folded and the attached delta's: between them lies the rounding of the stored type,
    and of the fold."""
    run, plain = logits_of(model), logits_of(on.model)
    written = max(float((run(r) - plain(r)).abs().max()) for r in rows)
    scale = max(float(t.abs().max()) for t in tuned)
    apart = max(float((run(r) - t).abs().max()) for r, t in zip(rows, tuned, strict=True))
    eps = torch.finfo(next(on.model.parameters()).dtype).eps
    ok = written <= 64 * eps * max(scale, 1.0) and apart <= min(1024 * eps, 0.5) * max(scale, 1.0)
    detail = f"logits read back within {written:.1e} of the folded and {apart:.1e} of the unfolded model"
    return Check(
        "read back", ok, detail if ok else detail + ": the checkpoint is not this model; keep the delta instead"
    )


def _told_now(base: ModelFn, delta: Delta) -> ModelFn:
    """The base's answers to the delta's probes as they are now, before anything is folded into it."""
    rows = delta.probes["tokens"].long().split(delta.probes["lengths"].tolist())
    known = {tuple(row.tolist()): base(row[None]) for row in rows}
    return lambda ids: known[tuple(ids[0].tolist())]


def _probes(on: Target, model: Any, delta: Delta, other: ModelFn | None) -> Check:
    """The delta's own probes on the written model; where they cannot tell between two types, its seals have told."""
    verdict = check_probes(delta.probes, logits_of(model), base_fn=other)
    narrow = next(on.model.parameters()).dtype not in (torch.float32, torch.float64)
    remedy = "export with dtype: float32" if narrow else "the checkpoint is not this model; keep the delta instead"
    return Check("probes", verdict.ok, verdict.reason + (f": {remedy}" if verdict.ok is False else ""))


def _card(delta: Delta, on: Target, checks: list[Check]) -> str:
    notes = "\n".join(f"- {c.name}: {c.detail}" for c in checks)
    return (
        f"---\nlibrary_name: transformers\nbase_model: {on.name}\n---\n\n# {on.name}, tuned\n\n"
        f"A delta of {delta.count():,} numbers folded into `{on.name}` (fingerprint "
        f"`{delta.base.get('fingerprint') or on.card()['fingerprint']}`) by luthier.\n\n{notes}\n"
    )
