"""merge: models, or deltas on one base, to one of their kind; by a plan, a mergekit file, or names and a method."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.algebra.driver import Job, by_layer, measure, run, told
from luthier.algebra.jobs import Method, make_jobs, replaced
from luthier.algebra.layout import Layout, lay_out
from luthier.algebra.outcome import config_of, same_tokens, template_of, write_beside
from luthier.algebra.sources import ADAPTER, Source, Tuned, is_delta, open_source
from luthier.algebra.writer import ShardedFile, Spec, bytes_of
from luthier.delta.folder import new_folder, refuse_existing
from luthier.errors import LuthierError
from luthier.plan.merge import MergePlan, Ref, load_merge
from luthier.plan.places import kind_of

Shown = Callable[[int, int], None]


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
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the merge says of each layer, as Model Stock of its t: name -> layer -> mean over its tensors."""


def merge(
    plan: MergePlan | Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    sync: bool = False,
    progress: Shown = lambda done, of: None,
) -> Merged:
    """Merges and writes the folder `out`, which must be new or empty; nothing is left of a merge that fails.

    plan: a YAML file or its content; mergekit's files are read as they are. What is written is a checkpoint, or a delta
    where every model is a delta on the same base (`output` says otherwise). overrides: 'density=0.5'. sync: return only
    when the disk holds the weights. Memory is that of one tensor of every model, whatever their size; a delta's probes need
    its base whole, and are left out with a note where it does not fit. progress: called with (tensors done, of).
    Errors: LuthierError for models that do not fit each other, NaN in one of them, parameters that the method lacks …
    """
    began = time.perf_counter()
    read = load_merge(plan, overrides)
    refuse_existing(out, [place for ref in read.refs() for place in (ref.path, ref.lora)])
    method = Method(read.method)
    if method.cls.searches and not read.evaluate:
        raise LuthierError(
            f"{read.method} tries merges and measures them: state what counts (evaluate: {{target: […]}})"
        )
    if not read.field_file and read.base is None and _all_deltas(read):
        read = read.model_copy(
            update={"base": Ref.model_validate(_base_of([Path(m.model.path) for m in read.models or []]))}
        )
    if method.cls.units:
        return _by_units(read, Path(out), began, sync, progress)
    if _as_delta(read):
        return _deltas(read, method, Path(out), began, progress)
    if method.cls.factors:
        raise LuthierError(
            f"{read.method} merges the factors of LoRA deltas: name delta folders, or take another method"
        )
    with _opened(read) as sources:
        return _checkpoint(read, method, sources, Path(out), began, sync, progress)


@contextmanager
def _opened(plan: MergePlan) -> Iterator[list[Source]]:
    """The models of a plan, in the order of its refs()."""
    base = str(plan.base.path) if plan.base is not None and not is_delta(plan.base.path) else None
    rows: list[Source] = []
    try:
        for ref in plan.refs():
            rows.append(open_source(ref.path, ref.lora, base if ref != plan.base else None, ref.revision))
        yield rows
    finally:
        for source in rows:
            source.close()


def _all_deltas(plan: MergePlan) -> bool:
    models = plan.models or []
    return bool(models) and all(m.model.lora is None and is_delta(m.model.path) for m in models)


def _as_delta(plan: MergePlan) -> bool:
    deltas = _all_deltas(plan)
    if plan.output == "delta" and not deltas:
        raise LuthierError(
            "output: delta needs delta folders as models: 'luthier diff BASE MODEL' makes one of a checkpoint"
        )
    if plan.rank is not None and (not deltas or plan.output == "checkpoint"):
        raise LuthierError("rank trims a merge of low-rank deltas to a delta: leave it out here")
    as_delta = plan.output != "checkpoint" and deltas and not plan.field_file
    for key in ("tokenizer", "chat_template", "shard"):
        if as_delta and key in plan.model_fields_set and getattr(plan, key) is not None:
            raise LuthierError(
                f"{key} is a checkpoint's, and deltas are merged to a delta: leave it out, or state output=checkpoint"
            )
    return as_delta


# -- to a checkpoint


def _checkpoint(
    plan: MergePlan, method: Method, sources: list[Source], out: Path, began: float, sync: bool, progress: Shown
) -> Merged:
    _alike(sources)
    bytes_of(plan.shard)
    layout = lay_out(plan, sources, plan.field_file or method.cls.base != "unused")
    tokens = _tokens(plan, sources)
    if tokens is None:
        same_tokens(sources)
    if plan.chat_template:
        template_of(plan.chat_template, sources)  # an error before anything is read
    jobs, notes = make_jobs(plan, layout, sources, method, tokens)
    notes = layout.notes + notes
    each: dict[str, list[float]] = {}
    if method.cls.searches:
        each = _searched(
            plan, method, jobs, lambda tried: _tried(plan, sources, layout, tokens, replaced(jobs, tried), out)
        )
        jobs = replaced(jobs, each)
    layers = _write(plan, sources, layout, tokens, jobs, notes, out, sync, progress, each)
    numbers = sum(j.size for j in jobs)
    return Merged(out, "checkpoint", plan.method, len(jobs), numbers, time.perf_counter() - began, notes, each, layers)


