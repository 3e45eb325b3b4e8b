"""From a YAML file, a dict or a plan, and overrides, to a checked plan; every mistake is one line naming the key."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from luthier.errors import LuthierError
from luthier.plan.problems import first_problem, unknown_key
from luthier.plan.schema import DeltaSpec, Plan
from luthier.plan.yaml import expand, read_yaml

if TYPE_CHECKING:
    from luthier.delta import Registry

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def load_plan(
    source: str | os.PathLike[str] | Mapping[str, Any] | Plan, overrides: Sequence[str] = (), *, methods: bool = True
) -> Plan:
    """The checked plan.

    source: a YAML file, its content as a dict, or a plan. overrides: 'train.lr=1e-4', 'delta.0.rank=8', and without
    the index where a list has one entry; values are YAML. methods: also check the names and settings of forms,
    choices, objective and optimiser (this imports torch). Texts may hold ${NAME:-default} from the environment.
    Errors: LuthierError naming the file, the key and what was meant.
    """
    where, raw = _raw(source)
    raw = expand(raw, "")
    for text in overrides:
        override(raw, text)
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as e:
        raise LuthierError(f"{where}: {first_problem(e, raw)}") from e
    if not plan.data.train:
        raise LuthierError(f"{where}: data.train: is empty: name a file, folder, hub dataset or practice:FAMILY")
    _check_names(plan, where)
    if methods:
        _check_methods(plan, where)
    return plan


def dump_plan(plan: Plan) -> str:
    """The plan as YAML with every default filled in; `load_plan` of it is the same plan."""
    import yaml

    return yaml.safe_dump(
        plan.model_dump(mode="json", by_alias=True),
        sort_keys=False,
        allow_unicode=True,
        width=110,
        default_flow_style=None,
    )


def _raw(source: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Plan):
        return "plan", source.model_dump(mode="json", by_alias=True)
    if isinstance(source, Mapping):
        return "plan", copy.deepcopy(dict(source))
    return read_plan(source)


def read_plan(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """(how errors name it, the table that it holds) of a YAML file; nothing in the table is checked yet."""
    where = os.fspath(path)
    text = _text(Path(where))
    raw = read_yaml(text, where)
    if raw is None:
        raise LuthierError(f"{where}: the plan is empty: state its sections, such as data and delta")
    if not isinstance(raw, dict):
        raise LuthierError(
            f"{where}: a plan is a table of sections (key: value lines), got {type(raw).__name__}: see docs/plan.md"
        )
    return where, raw


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        near = get_close_matches(path.name, [p.name for p in _neighbours(path)], 1, 0.5)
        hint = (
            f"did you mean {path.parent / near[0]}?"
            if near
            else "give the path of a YAML plan, such as examples/quick.yaml"
        )
        raise LuthierError(f"{path}: there is no such plan: {hint}") from e
    except IsADirectoryError as e:
        raise LuthierError(f"{path}: is a folder: give the YAML file of the plan") from e
    except UnicodeDecodeError as e:
        raise LuthierError(f"{path}: not UTF-8 at byte {e.start}: save the plan as UTF-8 text") from e
    except OSError as e:
        raise LuthierError(f"{path}: cannot be read ({e.strerror}): check its permissions") from e


def _neighbours(path: Path) -> list[Path]:
    return [p for s in ("*.yaml", "*.yml") for p in path.parent.glob(s)] if path.parent.is_dir() else []


def override(raw: dict[str, Any], stated: str, run: bool = True) -> None:
    """Writes one 'a.b=value' into a raw plan; `run` for a run's plan, whose short forms are then written out."""
    path, equals, text = stated.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise LuthierError(f"override '{stated}': write it as key=value, such as train.lr=1e-4")
    if not text.strip():
        raise LuthierError(f"override '{stated}': there is no value: give one, or null for none")
    value = expand(read_yaml(text, f"override '{stated}'"), path)
    if run:
        _open(raw)
    here: Any = raw
    for i, key in enumerate(keys):
        place = ".".join(keys[:i])
        if isinstance(here, list) and not key.isdigit():
            if len(here) != 1:
                raise LuthierError(f"override '{stated}': {place} has {len(here)} entries: say which, as in {place}.0")
            here = here[0]
        if isinstance(here, list):
            slot: Any = int(key)
            if slot >= len(here):
                raise LuthierError(f"override '{stated}': {place} has {len(here)} entries, counted from 0")
        elif isinstance(here, dict):
            slot = key
        else:
            raise LuthierError(f"override '{stated}': {place} is a value, not a section: write {place}=…")
        if i == len(keys) - 1:
            here[slot] = value
        else:
            if isinstance(here, dict) and here.get(slot) is None:  # a section that was left out, or stated as null
                here[slot] = {}
            here = here[slot]


