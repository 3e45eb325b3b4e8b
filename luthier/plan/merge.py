"""The plan of a merge: mergekit's files as they are, and a short form of our own; both become the same typed plan.

A short form is `{method: ties, models: [A, B], base: X, density: 0.5}`: what is no key of the plan is a parameter of the
method. A mergekit file has `merge_method` and states parameters under `parameters`; another key in it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from luthier.errors import LuthierError, nearest
from luthier.plan.calibration import Calibrated
from luthier.plan.load import override, read_plan
from luthier.plan.schema import Section
from luthier.plan.yaml import expand

Parameters = dict[str, Any]
"""Name -> a value, a list over the depth, {filter, value}, or a list of those."""
DType = Literal["float32", "float16", "bfloat16", "float64"]


def _whole(name: str) -> str:
    """A folder's full path; another name as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


class Ref(BaseModel, frozen=True, extra="forbid"):
    """A model by folder or hub name, with a delta or adapter on it where one is named: `base@revision+adapter`."""

    path: str
    revision: str | None = None
    lora: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            if not value or Path(value).expanduser().exists():
                return {"path": value}
            path, plus, lora = value.partition("+")
            name, at, revision = path.partition("@")
            if plus and ("+" in lora or not lora) or at and ("@" in revision or not revision):
                raise ValueError(f"'{value}' is no model: write NAME, NAME@REVISION or NAME+ADAPTER")
            return {"path": name, "revision": revision or None, "lora": lora or None}
        if isinstance(value, Mapping) and "model" in value:  # as mergekit writes out what a text cannot say
            inner, lora = value["model"], value.get("lora")
            known = {"model", "lora", "override_architecture"}
            if strange := sorted(set(value) - known):
                raise ValueError(f"unknown key '{strange[0]}': {nearest(strange[0], known, 'key')}")
            own = dict(inner) if isinstance(inner, Mapping) else {"path": inner}
            return own | {"lora": lora.get("path") if isinstance(lora, Mapping) else lora}
        return value

    @property
    def place(self) -> tuple[str, str | None, str | None]:
        """The same for all spellings of a folder: `a`, `./a` and `a/`."""
        return _whole(self.path), self.revision, self.lora and _whole(self.lora)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.path}{at}{f'+{self.lora}' if self.lora else ''}"


