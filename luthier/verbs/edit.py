"""edit: facts changed or text forgotten by the methods of luthier/editing, scored on the records' own terms."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from luthier.algebra.edit_pieces import numbers, pieces
from luthier.algebra.edit_records import Record, Task, Writer, read_records, request
from luthier.algebra.general_text import GeneralText
from luthier.algebra.scorecard import Scorecard, scorecard
from luthier.algebra.subject import ModelSubject
from luthier.attach import attached
from luthier.attach.weights import oriented
from luthier.bases.fingerprint import base_tensors
from luthier.bases.hardware import peak_memory
from luthier.bridge.proof import prove, refuse, same_base
from luthier.bridge.target import Target
from luthier.delta import EDITS
from luthier.delta.artefact import Delta
from luthier.delta.folder import refuse_existing
from luthier.editing.engine import Edit
from luthier.errors import LuthierError, nearest
from luthier.plan.load import override, read_plan
from luthier.plan.schema import BaseSpec, SourceSpec
from luthier.practice.edits import TASKS
from luthier.practice.edits import records as practice_records
from luthier.training.certificate import versions
from luthier.verbs.load import load_base_for

EDITOR = "editor.safetensors"
"""File of a delta that holds what its method learnt (MEND's networks)."""
Source = str | dict[str, Any] | list[dict[str, Any]]


class EditPlan(BaseModel):
    """What `edit` takes; every other key is a setting of the method."""

    model_config = ConfigDict(extra="allow")

    method: str = Field(..., description="Edit by name: rome, memit, mend, canonical, locft, rose-lora, antidote …")
    base: str | BaseSpec = Field("practice", description="The model: name, folder, or a base section.")
    deltas: list[str] = Field([], description="Delta folders to put on the base first, in this order.")
    records: Source = Field(
        ..., description="What to edit or forget: file, source, list, practice:edits, practice:forget."
    )
    train_records: Source | None = Field(None, description="Other records that a method learns from first (mend).")
    editor: str | None = Field(None, description="Delta folder whose learnt editor is used instead.")
    text: str | dict[str, Any] | None = Field(None, description="General text; default the base's own generations.")
    moment_tokens: int = Field(20_000, ge=100, description="Tokens of general text for the second moments.")
    template: Literal["auto", "none"] = Field(
        "auto", description="Prompts through the chat template where there is one."
    )
    anchors: dict[str, str] = Field({}, description="To forget: terms of the text -> what to call them in general.")
    score: bool | Source = Field(False, description="Measure the edit, on these records where they are named.")
    general_tokens: int = Field(2_000, ge=50, description="Held-out tokens for the general loss.")
    resamples: int = Field(1000, ge=100, description="Bootstrap draws for the intervals.")
    seed: int = Field(0, ge=0, description="Of draws and generations.")


@dataclass
class Edited:
    """What an edit gave: the delta, where it lies, its scorecard where one was asked for, and what it cost."""

    delta: Delta
    out: Path
    scorecard: Scorecard | None = None
    cost: dict[str, float] = field(default_factory=dict)
    """seconds, learn_seconds, score_seconds, numbers, bytes, peak_memory_bytes (of the process; a GPU's where one is used)."""

    @property
    def report(self) -> dict[str, Any]:
        """Plain values."""
        return {"scorecard": self.scorecard.to_dict() if self.scorecard else None, "cost": self.cost}


def edit(
    plan: Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Edited:
    """Edits a base and writes the delta to `out`; the base is untouched until the delta is applied.

    plan: keys of EditPlan, and the method's settings beside them; overrides: 'key=value'. Deltas that lie below are held
    in the result ('parent0-…'), or, where the edit takes their weights away or they move the base's own parameters, are
    worked into it exactly. Errors: LuthierError in one line; nothing is written then.
    """
    spec, method = understood(plan, overrides)
    folder = refuse_existing(out, [*spec.deltas, spec.base if isinstance(spec.base, str) else spec.base.name])
    records = _records(spec.records, method.task)
    parents = [_parent(path) for path in spec.deltas]
    for piece, name in [(p, f"parent{k}-{p.name}") for k, d in enumerate(parents) for p in d.pieces]:
        piece.name = name
    on = load_base_for(spec.base, parents, {}, None)
    for delta, path in zip(parents, spec.deltas, strict=True):
        _fits(delta, on, path)
    cut = any(p.form.at == "base" for d in parents for p in d.pieces) or method.folds
    kept = {n: t.detach().clone() for n, t in base_tensors(on.model)} if cut and parents else None
    cost: dict[str, float] = {}
    writer = Writer(on, spec.template)
    text = GeneralText(on, _source(spec.text) if spec.text is not None else None, spec.seed)
    with _with(on, parents):
        if cut and parents:
            attached(on.model).fold()
        try:
            made, learnt = _made(spec, method, on, writer, text, records, parents, kept, cost, progress)
            held = [] if cut else [p for d in parents for p in d.pieces]
        finally:
            if cut and parents:
                attached(on.model).unfold()
    delta = Delta([*held, *made], lineage=_lineage(spec, method, cut))
    if learnt:
        delta.files[EDITOR] = save_bytes(learnt)
    prove(delta, on, [r.prompt or r.target for r in records[:3]], spec.seed)
    cost |= {"numbers": numbers(made), "bytes": delta.nbytes(), "peak_memory_bytes": peak_memory(on.model.device)}
    result = Edited(delta, folder, None, cost)
    if spec.score is not False:
        result.scorecard = _scored(spec, on, parents, delta, method.task, records, writer, text, cost, progress)
        delta.audit = {"scorecard": result.scorecard.to_dict()}
    delta.save(folder)
    return result


def score(
    base: Any,
    delta: str | os.PathLike[str] | Delta,
    records: Source,
    *,
    task: Task = "edit",
    text: str | dict[str, Any] | None = None,
    template: Literal["auto", "none"] = "auto",
    general_tokens: int = 2_000,
    resamples: int = 1000,
    seed: int = 0,
) -> Scorecard:
    """The scorecard of a finished delta, whatever made it, on records of the edit format (or, task 'forget', of that)."""
    own = delta if isinstance(delta, Delta) else Delta.load(delta)
    asked = _records(records, task)
    on = load_base_for(base, [own], {}, None)
    refuse([c for c in same_base(own, on) if c.name in ("base", "dtype", "tokenizer")], "the delta")
    general = GeneralText(on, _source(text) if text is not None else None, seed).held_out(general_tokens)
    settings = {"resamples": resamples, "seed": seed}
    return scorecard(
        on.model, nullcontext, lambda: _with(on, [own]), asked, Writer(on, template), task, general, **settings
    )


def understood(
    plan: Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[EditPlan, Edit]:
    """The checked plan and its method. Errors: LuthierError naming the key and what was meant."""
    where, raw = ("edit", dict(plan)) if isinstance(plan, Mapping) else read_plan(plan)
    for stated in overrides:
        override(raw, stated)
    if "method" not in raw:
        raise LuthierError(f"{where}: states no method: {', '.join(EDITS)}")
    try:
        spec = EditPlan.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        raise LuthierError(
            f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
        ) from e
    cls, settings = EDITS[spec.method], spec.model_extra or {}
    known = {f.name for f in dataclasses.fields(cls) if f.name != "learnt"}
    for stated in settings:
        if stated not in known:
            names = known | set(EditPlan.model_fields)
            raise LuthierError(
                f"{where}: edit '{spec.method}' has no setting '{stated}': {nearest(stated, names, 'setting')}"
            )
    return spec, EDITS.make(spec.method, settings)


def _source(stated: str | dict[str, Any]) -> SourceSpec:
    try:
        return SourceSpec.model_validate({"path": stated} if isinstance(stated, str) else stated)
    except ValidationError as e:
        first = e.errors()[0]
        raise LuthierError(f"source {stated!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e


def _records(stated: Source, task: Task) -> list[Record]:
    """Records of a file, a list, or the practice world ('practice:edits', 'practice:forget')."""
    if isinstance(stated, list):
        return read_records(stated, task)
    source = _source(stated)
    name = source.path.removeprefix("practice:")
    if source.path.startswith("practice:") and name in TASKS:
        split = "test" if isinstance(stated, str) or "split" not in stated else source.split
        drawn = practice_records(name, split, source.limit or 8, source.skip)
        return [dataclasses.replace(r, where=f"{source.path}{r.where[7:]}") for r in read_records(list(drawn), task)]
    return read_records(source, task)


def _parent(path: str) -> Delta:
    if not Path(path).exists():
        raise LuthierError(f"no delta at {path}: give a delta folder")
    return Delta.load(path)


def _fits(delta: Delta, on: Target, path: str) -> None:
    """Refuses a delta of another base."""
    refuse([c for c in same_base(delta, on) if c.name in ("base", "dtype", "tokenizer")], path)


@contextmanager
def _with(on: Target, deltas: Sequence[Delta]) -> Iterator[None]:
    """The model with these deltas on it, and without them afterwards."""
    done: list[Delta] = []
    try:
        for delta in deltas:
            delta.apply(on.model)
            done.append(delta)
        yield
    finally:
        for delta in reversed(done):
            delta.detach(on.model)


def _made(
    spec: EditPlan,
    method: Edit,
    on: Target,
    writer: Writer,
    text: GeneralText,
    records: Sequence[Record],
    parents: Sequence[Delta],
    base: Mapping[str, torch.Tensor] | None,
    cost: dict[str, float],
    progress: Callable[[str], None],
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The edit's pieces, and what it learnt on the way. base: the base's own values, where deltas are worked in."""
    marks = [on.card()["fingerprint"], *(str(sorted(d.seals.items())) for d in parents), text.mark(), writer.chat]
    mark = hashlib.sha256(repr(marks).encode()).hexdigest()
    subject = ModelSubject(on, text.working, seed=spec.seed, mark=mark, tokens=spec.moment_tokens)
    learnt: dict[str, torch.Tensor] = {}
    with subject.working():
        openings = text.openings(method.openings)
        wanted = [request(r, writer, openings, method.subjects, spec.anchors) for r in records]
        if method.learns:
            began = time.perf_counter()
            learnt = _learnt(spec, method, on, subject, writer, progress)
            method, cost["learn_seconds"] = method.with_learnt(learnt), time.perf_counter() - began
        progress(f"{spec.method}: {len(wanted)} records")
        began = time.perf_counter()
        changes = method.edit(subject, wanted)
        cost["seconds"] = time.perf_counter() - began
        if base is None:
            return pieces(spec.method, on, changes, {n: on.tensor(n) for n in changes}), learnt
        return pieces(spec.method, on, {**_moved(on, base, changes), **changes}, base), learnt


def _moved(on: Target, base: Mapping[str, torch.Tensor], changes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters that the folded deltas below changed, and the edit did not: [d_out, d_in] as they are now."""
    return {
        name: oriented(on.tensor(name), site).float()
        for name, site in on.items.items()
        if name not in changes and not torch.equal(on.tensor(name), base[name].to(on.tensor(name).dtype))
    }


def _learnt(
    spec: EditPlan, method: Edit, on: Target, subject: ModelSubject, writer: Writer, progress: Callable[[str], None]
) -> dict[str, torch.Tensor]:
    if spec.editor is not None:
        delta = _parent(spec.editor)
        if (held := delta.files.get(EDITOR)) is None:
            raise LuthierError(f"editor {spec.editor} holds no {EDITOR}: name a delta that {spec.method} made")
        _fits(delta, on, spec.editor)
        return load_bytes(held)
    if spec.train_records is None:
        raise LuthierError(
            f"{spec.method} learns first: state train_records (other records), or editor (a delta that holds one)"
        )
    teaching = _records(spec.train_records, method.task)
    progress(f"{spec.method}: learning on {len(teaching)} records")
    return method.learn(subject, [request(r, writer) for r in teaching])


def _scored(
    spec: EditPlan,
    on: Target,
    parents: Sequence[Delta],
    delta: Delta,
    task: Task,
    records: list[Record],
    writer: Writer,
    text: GeneralText,
    cost: dict[str, float],
    progress: Callable[[str], None],
) -> Scorecard:
    began = time.perf_counter()
    asked = records if spec.score is True else _records(spec.score, task)  # pyright: ignore[reportArgumentType]
    progress(f"scoring on {len(asked)} records")
    general = text.held_out(spec.general_tokens)
    before, after = (lambda: _with(on, parents)), (lambda: _with(on, [delta]))
    card = scorecard(on.model, before, after, asked, writer, task, general, resamples=spec.resamples, seed=spec.seed)
    cost["score_seconds"] = time.perf_counter() - began
    return card


def _lineage(spec: EditPlan, method: Edit, cut: bool) -> dict[str, Any]:
    """made_by where the deltas below are worked in; where they are held beside, as in a tune, they are its parents."""
    stated = spec.model_dump(mode="json", exclude_defaults=True)
    out: dict[str, Any] = {"edit": stated, "parents": list(spec.deltas), "versions": versions()}
    return out | ({"made_by": f"edit {spec.method}"} if cut else {})
