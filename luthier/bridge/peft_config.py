"""adapter_config.json: which fields are read, which change nothing, and which change the meaning and are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from luthier.errors import LuthierError

COMMON = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "target_modules", "exclude_modules", "modules_to_save"),
}
"""Read here, or without any effect on the numbers."""
READ: dict[str, set[str]] = {
    "LORA": {
        *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
        *("target_parameters", "lora_bias"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        "runtime_config",
    },
    "IA3": {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    "PROMPT_TUNING": {
        *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    },
    "PREFIX_TUNING": {
        *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
        *("encoder_hidden_size", "prefix_projection", "init_weights"),
    },
    "P_TUNING": {
        *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
        *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    },
    "LN_TUNING": set(),
    "BEFT": {"init_weights"},
    "SHIRA": {"r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"},
    "TRAINABLE_TOKENS": {"token_indices", "init_weights"},
}
"""PEFT's types that luthier has too -> their fields that are read, or are about the start of training alone."""
Names = list[str] | str | None
TYPES: dict[str, Any] = {
    "r": PositiveInt,
    "lora_alpha": float,
    "lora_dropout": float | None,
    "rank_pattern": dict[str, PositiveInt] | None,
    "alpha_pattern": dict[str, float] | None,
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), Names),
    **dict.fromkeys(("modules_to_save", "target_parameters"), list[str] | None),
    "layers_to_transform": list[int] | int | None,
    "trainable_token_indices": list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None,
    "token_indices": list[NonNegativeInt] | None,
    "num_virtual_tokens": PositiveInt,
    "num_transformer_submodules": Literal[1, 2] | None,
    "base_model_name_or_path": str | None,
    "bias": str | None,
}
"""What a field must be for its numbers to mean something; where it is left out its default holds."""
PATTERNS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts that take a part out of the base's own weights."""


def named_base(folder: str | os.PathLike[str]) -> str:
    """The base that an adapter folder names. Raises LuthierError where it names none, or is no adapter that is read here."""
    if named := read_config(Path(folder)).get("base_model_name_or_path"):
        return str(named)
    raise LuthierError(f"{folder}: adapter_config.json names no base: state it (--base)")


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, checked: a type that is not known here, or a field that changes the meaning in a way that
    is not supported, is an error that names it."""
    path = folder / "adapter_config.json"
    if not path.exists():
        if not folder.exists():
            raise LuthierError(f"nothing at {folder}: give the folder that save_pretrained wrote")
        if (folder / "delta.json").exists():
            raise LuthierError(f"{folder} is a delta already: there is nothing to import")
        raise LuthierError(f"{folder} holds no adapter_config.json: give the folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise LuthierError(f"{path} is not JSON ({e}): copy the folder again") from e
    if not isinstance(config, dict):
        raise LuthierError(f"{path} is no table of settings: copy the folder again")
    kind = config.get("peft_type")
    if kind is None and "config" in config:
        raise LuthierError(f"{path} is of the 'adapters' library, not of PEFT: load it there and merge it first")
    if not isinstance(kind, str) or kind not in READ:
        raise LuthierError(
            f"{path}: peft_type {kind} has no form here; those that do: {', '.join(sorted(READ))}; "
            "where it merges, merge it with PEFT (merge_and_unload) and verify the checkpoint instead"
        )
    for name, value in config.items():
        if name not in COMMON | READ[kind] and value not in (None, False, "", [], {}):
            raise LuthierError(
                f"{path}: '{name}' is set ({str(value)[:60]}) and may change what the numbers mean, which is not "
                "supported; merge the adapter with PEFT (merge_and_unload), or train without it"
            )
    _typed(path, config)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise LuthierError(
            f"{path}: init_lora_weights '{start}' changed the base's weights, so the numbers fit no base on disk; convert "
            "it with PEFT first: save_pretrained(..., path_initial_model_for_weight_conversion=...) gives plain LoRA"
        )
    if kind != "LORA" or config.get("use_dora") is None:
        config.setdefault("use_dora", False)
    return config


def _typed(path: Path, config: Mapping[str, Any]) -> None:
    """Raises LuthierError for a field of another type than PEFT writes, and for a pattern that is no regular expression."""
    for name, kind in TYPES.items():
        if name not in config:
            continue
        try:
            TypeAdapter(kind).validate_python(config[name], strict=True)
        except ValidationError as e:
            raise LuthierError(
                f"{path}: '{name}' is {str(config[name])[:60]!r}: {e.errors()[0]['msg']}; copy the folder again"
            ) from e
    for name in PATTERNS:
        value = config.get(name)
        for pattern in value if isinstance(value, dict) else [value] if isinstance(value, str) else []:
            try:
                re.compile(pattern)
            except re.error as e:
                raise LuthierError(f"{path}: '{name}' holds '{pattern}', which is no regular expression ({e})") from e


def matched(config: Mapping[str, Any], modules: Iterable[str], linear: Iterable[str] = ()) -> set[str]:
    """Module names that the config targets, as PEFT reads target_modules, exclude_modules and layers_to_transform.

    modules: candidates. linear: what 'all-linear' stands for.
    """
    wanted = config.get("target_modules")
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    chosen = set(linear) if everything else {m for m in modules if _targets(config, m)}
    return {m for m in chosen if not listed(config.get("exclude_modules"), m) and not _within_saved(config, m)}


def saved_module(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is saved whole, or lies in one that is: PEFT wraps every module whose name ends with an entry of
    modules_to_save."""
    parts = module.split(".")
    around = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(name.endswith(m) for m in config.get("modules_to_save") or [] for name in around)


def _within_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT keeps adapters off a module because it is, or lies in, one that is saved whole."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in config.get("modules_to_save") or [])


def _targets(config: Mapping[str, Any], module: str) -> bool:
    wanted = config.get("target_modules")
    if not listed(wanted, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    patterns = [rf"(?:^|.*?\.){n}\.(\d+)\." for n in names] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for p in patterns if (m := re.match(p, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def listed(wanted: Any, module: str) -> bool:
    """Whether a list of names (or ends of names), or a regular expression for the whole name, holds a module."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == w or module.endswith("." + w) for w in wanted)


def by_pattern(table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first regular expression that matches the end of the name."""
    return next((v for k, v in (table or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)