class Input(Section):
    """A model that is merged, with parameters of its own."""

    model: Ref = Field(..., description="Folder, hub name, delta folder, or NAME+ADAPTER.")
    parameters: Parameters = Field({}, description="Parameters of this model: weight, density …")

    @field_validator("parameters", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return {} if value is None else value


class SliceInput(Input):
    """Layers of a model."""

    layer_range: tuple[int, int] = Field(..., description="First layer and the one after the last.")


class Slice(Section):
    """Some consecutive layers of the result."""

    sources: list[SliceInput] = Field(..., min_length=1, description="What these layers are merged from.")
    base_model: Ref | None = Field(None, description="The base here; default the plan's.")
    residual_weight: float | None = Field(None, description="Accepted as mergekit does; without effect.")
    parameters: Parameters | None = Field(None, description="Parameters here, over the plan's.")


class Module(Section):
    """One part of a model of several (encoder and decoder, text and vision)."""

    slices: list[Slice] | None = Field(None, description="Its layers, piece by piece.")
    models: list[Input] | None = Field(None, description="Or whole models.")
    parameters: Parameters | None = Field(None, description="Parameters here, over the plan's.")

    @model_validator(mode="after")
    def _one(self) -> Module:
        if bool(self.slices) == bool(self.models):
            raise ValueError("state either slices or models")
        return self


class TokenSource(Section):
    """Where the embedding of a token comes from."""

    source: Any = Field(None, description="A model, {kind: zero}, or {kind: model_token, model, token | token_id}.")
    force: bool = Field(False, description="Also where a model has a row of its own for this token.")


class TokenizerSpec(Section):
    """Which tokens the result has, and whose rows they get."""

    source: str | Ref = Field("union", description="union, base, or a model whose tokenizer is taken.")
    tokens: dict[str, TokenSource] | None = Field(None, description="Tokens whose rows are stated.")
    pad_to_multiple_of: int | None = Field(None, ge=1, description="Round the rows of the embedding up.")

    @field_validator("source", mode="after")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return value if isinstance(value, Ref) or value in ("union", "base") else Ref.model_validate(value)


class MergePlan(Calibrated, Section):
    """Everything a merge is told."""

    method: str = Field(..., description="The merge: linear, ties, slerp … ('luthier merge --list').")
    models: list[Input] | None = Field(None, description="What is merged.")
    slices: list[Slice] | None = Field(None, description="Or layers of models, one stretch after the other.")
    modules: dict[str, Module] | None = Field(None, description="Or by part of the model.")
    base: Ref | None = Field(None, description="What the models were tuned from.")
    parameters: Parameters = Field({}, description="Parameters of the method, for all models and tensors.")
    dtype: DType | None = Field(None, description="Type of the arithmetic; default what the models are stored in.")
    out_dtype: DType | None = Field(None, description="Type that is written; default the arithmetic's.")
    tokenizer: TokenizerSpec | None = Field(None, description="Make the tokenizers one; default the base's as it is.")
    chat_template: str | None = Field(
        None, description="auto, chatml, llama3, mistral, alpaca, exaone, a Jinja text, or a file's path."
    )
    seed: int = Field(0, ge=0, description="For merges that draw.")
    output: Literal["auto", "checkpoint", "delta"] = Field(
        "auto", description="What is written; auto is a delta where every model is one on the same base."
    )
    rank: int | None = Field(None, ge=1, description="Trim a merge of low-rank deltas to this rank.")
    evaluate: dict[str, Any] | None = Field(None, description="An audit section, for merges that search.")
    shard: str = Field("5GB", description="Most bytes of one weight file.")
    field_file: bool = Field(False, description="Read from a mergekit file: its conventions hold.")

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> MergePlan:
        stated = [k for k in ("models", "slices", "modules") if getattr(self, k)]
        if len(stated) != 1:
            raise ValueError(f"state one of models, slices and modules; got {' and '.join(stated) or 'none'}")
        return self

    def refs(self) -> list[Ref]:
        """Every model named, the base first, each once."""
        found: dict[Ref, None] = {self.base: None} if self.base else {}
        for ref in self._inputs():
            found.setdefault(ref)
        return list(found)

    def _inputs(self) -> Iterator[Ref]:
        slices = list(self.slices or [])
        yield from (m.model for m in self.models or [])
        for module in (self.modules or {}).values():
            yield from (m.model for m in module.models or [])
            slices += module.slices or []
        for part in slices:
            yield from (s.model for s in part.sources)
            if part.base_model:
                yield part.base_model


RENAMED = {"merge_method": "method", "base_model": "base", "random_seed": "seed"}
MERGEKIT = {
    *{"merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"},
    *{"tokenizer_source", "tokenizer", "chat_template", "name", "random_seed"},
}
OURS = set(MergePlan.model_fields) - {"field_file"} | {"tokenizer_source", "weights"}


def load_merge(
    source: str | os.PathLike[str] | Mapping[str, Any] | MergePlan, overrides: Sequence[str] = ()
) -> MergePlan:
    """The checked plan of a YAML file or its content; overrides as for a run's plan ('density=0.5').

    Errors: LuthierError naming the file, the key and what was meant. Names and settings of methods are checked when
    the merge starts.
    """
    if isinstance(source, MergePlan):
        return source
    where, raw = ("merge", dict(source)) if isinstance(source, Mapping) else read_plan(source)
    raw = expand(raw, "")
    field_file = "merge_method" in raw
    for text in overrides:
        override(raw, text)
    if isinstance(raw.get("base"), dict) and set(raw["base"]) == {"name"}:  # as an override writes it out for a run
        raw["base"] = raw["base"]["name"]
    known = MERGEKIT | OURS - {"method", "base", "weights"} if field_file else OURS
    if "method" not in raw and not field_file:
        raise LuthierError(
            f"{where}: method is missing: state which merge it is (method: linear; 'luthier merge --list')"
        )
    extra = {k: raw.pop(k) for k in [*raw] if k not in known}
    if field_file and extra:
        key = next(iter(extra))
        raise LuthierError(f"{where}: {key}: unknown key: {nearest(key, known, 'key')}")
    raw.pop("name", None) if field_file else None
    for old, new in RENAMED.items():
        if old in raw:
            raw[new] = raw.pop(old)
    if not isinstance(raw.get("parameters") or {}, Mapping):
        raise LuthierError(f"{where}: parameters: give a table of names and values, got {raw['parameters']!r}")
    raw["parameters"] = {**(raw.get("parameters") or {}), **extra}
    _weights(raw, where)
    if (tokens := raw.pop("tokenizer_source", None)) is not None:
        if raw.get("tokenizer"):
            raise LuthierError(f"{where}: state tokenizer_source or tokenizer, not both")
        raw["tokenizer"] = {"source": tokens}
    if not field_file and isinstance(raw.get("models"), list):
        raw["models"] = [_opened(m) for m in raw["models"]]
    try:
        return MergePlan.model_validate(raw | {"field_file": field_file})
    except ValidationError as e:
        raise LuthierError(f"{where}: {_problem(e)}") from e


def _opened(entry: Any) -> Any:
    """Short forms of an entry of models: a name; {model: X, weight: 0.5}."""
    if isinstance(entry, (str, os.PathLike)):
        return {"model": os.fspath(entry)}
    if isinstance(entry, Mapping) and "model" in entry:
        own = {k: v for k, v in entry.items() if k not in ("model", "parameters")}
        return {"model": entry["model"], "parameters": {**(entry.get("parameters") or {}), **own}}
    return entry


def _weights(raw: dict[str, Any], where: str) -> None:
    """weights: [0.3, 0.7], one for each of models."""
    stated, models = raw.pop("weights", None), raw.get("models")
    if stated is None:
        return
    if not isinstance(models, list) or not isinstance(stated, list) or len(stated) != len(models):
        raise LuthierError(
            f"{where}: weights: give one number for each of models ({len(models or [])}), got {stated!r}"
        )
    raw["models"] = [_opened(m) for m in models]
    for entry, weight in zip(raw["models"], stated, strict=True):
        entry["parameters"] = {**entry.get("parameters", {}), "weight": weight}


def _problem(error: ValidationError) -> str:
    row: Any = min(error.errors(), key=lambda row: row["type"] != "extra_forbidden")
    path = ".".join(str(p) for p in row["loc"] if not (isinstance(p, str) and p[:1].isupper()))
    if row["type"] == "extra_forbidden":
        return f"{path}: unknown key: {nearest(str(row['loc'][-1]), _keys(row['loc'][:-1]), 'key')}"
    if row["type"] == "missing":
        return f"{path} is missing: state it"
    if row["type"] == "value_error":
        return f"{path}: {row['ctx']['error']}" if path else str(row["ctx"]["error"])
    return f"{path}: {row['msg'].replace('Input should be', 'must be')}, got {row['input']!r}"[:300]


def _keys(loc: Sequence[Any]) -> list[str]:
    model: Any = MergePlan
    for part in loc:
        kinds = {"models": Input, "slices": Slice, "modules": Module, "sources": SliceInput, "tokenizer": TokenizerSpec}
        model = kinds.get(part, TokenSource if part == "tokens" else model)
    return [name for name in model.model_fields if name != "field_file"]


# -- what a parameter is at one tensor


@dataclass(frozen=True)
class Where:
    """A place in the result: name of the tensor, and depth from 0 to 1 within its stretch of layers."""

    name: str
    t: float = 0.0


def resolve(key: str, scopes: Sequence[Parameters | None], at: Where) -> Any:
    """The value of a parameter, from the innermost scope that states one for this tensor; None where none does.

    A list of numbers is a gradient over the depth, a list of {filter, value} the first whose filter is part of the
    tensor's name ('*' or none: every name), as in mergekit's files.
    """
    for scope in scopes:
        if scope and key in scope:
            value = _value(scope[key], at, key)
            if value is not None:
                return value
    return None


def number(value: Any) -> Any:
    """A text that says a number ('0.5', as quoted or taken from the environment) as that number, all else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _value(setting: Any, at: Where, key: str) -> Any:
    if isinstance(setting, Mapping):
        if "value" not in setting:
            return setting  # a table of settings, for a merge that takes one
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        raise LuthierError(f"{key}: an empty list: give a number or a gradient, or leave {key} out")
    if any(isinstance(e, Mapping) for e in setting):
        for row in setting:
            if not isinstance(row, Mapping) or "value" not in row:
                raise LuthierError(f"{key}: give {{filter: …, value: …}} for every entry, got {row!r}")
            if strange := sorted(set(row) - {"filter", "value"}):
                raise LuthierError(
                    f"{key}: unknown key '{strange[0]}': {nearest(strange[0], ['filter', 'value'], 'key')}"
                )
            wanted = row.get("filter")
            if not isinstance(wanted, str | None):
                raise LuthierError(
                    f"{key}: a filter is a part of a tensor's name, as text, got {wanted!r}: put it in quotes"
                )
            if wanted is None or wanted == "*" or at.name and wanted in at.name:
                return _value(row["value"], at, key)
        return None
    setting = [number(e) for e in setting]
    if not all(isinstance(e, (int, float)) and not isinstance(e, bool) for e in setting):
        return setting[int(at.t * (len(setting) - 1))]
    scaled = at.t * (len(setting) - 1)
    low = int(scaled)
    high = min(len(setting) - 1, low + 1)
    return (1 - (scaled - low)) * setting[low] + (scaled - low) * setting[high]
