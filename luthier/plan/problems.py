"""What is wrong with a plan, in one line: where, what was expected, what stands there, and the key that was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from luthier.plan.schema import Plan

SYNONYMS = {
    "model_name_or_path": "base.name",
    "model": "base.name",
    "base_model": "base.name",
    "model_name": "base.name",
    "model_revision": "base.revision",
    "torch_dtype": "base.dtype",
    "attn_implementation": "base.attention",
    "flash_attn": "base.attention",
    "adapter_name_or_path": "delta.start_from",
    "adapters": "delta.start_from",
    "lora_model_dir": "delta.start_from",
    "adapter_checkpoint": "delta.start_from",
    "finetuning_type": "delta.form",
    "tuner_type": "delta.form",
    "train_type": "delta.form",
    "adapter": "delta.form",
    "peft_type": "delta.form",
    "use_peft": "delta.form",
    "method": "delta.form",
    "stage": "objective.name",
    "rlhf_type": "objective.name",
    "rl": "objective.name",
    "pref_loss": "objective.name",
    "loss_type": "objective.name",
    "r": "delta.rank",
    "lora_r": "delta.rank",
    "lora_rank": "delta.rank",
    "lora_alpha": "delta.alpha",
    "lora_dropout": "delta.dropout",
    "lora_target": "delta.sites",
    "target_modules": "delta.sites",
    "lora_target_modules": "delta.sites",
    "exclude_modules": "delta.except",
    "layers_to_transform": "delta.layers",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "val_size": "data.holdout",
    "val_set_size": "data.holdout",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "block_size": "data.max_length",
    "chat_template": "data.template",
    "sample_packing": "data.packing",
    "completion_only_loss": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "train_on_inputs": "data.loss_on",
    "group_by_length": "data.bucket",
    "max_samples": "data.train.limit",
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "max_grad_norm": "train.clip",
    "optim": "train.optimiser",
    "optimizer": "train.optimiser",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.checkpointing",
    "torch_compile": "train.compile",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "early_stopping_patience": "train.early_stop",
    "load_best_model_at_end": "train.keep_best",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "hub_model_id": "push_to",
    "push_to_hub": "push_to",
}
"""What other tools call it -> what a plan calls it."""

COMMAND_LINE = {
    "output_dir": "--out DIR",
    "out": "--out DIR",
    "output": "--out DIR",
    "resume": "--resume",
    "resume_from_checkpoint": "--resume",
    "overwrite_output_dir": "another --out DIR",
}
"""Keys of other tools that are no part of a plan but options of `luthier tune`."""

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a table of key: value",
    "model": "a section of key: value lines",
}
"""Start of pydantic's error type -> words."""


def first_problem(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """The line for a failed validation of `raw`: the most telling error, and how many more there are.

    Unknown keys come first: they explain most of the missing ones.
    """
    rows = sorted(error.errors(), key=lambda row: row["type"] != "extra_forbidden")
    places = {tuple(_place(row["loc"], raw)) for row in rows}
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return _line(rows[0], raw) + more


def unknown_key(path: str, key: str, known: Sequence[str]) -> str:
    """The line for a key that does not exist at `path` ('' for the top), where `known` do."""
    where = f"{path}.{key}" if path else key
    if key in COMMAND_LINE:
        return f"{where}: unknown key: it is not part of a plan; give {COMMAND_LINE[key]} on the command line"
    if meant := SYNONYMS.get(key):
        return f"{where}: unknown key: '{key}' is called {meant} here"
    if close := get_close_matches(key, known, 1, 0.6):
        return f"{where}: unknown key: did you mean '{f'{path}.' if path else ''}{close[0]}'?"
    has = f"{path or 'a plan'} has {', '.join(sorted(known))}"
    if homes := sorted({p for p, _ in fields() if p.rsplit(".", 1)[-1] == key}):
        home = "is a section of its own" if homes == [key] else f"belongs to another section: {' or '.join(homes)}"
        return f"{where}: unknown key: '{key}' {home}; {has}"
    return f"{where}: unknown key: {has}"


def fields(model: type[BaseModel] = Plan, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(path, field) of everything a plan may state, in the order of the types; list sections without an index."""
    for name, info in model.model_fields.items():
        where = f"{path}.{info.alias or name}" if path else info.alias or name
        yield where, info
        if (inner := section(info.annotation)) is not None:
            yield from fields(inner, where)


def section(annotation: Any) -> type[BaseModel] | None:
    """The section type inside a field's annotation, itself or as the entry of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := section(a)) is not None), None)


def _line(row: Any, raw: Mapping[str, Any]) -> str:
    kind, loc, got = row["type"], row["loc"], row["input"]
    place = _place(loc, raw)
    path = ".".join(map(str, place))
    if kind == "extra_forbidden":
        return unknown_key(".".join(map(str, loc[:-1])), str(loc[-1]), _keys(loc[:-1]))
    if kind == "missing":
        path = ".".join(map(str, loc))
        about = dict(fields()).get(".".join(str(p) for p in loc if not isinstance(p, int)))
        return f"{path} is missing: state it ({about.description if about else 'it has no default'})"
    if kind == "value_error":
        return f"{path}: {str(row['ctx']['error'])}"
    if kind == "literal_error":
        options = row["ctx"]["expected"]
        close = get_close_matches(str(got), [o.strip(" '") for o in options.replace(" or ", ",").split(",")], 1, 0.5)
        return f"{path}: got {_shown(got)}; " + (
            f"did you mean '{close[0]}'? (one of {options})" if close else f"expected {options}"
        )
    if kind == "too_short":
        return f"{path}: is empty: give at least one"
    if isinstance(loc[-1], str) and loc[-1].startswith("literal["):
        kind = "literal"
    words = next((text for start, text in EXPECTED.items() if kind.startswith(start)), None)
    if words is None:
        return f"{path}: {row['msg'].replace('Input should be', 'must be')}, got {_shown(got)}"
    return f"{path}: expected {words}, got {_shown(got)}"


def _place(loc: Sequence[Any], raw: Any) -> list[Any]:
    """The part of a location that is in what the user wrote: names of union branches are pydantic's own."""
    place, here = [], raw
    for part in loc:
        if (
            isinstance(here, Mapping)
            and part in here
            or isinstance(here, list)
            and isinstance(part, int)
            and part < len(here)
        ):
            here = here[part]
            place.append(part)
        elif place and isinstance(here, str | int | float | bool | None):
            break
        elif not isinstance(part, int):
            place.append(part)
    return place or list(loc)


def _keys(loc: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Plan
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = section(model.model_fields[part].annotation) or model
    return [info.alias or name for name, info in model.model_fields.items()]


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, BaseModel) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"
