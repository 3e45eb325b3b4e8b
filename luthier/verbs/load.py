"""load: a base with deltas on it, as an ordinary transformers model, and proof that they are there."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.attach import Attached, attached
from luthier.bases.fingerprint import fingerprint_template
from luthier.bases.load import load_base
from luthier.bridge.folding import MAX_LOST, folded, retie, untie
from luthier.bridge.peft import from_peft
from luthier.bridge.peft_words import head_of, words_beyond
from luthier.bridge.proof import holds, probes_hold, prove, refuse, same_base
from luthier.bridge.target import Target, target
from luthier.delta.artefact import Delta, read_header
from luthier.delta.wiring import is_assembly
from luthier.errors import LuthierError, nearest
from luthier.plan.places import kind_of
from luthier.plan.problems import first_problem
from luthier.plan.schema import BaseSpec

TEMPLATE = "chat_template.jinja"
"""File of a delta that was trained with a chat template other than its tokenizer's."""


def load(
    base: Any = "practice",
    deltas: str | os.PathLike[str] | Delta | Iterable[str | os.PathLike[str] | Delta] = (),
    *,
    fold: bool = False,
    check: bool = True,
    max_lost: float = MAX_LOST,
    device: str | None = None,
    **fields: Any,
) -> Any:
    """The transformers model of a base with deltas attached; `generate` works, `attached(model)` is the handle.

    base: name, folder, BaseSpec, what load_base gives, a model, or alone the folder of an assembly. deltas: delta folders, PEFT folders, Delta objects.
    fold: write the changes into the weights. check: run fingerprints, counts, seals and probes; one that fails is a
    LuthierError. max_lost: with fold, the share of a change that rounding may swallow. fields: of BaseSpec (dtype …).
    """
    model, _ = load_all(base, deltas, fold=fold, check=check, max_lost=max_lost, device=device, **fields)
    return model


def load_all(
    base: Any,
    deltas: Any = (),
    *,
    fold: bool = False,
    check: bool = True,
    max_lost: float = MAX_LOST,
    device: str | None = None,
    **fields: Any,
) -> tuple[Any, Target]:
    """As `load`, and the base with its tokenizer and roles."""
    if is_assembly(base):
        return _assembly(base, deltas, fold, check, device, fields)
    given = [deltas] if isinstance(deltas, (str, os.PathLike, Delta)) else list(deltas)
    folders = [Path(d).resolve() for d in given if not isinstance(d, Delta)]
    if twice := next((d for d in folders if folders.count(d) > 1), None):
        raise LuthierError(f"the delta {twice} is given twice: leave one of them out")
    own = [d if isinstance(d, Delta) else _read(d) for d in given]
    named = isinstance(base, (str, os.PathLike, BaseSpec))
    adapters = [Path(path) for d, path in zip(own, given, strict=True) if d is None and named]  # pyright: ignore[reportArgumentType]
    if adapters and not isinstance(base, BaseSpec) and not fields.keys() & {"kind", "labels"}:
        fields = {**head_of(adapters[0], base), **fields}
    on = load_base_for(base, [d for d in own if d is not None], fields, device)
    if not on.new_rows and (words := list(dict.fromkeys(w for path in adapters for w in words_beyond(path, on)))):
        on = load_base_for(base, [d for d in own if d is not None], {**fields, "new_tokens": words}, device)
    ready = [d if d is not None else prove(from_peft(path, on), on) for d, path in zip(own, given, strict=True)]
    names = ["the delta" if isinstance(d, Delta) else str(d) for d in given]
    _lineage(ready, names)
    if check:
        for delta, name in zip(ready, names, strict=True):
            refuse(list(same_base(delta, on)), name)
    for i, (delta, name) in enumerate(zip(ready, names, strict=True)):
        if check and len(ready) > 1:  # alone first: its probes were taken without the others
            handle = delta.apply(on.model)
            _checked(delta, handle, on, name)
            delta.detach(on.model)
        if i:
            _rename(delta, ready[:i])
    for delta, name in zip(ready, names, strict=True):
        handle = delta.apply(on.model)
        if check and len(ready) == 1:
            _checked(delta, handle, on, name)
    if fold and ready:
        _fold(on, ready, names[0] if check and len(ready) == 1 else "", max_lost)
    return on.model, on


def _fold(on: Target, ready: Sequence[Delta], checked: str, max_lost: float) -> None:
    """Folds all that is attached; where that fails, the model is without the deltas and tied as it was. checked: the name
    of the one delta whose probes must hold afterwards."""
    handle, undo = attached(on.model), untie(on, ready)
    try:
        folded(handle, max_lost)
        if checked:
            refuse([probes_hold(ready[0], on)], checked)
    except BaseException:
        handle.unfold()
        retie(on, undo)
        for delta in reversed(ready):
            delta.detach(on.model)
        raise


