"""The base that an adapter folder needs: of its kind, with its labels, and with rows for the tokens that were added."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bases.locate import locate, read_json
from luthier.bases.tokens import load_tokenizer
from luthier.bridge.peft_config import named_base, read_config
from luthier.bridge.peft_keys import HEADS, PREFIX, ROWS, TASKS
from luthier.bridge.target import Target, target
from luthier.bridge.tensors import read_places
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec

TABLE = ".token_adapter.base_layer.weight"
"""End of the key of a table whose rows were trained one by one."""


def base_of(folder: str | os.PathLike[str], base: Any = None) -> Target:
    """The base of an adapter folder as the adapter needs it: of its kind, and with rows for the tokens that its tokenizer adds,
    where the adapter has numbers for them.

    base: a model, what load_base gives, a BaseSpec or a name; default the one that adapter_config.json names. A model, and a
    BaseSpec with new tokens, stay as they are.
    """
    given = base if base is not None else named_base(folder)
    if isinstance(given, (str, os.PathLike)):
        given = BaseSpec.model_validate({"name": os.fspath(given), **head_of(Path(folder), given)})
    on = target(given)
    if not isinstance(given, BaseSpec) or on.new_rows:
        return on
    words = words_beyond(Path(folder), on)
    return target(given.model_copy(update={"new_tokens": words})) if words else on


def head_of(folder: Path, base: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter folder says of its base's head, as settings of a BaseSpec: the kind by its task_type, and as many labels
    as the classifier beside it has rows, called as the base (by name) calls as many, or as transformers does."""
    task = read_config(folder).get("task_type")
    kind = next((k for k, name in TASKS.items() if name == task), "causal")
    if kind != "classify":
        return {} if kind == "causal" else {"kind": kind}
    found = read_places(folder / "adapter_model.safetensors").items()
    heads = [p.shape[0] for key, p in found if len(p.shape) == 2 and key.removeprefix(PREFIX).split(".")[0] in HEADS]
    if not heads:
        return {"kind": kind}
    place = locate(BaseSpec.model_validate({"name": os.fspath(base)}), weights=False)
    own = list((read_json(place / "config.json").get("id2label") or {}).values())
    return {"kind": kind, "labels": own if len(own) == heads[-1] else [f"LABEL_{n}" for n in range(heads[-1])]}


def words_beyond(folder: Path, on: Target) -> list[str]:
    """The tokens for which an adapter folder holds rows and `on` has none, by the folder's tokenizer, in order; [] where
    there are none, or where the two tokenizers differ otherwise."""
    have = on.model.get_input_embeddings().weight.shape[0]
    if _rows(folder, on) <= have or on.tokenizer is None or not (folder / "tokenizer_config.json").is_file():
        return []
    ours, theirs = on.tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    more = sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)
    first = len(on.tokenizer)
    follow = [theirs[t] for t in more] == list(range(first, first + len(more)))
    return more if follow and all(theirs.get(t) == i for t, i in ours.items()) else []


def _rows(folder: Path, on: Target) -> int:
    """How many rows of embedding and head the adapter needs."""
    config = read_config(folder)
    stated = config.get("trainable_token_indices") or config.get("token_indices") or []
    lists = list(stated.values()) if isinstance(stated, dict) else [stated]
    tables = [on.model.get_input_embeddings(), on.model.get_output_embeddings()]
    names = [f".{name}." for name, module in on.model.named_modules() if any(module is t for t in tables)]
    places = read_places(folder / "adapter_model.safetensors").items()
    held = [p.shape[0] for key, p in places if key.endswith(".weight") and len(p.shape) == 2 and ".lora_" not in key
            and any(name in key for name in names)]  # fmt: skip
    return max([1 + max((max(ids, default=-1) for ids in lists), default=-1), *held])


def unwrapped(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors without the insides of PEFT's wrappers, which it writes beside the module where the vocabulary grew.

    Of a module saved whole the copies go. Trained rows whose table lies beside them become that table, with the rows in it: the
    other new rows are in no base. Errors: LuthierError where two copies differ.
    """
    out, config = dict(tensors), dict(config)
    for key in list(out):
        for inside in (".modules_to_save.", ".original_module."):
            if (outer := key.replace(inside, ".")) != key and outer in out:
                copied = out.pop(key)
                if inside == ".modules_to_save." and not torch.equal(copied, out[outer]):
                    raise LuthierError(f"{folder}: {outer} and {key} are two values of one parameter: save again")
    for key in [k for k in out if k.endswith(TABLE)]:
        module = key.removesuffix(TABLE)
        leaf, table = module.rpartition(".")[2], out.pop(key).clone()
        stated = config.get("trainable_token_indices") or []
        own = stated.get(leaf, stated.get(module.removeprefix(PREFIX), [])) if isinstance(stated, dict) else stated
        rows = out.pop(f"{module}.{ROWS}", None)
        if rows is None or len(rows) != len(own) or max(own) >= len(table):
            raise LuthierError(
                f"{folder}: the rows of {module} do not fit the tokens that are stated ({own}): save again"
            )
        table[list(own)] = rows.to(table.dtype)
        out[f"{module}.weight"] = table
    if len(out) < len(tensors) and not any(k.endswith(ROWS) for k in out):
        config["trainable_token_indices"] = None
    return config, out
