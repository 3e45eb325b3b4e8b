"""port: a delta onto another base, without training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.algebra.connectivity import connectivity
from luthier.algebra.port import Carried, carry, finite, fits, same_words
from luthier.attach import attached
from luthier.bases.fingerprint import fingerprint_template
from luthier.bases.load import load_base
from luthier.bridge.peft import from_peft
from luthier.bridge.proof import prove, refuse, same_base
from luthier.bridge.target import Target, target
from luthier.delta import MOVES
from luthier.delta.artefact import Delta, made_of
from luthier.delta.folder import refuse_existing
from luthier.errors import LuthierError, nearest
from luthier.moving.engine import Transport
from luthier.plan.moving import ConnectivitySpec, PortSpec, load_moving
from luthier.plan.places import kind_of
from luthier.plan.schema import BaseSpec
from luthier.verbs.load import TEMPLATE, load_base_for


@dataclass(frozen=True)
class Ported:
    """The delta on its new base, and what is the same there. `out` is None where nothing was written."""

    delta: Delta
    out: Path | None
    pieces: list[Carried]
    connectivity: dict[str, Any] | None = None
    """Losses between the bases, the barrier and the verdict; None where they were not measured."""
    notes: list[str] = field(default_factory=list)

    @property
    def report(self) -> dict[str, Any]:
        """Plain values: pieces, connectivity and notes."""
        return {"pieces": [asdict(p) for p in self.pieces], "connectivity": self.connectivity, "notes": self.notes}


def port(
    delta: Delta | str | os.PathLike[str] | Mapping[str, Any],
    onto: Any = None,
    *,
    method: str | None = None,
    out: str | os.PathLike[str] | None = None,
    base: Any = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Ported:
    """Carries a delta onto the base `onto`, by a move of luthier/moving/ (default portllm); writes it to `out`.

    delta: a Delta, a delta or PEFT folder, or a plan (YAML file or mapping: see plan.moving.PortSpec), which may state all
    else. onto, base: names, folders, BaseSpecs or what load_base gives; base is the old one, by default as the delta names
    it. onto may be a delta folder: the model that it makes is then written to OUT/base, as the new base. settings: of the
    move (scale, keep), and connectivity (true, false or its section).
    Errors: another architecture, size or vocabulary; a piece that cannot be carried; an `out` that is not empty.
    """
    own, spec = _spec(delta, onto, method, base, settings, overrides)
    move = MOVES.make(spec.method, spec.settings)
    if not isinstance(move, Transport):
        raise LuthierError(
            f"method '{spec.method}' steers while a model writes, and moves no weights: use luthier assemble"
        )
    read = [spec.delta, spec.onto.name, spec.base.name if spec.base is not None else None]
    place = None if out is None else refuse_existing(out, read)
    written = None
    if isinstance(onto, Target) or (onto is not None and not isinstance(onto, (str, os.PathLike, BaseSpec, Mapping))):
        given = target(onto)
    else:
        given = None
        if kind_of(spec.onto.name) == "delta":
            written = _made(spec.onto.name, place)
            spec = spec.model_copy(update={"onto": BaseSpec.model_validate({"name": str(written)})})
    try:
        return _port(own, spec, move, given, base, place, progress)
    except BaseException:
        if written is not None:
            _remove(written)
        raise


def _port(
    own: Delta | None,
    spec: PortSpec,
    move: Transport,
    given: Target | None,
    base: Any,
    place: Path | None,
    progress: Callable[[str], None],
) -> Ported:
    old = _Old(spec, own, base)
    if own is None:
        own = old.adapter(spec.delta)
    old.delta = own
    finite(own)
    if given is None and not own.base.get("new_tokens"):  # what does not fit is told before weights are read
        fits(own, load_base_for(_resolved(spec.onto), [_wordless(own)], {}, None, weights=False), old.light())
    progress("loading the new base")
    new = given or load_base_for(_resolved(spec.onto), [_wordless(own)], {}, None)
    if given is None and Path(spec.onto.name).is_dir():
        new.name = str(Path(spec.onto.name).resolve())
    notes = []
    fits(own, new, old.light())
    if note := same_words(own, new, old.words):
        notes.append(note)
    progress("carrying the delta")
    pieces, told = carry(own, move, new, old.whole)
    found = _connectivity(spec, move, old, new, progress)
    made = Delta(pieces, {k: v for k, v in own.base.items() if k in ("kind", "labels", "seed") and v})
    made.files = dict(own.files)
    made.lineage = _lineage(own, spec, told, found, new)
    prove(made, new, full=True)
    _template(made, own, new, old, notes)
    if place is not None:
        made.save(place)
    return Ported(made, place, told, found, notes)


class _Old:
    """The base that the delta was made on, loaded when and as far as it is needed."""

    def __init__(self, spec: PortSpec, delta: Delta | None, stated: Any) -> None:
        self.spec, self.delta = spec, delta
        loaded = stated is not None and not isinstance(stated, (str, os.PathLike, BaseSpec, Mapping))
        self.held: Target | None = target(stated) if loaded else None
        self._light: Target | None = None

    @property
    def base(self) -> BaseSpec | None:
        """The old base's spec: stated, or as the delta names it."""
        if self.spec.base is not None:
            return self.spec.base
        name = self.delta.base.get("name") if self.delta else None
        kind = (self.delta.base.get("kind") if self.delta else None) or "causal"
        return BaseSpec.model_validate({"name": name, "kind": kind}) if name else None

    def light(self) -> Target | None:
        """Names, sizes and tokenizer, without weights; None where the old base cannot be had and was not stated."""
        if self.held is not None:
            return self.held
        if self._light is None and self.base is not None:
            try:
                self._light = target(load_base(self.base, weights=False))
            except LuthierError:
                if self.spec.base is not None:
                    raise
        return self._light

    def words(self) -> Target:
        """The old base with its tokenizer."""
        if (found := self.light()) is None:
            raise LuthierError("the tokenizer of the new base is not the one the delta was made with, and the old base is "
                               "not at hand to compare them: state base:")  # fmt: skip
        return found

    def whole(self) -> Target:
        """With its weights, and proven to be the delta's."""
        if self.held is None:
            if self.base is None:
                raise LuthierError("the delta depends on its old base's values and names no base: state base:")
            self.held = load_base_for(self.base, [self.delta] if self.delta else [], {}, None)
        if self.delta is not None and self.delta.base.get("fingerprint"):
            checks = [c for c in same_base(self.delta, self.held) if c.name in ("base", "dtype")]
            refuse(checks, self.spec.delta or "the delta")
        return self.held

    def adapter(self, folder: str) -> Delta:
        """A PEFT folder as a delta."""
        from luthier.bridge.peft_config import named_base

        if self.held is None and self.spec.base is None:
            self.spec = self.spec.model_copy(update={"base": BaseSpec.model_validate({"name": named_base(folder)})})
        on = self.whole()
        return prove(from_peft(folder, on), on)