def _assembly(base: Any, deltas: Any, fold: bool, check: bool, device: str | None, fields: Any) -> tuple[Any, Target]:
    """An assembly's folder: it names its bases and carries its deltas."""
    from luthier.verbs.assemble import load_assembly

    if deltas or fold or fields:
        raise LuthierError(
            f"{base} is an assembly, which has its own bases and deltas and no weights to fold into: load it alone"
        )
    model, on, _ = load_assembly(base, check=check, device=device)
    return model, on


def _checked(delta: Delta, handle: Attached, on: Target, name: str) -> None:
    try:
        refuse(list(holds(delta, handle, on)), name)
    except LuthierError:
        delta.detach(on.model)
        raise


def _read(path: str | os.PathLike[str]) -> Delta | None:
    """A delta folder; None for a PEFT folder, which needs the base to be read."""
    if kind_of(path) == "adapter":
        return None
    if not Path(path).exists():
        raise LuthierError(f"no delta at {path}: give a delta folder or a PEFT adapter folder")
    read_header(path)
    return Delta.load(path)


def load_base_for(
    base: Any, deltas: Sequence[Delta], fields: dict[str, Any], device: str | None, *, weights: bool = True
) -> Target:
    """Loads the base as the deltas found it: with their new tokens, labels and seed where none are stated.

    weights: False gives names, sizes and tokenizer alone.
    """
    if isinstance(base, (str, os.PathLike, BaseSpec)):
        spec = base if isinstance(base, BaseSpec) else None
        for key in fields:
            if key not in BaseSpec.model_fields:
                raise LuthierError(f"load has no setting '{key}': {nearest(key, BaseSpec.model_fields, 'setting')}")
        stated = spec.model_dump(exclude_defaults=True) if spec else {"name": os.fspath(base)}  # pyright: ignore
        cards = [d.base for d in deltas]
        for key in ("kind", "labels", "new_tokens"):
            values = [c[key] for c in cards if c.get(key)]
            if key == "kind" and len(kinds := dict.fromkeys(values)) > 1:
                raise LuthierError(f"the deltas are for bases of different kinds ({', '.join(kinds)}): load them apart")
            if values and key not in stated and key not in fields:
                stated[key] = max(values, key=len) if key == "new_tokens" else values[0]
        seed = next((c["seed"] for c in cards if c.get("seed") is not None), 0)
        try:
            wanted = BaseSpec.model_validate(stated | fields)
        except ValidationError as e:
            raise LuthierError(f"base: {first_problem(e, stated | fields)}") from e
        return _spoken(target(load_base(wanted, weights=weights, device=device, seed=seed)), deltas)
    if fields or device:
        raise LuthierError(
            f"{', '.join([*fields, *(['device'] if device else [])])} can be stated with a base's name only"
        )
    return _spoken(target(base), deltas)


def _spoken(on: Target, deltas: Sequence[Delta]) -> Target:
    """The chat template that the deltas were trained with and carry goes onto the base's tokenizer."""
    for delta in deltas:
        own = delta.files.get(TEMPLATE, b"").decode()
        if on.tokenizer is not None and own and fingerprint_template(own) == delta.base.get("template"):
            if own != on.tokenizer.chat_template:
                on.tokenizer = copy.deepcopy(on.tokenizer)  # the caller's own keeps its template
                on.tokenizer.chat_template = own
    return on


def _rename(delta: Delta, before: Sequence[Delta]) -> None:
    """Gives pieces names of their own on the model; their seals follow."""
    taken = {piece.name for d in before for piece in d.pieces}
    for piece in delta.pieces:
        name, k = piece.name, 2
        while piece.name in taken:
            piece.name, k = f"{name}-{k}", k + 1
        if piece.name != name:
            delta.seals = {
                f"{piece.name}/{key.partition('/')[2]}" if key.partition("/")[0] == name else key: seal
                for key, seal in delta.seals.items()
            }


def _lineage(deltas: Sequence[Delta], names: Sequence[str]) -> None:
    """A delta trained on top of others holds them, or needs them; never both and never neither."""
    here = {str(Path(n).resolve()) for n in names}
    for delta, name in zip(deltas, names, strict=True):
        stacked = [p for p in delta.lineage.get("parents") or [] if p and delta.lineage.get("made_by") is None]
        held = any(piece.name.startswith("parent") for piece in delta.pieces)
        given = [p for p in stacked if str(Path(p).resolve()) in here]
        if held and given:
            raise LuthierError(f"{name} holds {given[0]} already, which it was trained on: leave that one out")
        if missing := [p for p in stacked if p not in given]:
            if not held:
                raise LuthierError(f"{name} was trained on top of {missing[0]}: name that delta before it")