def _open(raw: dict[str, Any]) -> None:
    """Writes out the short forms, so that an override can reach inside them."""
    for key, name in (("base", "name"), ("data", "train"), ("objective", "name")):
        if isinstance(raw.get(key), str):
            raw[key] = {name: raw[key]}
    _open_list(raw, "delta", lambda text: {"form": text})
    data, audit = raw.get("data"), raw.get("audit")
    for key in ("train", "eval"):
        if isinstance(data, dict):
            _open_list(data, key, lambda text: {"path": text})
    for key in ("target", "guards", "shifted"):
        if isinstance(audit, dict) and isinstance(audit.get(key), list):
            _open_list(audit, key, lambda text: {"source": {"path": text, "split": "test"}})


def _open_list(section: dict[str, Any], key: str, opened: Callable[[str], dict[str, Any]]) -> None:
    value = section.get(key)
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        section[key] = [opened(v) if isinstance(v, str) else v for v in value]


# -- names and settings of methods


def _check_names(plan: Plan, where: str) -> None:
    """Names of pieces are parts of tensor names in the saved delta, where '/' divides, and some are the run's own."""
    names = [spec.name or spec.form or spec.choice for spec in plan.delta]
    for i, spec in enumerate(plan.delta):
        key, name = f"{where}: delta.{i}.name", spec.name
        if name is None:
            continue
        if not NAME.fullmatch(name):
            raise LuthierError(
                f"{key}: '{name}' must be letters, digits, '-' and '_', beginning with a letter or digit"
            )
        if name == "new" or name.startswith("parent"):
            raise LuthierError(
                f"{key}: '{name}' is kept for new tokens ('new') and earlier deltas ('parent…'): choose another"
            )
        if name in names[:i]:
            raise LuthierError(f"{key}: '{name}' is taken by another delta: name this one otherwise")


def _check_methods(plan: Plan, where: str) -> None:
    """Every method named exists and accepts its settings."""
    from luthier.delta import CHOICES, FORMS, OBJECTIVES, OPTIMISERS

    for i, spec in enumerate(plan.delta):
        registry, name = (FORMS, spec.form) if spec.form is not None else (CHOICES, spec.choice)
        _make(
            registry,
            str(name),
            spec.settings,
            f"{where}: delta.{i}",
            [a.alias or n for n, a in DeltaSpec.model_fields.items()],
        )
    _make(OBJECTIVES, plan.objective.name, plan.objective.settings, f"{where}: objective", ["name"])
    _named(OPTIMISERS, plan.train.optimiser, f"{where}: train.optimiser")


def _named(registry: Registry, name: str, where: str) -> Any:
    try:
        return registry[name]
    except LuthierError as e:
        raise LuthierError(f"{where}: {e}") from e


def _make(registry: Registry, name: str, settings: Mapping[str, Any], where: str, ours: Sequence[str]) -> None:
    method = _named(registry, name, where)
    if dataclasses.is_dataclass(method):
        known = [f.name for f in dataclasses.fields(method)]
        for key in settings:
            if key not in known:
                file, _, path = where.rpartition(": ")
                raise LuthierError(
                    f"{file}: {_setting(path, key, known, ours)} ({registry.what} '{name}' has the settings: {', '.join(known) or 'none'})"
                )
    try:
        registry.make(name, settings)
    except LuthierError as e:
        raise LuthierError(f"{where}: {e}") from e


def _setting(path: str, key: str, known: Sequence[str], ours: Sequence[str]) -> str:
    """An unknown setting of a method: a misspelt one of its own, of ours, or another tool's."""
    line = unknown_key(path, key, [*known, *ours])
    return (
        line
        if "did you mean" in line or "is called" in line or "command line" in line
        else f"{path}.{key}: unknown key"
    )