def _write(
    plan: MergePlan,
    sources: list[Source],
    layout: Layout,
    tokens: Any,
    jobs: Sequence[Job],
    notes: list[str],
    out: Path,
    sync: bool,
    progress: Shown = lambda done, of: None,
    each: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict[str, float]]:
    with new_folder(out, sync) as new:
        file = ShardedFile(new, [Spec(j.item.name, j.written, j.shape) for j in jobs], bytes_of(plan.shard), sync)
        by_name = {j.item.name: j for j in jobs}
        ordered = [by_name[name] for name in file.order]
        said: dict[str, dict[str, float]] = {}
        try:
            looked = measure(ordered, sources, seed=plan.seed)
            run(ordered, sources, file.write, seed=plan.seed, measured=looked, progress=progress, notes=said)
            file.close()
        finally:
            file.abandon()
        notes += told(said)
        config = config_of(plan, sources, layout, _common(jobs), None if tokens is None else tokens.vocab_size)
        layers = by_layer(said, jobs)
        write_beside(new, plan, sources, config, tokens, notes, each, layers)
    return layers


def _by_units(plan: MergePlan, out: Path, began: float, sync: bool, progress: Shown) -> Merged:
    """Of two whole models, whose base (of deltas) is no model to be merged."""
    from luthier.algebra.whole import write_units

    if plan.output == "delta" or plan.rank is not None:
        raise LuthierError(f"{plan.method} gives a checkpoint of units of its own: leave output and rank out")
    with _opened(plan) as sources, new_folder(out, sync) as new:
        refs = [m.model for m in plan.models or []]
        two = [s for ref, s in zip(plan.refs(), sources, strict=True) if ref in refs]
        _alike(two)
        tensors, numbers, notes = write_units(plan, two, new, bytes_of(plan.shard), sync, progress)
    return Merged(out, "checkpoint", plan.method, tensors, numbers, time.perf_counter() - began, notes)


