"""merge: models, or deltas on one base, to one of their kind; by a plan, a mergekit file, or names and a method."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.algebra.driver import Job, measure, run
from luthier.algebra.jobs import Method, make_jobs, replaced
from luthier.algebra.layout import lay_out
from luthier.algebra.outcome import config_of, same_tokens, template_of, write_beside
from luthier.algebra.sources import Source, Tuned, is_delta, open_source
from luthier.algebra.writer import ShardedFile, Spec, new_folder, refuse_existing
from luthier.errors import LuthierError
from luthier.plan.merge import MergePlan, load_merge

UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Merged:
    """What was written."""

    out: Path
    kind: str
    """checkpoint or delta."""
    method: str
    tensors: int
    numbers: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    each: dict[str, list[float]] = field(default_factory=dict)
    """What a search found for the models."""


def merge(
    plan: MergePlan | Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    sync: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Merged:
    """Merges and writes the folder `out`, which must be new or empty; nothing is left of a merge that fails.

    plan: a YAML file or its content; mergekit's files are read as they are. What is written is a checkpoint, or a delta
    where every model is a delta on the same base (`output` says otherwise). overrides: 'density=0.5'. sync: wait until
    the disk holds the weights. Peak memory is that of one tensor of every model, whatever their size.
    Errors: LuthierError for models that do not fit each other, NaN in one of them, parameters that the method lacks …
    """
    began = time.perf_counter()
    read = load_merge(plan, overrides)
    refuse_existing(out)
    method = Method(read.method)
    if _as_delta(read):
        from luthier.verbs.merge_deltas import merge_deltas

        return merge_deltas(read, method, Path(out), began, progress)
    sources = open_all(read)
    try:
        return _checkpoint(read, method, sources, Path(out), began, sync, progress)
    finally:
        for source in sources:
            source.close()


def open_all(plan: MergePlan) -> list[Source]:
    """The models of a plan, in the order of its refs()."""
    base = str(plan.base.path) if plan.base is not None else None
    rows = []
    for ref in plan.refs():
        own = base if base is not None and ref != plan.base and not is_delta(base) else None
        rows.append(open_source(ref.path, ref.lora, own, ref.revision))
    return rows


def _as_delta(plan: MergePlan) -> bool:
    models = plan.models or []
    deltas = bool(models) and all(m.model.lora is None and is_delta(m.model.path) for m in models)
    if plan.output == "delta" and not deltas:
        raise LuthierError(
            "output: delta needs delta folders as models: 'luthier diff BASE MODEL' makes one of a checkpoint"
        )
    return plan.output != "checkpoint" and deltas and not plan.field_file


def _checkpoint(
    plan: MergePlan,
    method: Method,
    sources: list[Source],
    out: Path,
    began: float,
    sync: bool,
    progress: Callable[[int, int], None],
) -> Merged:
    _alike(sources)
    layout = lay_out(plan, sources, plan.field_file or method.cls.base != "unused")
    tokens = _tokens(plan, sources)
    if tokens is None:
        same_tokens(sources)
    if plan.chat_template:
        template_of(plan.chat_template, sources)  # an error before anything is read
    jobs, notes = make_jobs(plan, layout, sources, method, tokens)
    each: dict[str, list[float]] = {}
    if method.cls.searches:
        from luthier.verbs.merge_search import search

        each = search(plan, method, jobs, sources, layout)
        jobs = replaced(jobs, each)
    with new_folder(out, sync) as new:
        config = config_of(plan, sources, layout, _common(jobs), None if tokens is None else tokens.vocab_size)
        write_beside(new, plan, sources, config, tokens, notes)
        file = ShardedFile(new, [Spec(j.item.name, j.written, j.shape) for j in jobs], bytes_of(plan.shard), sync)
        by_name = {j.item.name: j for j in jobs}
        ordered = [by_name[name] for name in file.order]
        try:
            run(ordered, sources, file.write, seed=plan.seed, measured=measure(ordered, sources), progress=progress)
            file.close()
        finally:
            file.abandon()
    numbers = sum(j.size for j in jobs)
    return Merged(out, "checkpoint", plan.method, len(jobs), numbers, time.perf_counter() - began, notes, each)


def _alike(sources: Sequence[Source]) -> None:
    """Models of one architecture, deltas of one base."""
    first = sources[0]
    for source in sources[1:]:
        ours, theirs = first.config.get("model_type"), source.config.get("model_type")
        if ours != theirs:
            raise LuthierError(
                f"{first.name} is of type {ours}, {source.name} of type {theirs}: merge models of one architecture"
            )
    tuned = [s for s in sources if isinstance(s, Tuned) and s.card.get("fingerprint")]
    for source in tuned[1:]:
        from luthier.bases.fingerprint import compare

        a, b = tuned[0].card["fingerprint"], source.card["fingerprint"]
        if compare(a, b) == "different":
            raise LuthierError(
                f"{tuned[0].name} and {source.name} were made on different bases ({a}, {tuned[0].card.get('name')}; {b}, "
                f"{source.card.get('name')}): 'luthier port' one to the other's base"
            )


def _tokens(plan: MergePlan, sources: Sequence[Source]) -> Any:
    if plan.tokenizer is None:
        return None
    from luthier.algebra.tokenizers import reconcile

    refs = [str(r) for r in plan.refs()]

    def place(value: Any) -> Any:
        """A model in a token's source, by its place."""
        if isinstance(value, Mapping):
            return {k: place(v) if k in ("model", "source") else v for k, v in value.items()}
        if isinstance(value, str):
            if value not in refs:
                raise LuthierError(f"tokenizer.tokens: {value} is none of the models: name one of {', '.join(refs)}")
            return refs.index(value)
        return value

    spec = plan.tokenizer
    tokens = {
        token: {"source": place(row.source), "force": row.force} if row.source is not None else {"force": row.force}
        for token, row in (spec.tokens or {}).items()
    }
    source: Any = spec.source
    if not isinstance(source, str):
        name = str(source)
        source = (
            sources[refs.index(name)].folder
            if name in refs
            else open_source(source.path, None, None, source.revision).folder
        )
    return reconcile(
        source,
        [s.folder for s in sources],
        0 if plan.base is not None else None,
        tokens,
        spec.pad_to_multiple_of,
        [int(s.text_config.get("vocab_size") or 0) for s in sources],
    )


def _common(jobs: Sequence[Job]) -> Any:
    """The type most numbers are written in."""
    sizes: dict[Any, int] = {}
    for job in jobs:
        if job.written.is_floating_point:
            sizes[job.written] = sizes.get(job.written, 0) + job.size
    return max(sizes, key=lambda k: sizes[k])


def bytes_of(text: str) -> int:
    """'5GB' -> bytes."""
    digits = text.strip().upper()
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if digits.endswith(u)), "")
    try:
        return max(1, int(float(digits.removesuffix(unit)) * UNITS.get(unit, 1)))
    except ValueError as e:
        raise LuthierError(f"shard: '{text}' is no size: write it as 5GB or 500MB") from e
