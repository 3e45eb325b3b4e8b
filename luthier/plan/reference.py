"""The plan's reference, made from its types: `python -m luthier.plan.reference` writes docs/plan.md."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from luthier.plan import schema
from luthier.plan.problems import SYNONYMS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
SECTIONS = {
    "The plan": schema.Plan,
    "base": schema.BaseSpec,
    "data": schema.DataSpec,
    "data.train, data.eval, …source": schema.SourceSpec,
    "delta": schema.DeltaSpec,
    "objective": schema.ObjectiveSpec,
    "train": schema.TrainSpec,
    "checkpoint": schema.CheckpointSpec,
    "audit": schema.AuditSpec,
    "audit.target, audit.guards, audit.shifted": schema.CheckSpec,
    "gate": schema.GateSpec,
    "rebase": schema.RebaseSpec,
}
INTRODUCTION = """\
# The plan

A plan is a YAML file that says everything about a run. This page is made from its types by
`python -m luthier.plan.reference`; do not edit it.

```yaml
base: practice                                   # a hub name, a folder, or the built-in base
data: {train: {path: records.jsonl}, max_length: 512}
delta: [{form: lora, rank: 16}]
train: {epochs: 2, lr: 2e-4}
audit: {target: ["practice:translate"], guards: ["practice:facts"]}
```

* **Short forms.** `base: NAME` is `base: {name: NAME}`; `data: FILE` is `data: {train: [{path: FILE}]}`; a source is a
  path or a table; `delta: lora` is `delta: [{form: lora}]`; a check of the audit is a source, read from its test split.
* **Overrides.** Any value can be set on the command line: `luthier tune plan.yaml train.lr=1e-4 delta.0.rank=8`. Where a
  list has one entry its index may be left out: `delta.rank=8`. Values are YAML: `'data.train=[a.jsonl, b.jsonl]'`.
* **Environment.** `${NAME}` and `${NAME:-default}` in any text are replaced from the environment.
* **Mistakes.** An unknown key, method or setting is an error that names the nearest valid one; so is a key given twice.
* **Paths** are relative to the folder the command is started in.
* **Before running:** `luthier tune plan.yaml --dry-run` prints the plan with every default, what will move, and the
  memory and time it will take, without reading weights.
"""


def reference() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_sections(), *_methods(), *_synonyms()])


def _sections() -> Iterator[str]:
    for title, model in SECTIONS.items():
        yield f"## {title if title[0].isupper() else f'`{title}`'}\n"
        yield f"{_first_line(model)}\n"
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        for name, info in model.model_fields.items():
            yield f"| `{info.alias or name}` | {_type(info.annotation)} | {_default(info)} | {_cell(info.description or '')} |"
        yield ""


def _methods() -> Iterator[str]:
    from luthier.delta import CHOICES, FORMS, OBJECTIVES

    for registry, title, key in (
        (FORMS, "Forms", "delta: [{form: …}]"),
        (CHOICES, "Choices", "delta: [{choice: …}]"),
        (OBJECTIVES, "Objectives", "objective: {name: …}"),
    ):
        yield f"## {title}: `{key}`\n"
        yield f"Settings stand beside the name. {title} are found by name: a new file in `{registry.package.replace('.', '/')}/` appears here.\n"
        yield f"| {registry.what} | settings and defaults | what it is |\n|---|---|---|"
        for name in registry:
            yield f"| `{name}` | {_settings(registry[name])} | {_cell(_first_line(registry[name]))} |"
        yield ""


def _synonyms() -> Iterator[str]:
    yield "## What other tools call it\n"
    yield "These keys are not accepted; the error names ours.\n"
    yield "| elsewhere | here |\n|---|---|"
    ours: dict[str, list[str]] = {}
    for theirs, key in SYNONYMS.items():
        ours.setdefault(key, []).append(theirs)
    for key, theirs in sorted(ours.items()):
        yield f"| {', '.join(f'`{t}`' for t in theirs)} | `{key}` |"
    yield ""


def _settings(method: Any) -> str:
    if not dataclasses.is_dataclass(method):
        return ""
    hints = get_type_hints(method)
    rows = []
    for f in dataclasses.fields(method):
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        shown = f"{f.name} ({_type(hints[f.name])})" if needed else f"{f.name}: {_value(default)}"
        rows.append(f"`{shown}`")
    return ", ".join(rows).replace("|", "\\|")


def _type(annotation: Any) -> str:
    origin, inside = get_origin(annotation), [a for a in get_args(annotation) if a is not type(None)]
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in inside)
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is tuple:
        return f"{len(inside)} × {_type(inside[0])}"
    if origin is dict:
        return f"table of {_type(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(annotation, "anything")


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "**needed**"
    return "its defaults" if isinstance(info.default, BaseModel) else f"`{_value(info.default)}`"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(v) for v in value)}]"
    return "{}" if value == {} else str(value)


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Writes docs/plan.md; with --check only says (exit code 1) when it is not current."""
    page = reference()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