def _alike(sources: Sequence[Source]) -> None:
    """Models of one architecture."""
    first = sources[0]
    for source in sources[1:]:
        ours, theirs = first.config.get("model_type"), source.config.get("model_type")
        if ours != theirs:
            raise LuthierError(
                f"{first.name} is of type {ours}, {source.name} of type {theirs}: merge models of one architecture"
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
    sizes = [int(s.text_config.get("vocab_size") or 0) for s in sources]
    folders = [s.folder for s in sources]
    return reconcile(source, folders, 0 if plan.base is not None else None, tokens, spec.pad_to_multiple_of, sizes)


def _common(jobs: Sequence[Job]) -> Any:
    """The type most numbers are written in."""
    sizes: dict[Any, int] = {}
    for job in jobs:
        if job.written.is_floating_point:
            sizes[job.written] = sizes.get(job.written, 0) + job.size
    return max(sizes, key=lambda k: sizes[k])


# -- to a delta


def _deltas(plan: MergePlan, method: Method, out: Path, began: float, progress: Shown) -> Merged:
    from luthier.algebra.delta_merge import DeltaMerge
    from luthier.algebra.maker import streamed
    from luthier.verbs.load import TEMPLATE, load_base_for
    from luthier.verbs.probes import add_probes

    named = str(plan.base)
    if plan.base is not None and is_delta(plan.base.path):
        raise LuthierError(
            f"base {named} is a delta, and deltas are merged on the checkpoint they were tuned from: name that "
            f"(--base {_base_of([Path(plan.base.path)])}), or have the tuned models merged (output=checkpoint)"
        )
    with _opened(plan) as sources:
        _alike(sources)
        by_ref = dict(zip(plan.refs(), sources, strict=True))
        deltas = [s.delta() for m in plan.models or [] if isinstance(s := by_ref[m.model], Tuned)]
        on = load_base_for(named, deltas, {}, None, weights=method.cls.searches)
        ready = DeltaMerge(plan, method, sources, deltas, on)
        each: dict[str, list[float]] = {}
        if method.cls.searches:
            spec = _spec(plan)
            each = _searched(
                plan,
                method,
                ready.jobs,
                lambda tried: _attached_score(ready.make(tried, empty=True), on, spec, plan, deltas),
            )
        with streamed(out, ready.names()) as stream:
            delta = ready.make(each or None, progress, stream=stream)
            on.fingerprint = delta.base["fingerprint"]
            delta.base = on.card() | {k: v for k, v in delta.base.items() if v}
            delta.files = {k: v for k, v in deltas[0].files.items() if k == TEMPLATE}
            delta.lineage |= {
                "parents": [m.model.path for m in plan.models or []],
                "merge": plan.model_dump(mode="json", exclude_defaults=True),
            }
            delta.lineage |= {k: v for k, v in (("found", each), ("layers", ready.layers)) if v}
            delta.save(out, numbers=stream.close())
    numbers = sum(p.numel() for p in on.model.parameters())
    if len({d.base.get("template") for d in deltas if d.base.get("template")}) > 1:
        ready.notes.append("the deltas were tuned with different chat templates: the first one's is kept")
    notes = ready.notes + ready.said + add_probes(out, on if method.cls.searches else named, numbers)[1]
    tensors = sum(len(p.sites) for p in delta.pieces)
    return Merged(
        out, "delta", plan.method, tensors, delta.count(), time.perf_counter() - began, notes, each, ready.layers
    )


def _base_of(folders: Sequence[Path]) -> str:
    """The one base that the deltas name; different ones are an error that gives their fingerprints."""
    from luthier.bases.fingerprint import compare
    from luthier.bases.locate import read_json
    from luthier.delta.header import read_header

    named: list[tuple[Path, str, str | None]] = []
    for folder in (f.expanduser() for f in folders):
        if kind_of(folder) == "delta":
            card = read_header(folder)["base"]
            named.append((folder, str(card.get("name") or ""), card.get("fingerprint")))
        else:
            named.append((folder, str(read_json(folder / ADAPTER).get("base_model_name_or_path") or ""), None))
    marked = [row for row in named if row[2]]
    for folder, name, mark in marked[1:]:
        first = marked[0]
        if compare(str(first[2]), str(mark)) == "different":
            raise LuthierError(
                f"{first[0]} and {folder} were made on different bases ({first[2]}, {first[1]}; {mark}, {name}): "
                "'luthier port' one to the other's base"
            )
    found = next((name for _, name, _ in named if name), None)
    if found is None:
        raise LuthierError(f"{folders[0]} names no base: state it (base)")
    return found


# -- searches


def _searched(
    plan: MergePlan, method: Method, jobs: Sequence[Job], score: Callable[[Mapping[str, Sequence[float]]], float]
) -> dict[str, list[float]]:
    """The settings that the method's search finds."""
    first = next(j for j in jobs if j.merge is not None)
    assert first.merge is not None
    models = len(next(iter(first.each.values()), plan.models or []))
    found = first.merge.search(models, score)
    return {k: [float(v) for v in values] for k, values in found.items()}


def _spec(plan: MergePlan) -> Any:
    from pydantic import ValidationError

    from luthier.plan.schema import AuditSpec

    try:
        spec = AuditSpec.model_validate({"drift_tokens": 0, "samples": 0, **(plan.evaluate or {})})
    except ValidationError as e:
        row = e.errors()[0]
        raise LuthierError(f"evaluate: {'.'.join(map(str, row['loc']))}: {row['msg']}") from e
    if not spec.target:
        raise LuthierError("evaluate names nothing to measure: state evaluate.target")
    return spec


def _score(found: Any) -> float:
    """Mean of the targets, higher is better. Raises LuthierError where some are shares and others losses."""
    shares = {c.unit == "share" for c in found.target}
    if len(shares) > 1:
        raise LuthierError("evaluate.target: some are scored by the share right, others by a loss: state one kind")
    values = [c.after.value if c.better == "higher" else -c.after.value for c in found.target]
    return sum(values) / len(values)


def _attached_score(delta: Any, on: Any, spec: Any, plan: MergePlan, deltas: Sequence[Any]) -> float:
    from luthier.measuring.audit import audit
    from luthier.plan.schema import DataSpec

    stated = next((d.lineage["plan"]["data"] for d in deltas if (d.lineage.get("plan") or {}).get("data")), None)
    data = DataSpec.model_validate(stated) if stated else None
    handle = delta.apply(on.model)
    try:
        return _score(audit(on, handle, spec, data=data, seed=plan.seed))
    finally:
        delta.detach(on.model)


class _Alone:
    """A model without deltas, where a switch is asked for."""

    def off(self) -> Any:
        return nullcontext()


def _tried(
    plan: MergePlan, sources: list[Source], layout: Layout, tokens: Any, jobs: Sequence[Job], out: Path
) -> float:
    """The score of a merged checkpoint that is written for a moment."""
    from luthier.bases.load import load_base
    from luthier.measuring.audit import audit

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
        folder = Path(place) / "tried"
        _write(plan, sources, layout, tokens, jobs, [], folder, False)
        return _score(audit(load_base(str(folder)), _Alone(), _spec(plan), seed=plan.seed))