def _spec(
    delta: Any, onto: Any, method: str | None, base: Any, settings: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[Delta | None, PortSpec]:
    """The plan with everything stated beside it, and the delta where it is at hand already."""
    stated: dict[str, Any] = dict(settings)
    for key, value in (("onto", onto), ("base", base)):
        if isinstance(value, (str, os.PathLike)):
            stated[key] = os.fspath(value)
        elif isinstance(value, (BaseSpec, Mapping)):
            stated[key] = value
        elif value is not None and key == "onto":
            stated[key] = getattr(value, "name", "a model")
    if method is not None:
        stated["method"] = method
    if isinstance(delta, Delta):
        return delta, load_moving(PortSpec, {"delta": "", **stated}, overrides)
    if isinstance(delta, Mapping):
        spec = load_moving(PortSpec, {**delta, **stated}, overrides)
    elif Path(delta).is_file():
        from luthier.plan.load import read_plan

        spec = load_moving(PortSpec, {**read_plan(delta)[1], **stated}, overrides)
    else:
        spec = load_moving(PortSpec, {"delta": os.fspath(delta), **stated}, overrides)
    folder = Path(spec.delta)
    if kind_of(folder) == "adapter":
        return None, spec
    if not folder.exists():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise LuthierError(f"no delta at {folder}: {nearest(folder.name, near, 'folder')}")
    return Delta.load(folder), spec


def _resolved(spec: BaseSpec) -> BaseSpec:
    """A folder by its full path, so that the delta finds its base from everywhere."""
    return spec.model_copy(update={"name": str(Path(spec.name).resolve())}) if Path(spec.name).is_dir() else spec


def _wordless(delta: Delta) -> Delta:
    """The delta's card as far as loading its new base goes: kind, labels and new tokens, and no template."""
    return Delta([], {k: v for k, v in delta.base.items() if k in ("kind", "labels", "new_tokens", "seed")})


def _made(folder: str, out: Path | None) -> Path:
    """The model that a delta makes of its base, as a checkpoint at OUT/base."""
    if out is None:
        raise LuthierError(f"{folder} is a delta: the model it makes is written beside the result, so state out")
    from luthier.verbs.export import export

    return export(folder, to="hf", out=out / "base")


def _remove(written: Path) -> None:
    import shutil

    shutil.rmtree(written, ignore_errors=True)
    try:
        written.parent.rmdir()  # only where nothing else is in it
    except OSError:
        return


def _connectivity(
    spec: PortSpec, move: Transport, old: _Old, new: Target, progress: Callable[[str], None]
) -> dict[str, Any] | None:
    stated = spec.connectivity
    if stated is False or (stated is None and not move.connectivity):
        return None
    progress("measuring the loss between the bases")
    section = stated if isinstance(stated, ConnectivitySpec) else ConnectivitySpec.model_validate({})
    with attached(new.model).off():
        return connectivity(old.whole(), new, section).to_dict()


def _lineage(
    own: Delta, spec: PortSpec, told: list[Carried], found: dict[str, Any] | None, new: Target
) -> dict[str, Any]:
    """Where it comes from: the old base and delta, the move, what was preserved; the plan goes along, on the new base."""
    plan = own.lineage.get("plan")
    if plan:
        plan = {**plan, "base": {**plan.get("base", {}), "name": new.name, "revision": None, "deltas": []}}
    return {
        "plan": plan,
        **made_of([own], f"port {spec.method}"),
        **({"parents": [spec.delta]} if spec.delta else {}),
        "ported_from": {k: own.base.get(k) for k in ("name", "fingerprint")},
        "move": {"name": spec.method, "settings": spec.settings},
        "preserved": [asdict(t) for t in told],
        "connectivity": found,
    }


def _template(made: Delta, own: Delta, new: Target, old: _Old, notes: list[str]) -> None:
    """The chat template that the delta was trained with goes along where the new base has another."""
    told = own.base.get("template")
    if new.tokenizer is None or not told or told == fingerprint_template(new.tokenizer):
        made.files.pop(TEMPLATE, None)
        return
    text = own.files.get(TEMPLATE)
    if text is None:
        words = old.light()
        template = getattr(words.tokenizer, "chat_template", None) if words is not None else None
        if not isinstance(template, str) or fingerprint_template(template) != told:
            notes.append("the new base has another chat template than the delta was trained with")
            return
        text = template.encode()
    made.files[TEMPLATE], made.base["template"] = text, told
    notes.append("the chat template that the delta was trained with goes along: the new base has another")
