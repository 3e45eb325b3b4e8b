"""Small models and merge files, made alike for mergekit (tools/merge_files_reference.py) and for our test of the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LAYERS, WIDTH, INNER, WORDS = 4, 16, 24, 40
NAMES = {"base": 0, "a": 1, "b": 2, "c": 3}
SAMPLE = 7
"""Every this many-th number of a tensor is compared, and the sum of all."""


def make(folder: Path) -> None:
    """base, a, b, c; base16 … in bfloat16; baset, at, bt with a tied head."""
    for name, seed in NAMES.items():
        for end, tied, dtype in (("", False, torch.float32), ("16", False, torch.bfloat16), ("t", True, torch.float32)):
            _model(folder / f"{name}{end}", seed, tied, dtype)


def _model(folder: Path, seed: int, tied: bool, dtype: torch.dtype) -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (WORDS, WIDTH)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qo"}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (WIDTH // 2, WIDTH) for n in "kv"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (INNER, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{at}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    first, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        value = torch.rand(shape, generator=first) - 0.5
        tensors[name] = (value + (0.05 * (torch.rand(shape, generator=own) - 0.5) if seed else 0)).to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS,
        "tie_word_embeddings": tied, "dtype": str(dtype)[6:], "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def placed(value: Any, folder: Path) -> Any:
    """A plan with '@a' standing for the folder of a."""
    if isinstance(value, str) and value.startswith("@"):
        return str(folder / value[1:])
    if isinstance(value, Mapping):
        return {k: placed(v, folder) for k, v in value.items()}
    return [placed(v, folder) for v in value] if isinstance(value, list) else value


def facts(folder: Path) -> dict[str, Any]:
    """Type, shape, sum and a sample of every tensor of a checkpoint."""
    out: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                t = f.get_tensor(name)
                flat = t.double().reshape(-1)
                rows = [round(v, 7) for v in flat[:: max(1, len(flat) // SAMPLE)].tolist()]
                out[name] = [str(t.dtype)[6:], list(t.shape), round(float(flat.sum()), 5), rows]
    return out


def _models(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    own = [{k: v[i] if isinstance(v, tuple) else v for k, v in parameters.items()} for i in range(len(names))]
    return [{"model": f"@{n}", "parameters": p} for n, p in zip(names, own, strict=True)]


def _part(name: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {"model": f"@{name}", "layer_range": [first, last]} | ({"parameters": parameters} if parameters else {})


BY_NAME = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.4}]
F32 = {"dtype": "float32"}
CASES: dict[str, dict[str, Any]] = {
    "linear with the base as an input": {
        "merge_method": "linear", "base_model": "@base", "models": _models("a", "b"), **F32,
        "parameters": {"weight": 0.4, "normalize": False},
    },
    "stored types": {"merge_method": "linear", "models": _models("a16", "b16", weight=(0.7, 0.5))},
    "mixed types": {"merge_method": "linear", "models": _models("a", "b16", weight=(0.7, 0.5))},
    "other output": {
        "merge_method": "linear", "models": _models("a16", "b16", weight=([0.1, 0.9], 0.5)), "dtype": "float32",
        "out_dtype": "float16",
    },
    "gradients and filters": {
        "merge_method": "task_arithmetic", "base_model": "@base", **F32,
        "models": _models("a", "b", weight=([0.0, 0.5, 1.0], BY_NAME)), "parameters": {"lambda": 0.8},
    },
    "filters fall through": {
        "merge_method": "task_arithmetic", "base_model": "@base", **F32, "parameters": {"weight": 0.25},
        "models": _models("a", "b", weight=([{"filter": "norm", "value": 1.0}], 0.5)),
    },
    "base listed": {
        "merge_method": "ties", "base_model": "@base", **F32, "parameters": {"normalize": False},
        "models": [*_models("a", "b", weight=(1.0, -0.5), density=0.35), {"model": "@base"}],
    },
    "ties in bfloat16": {
        "merge_method": "ties", "base_model": "@base16", "dtype": "bfloat16", "parameters": {"int8_mask": True},
        "models": _models("a16", "b16", "c16", weight=(0.6, 0.4, 0.5), density=(0.5, 0.3, 0.9)),
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs_ties", "base_model": "@base", **F32,
        "models": _models("a", "b", weight=(0.7, 0.5), density=[0.3, 0.8], gamma=0.05),
    },
    "slerp by slices": {
        "merge_method": "slerp", "base_model": "@base", "parameters": {"t": BY_NAME}, **F32,
        "slices": [{"sources": [_part("base", 0, 4), _part("a", 0, 4)]}],
    },
    "slerp in parts": {
        "merge_method": "slerp", "base_model": "@base16", "dtype": "bfloat16",
        "slices": [
            {"sources": [_part("base16", 0, 1), _part("a16", 0, 1)], "parameters": {"t": [0.1, 0.6]}},
            {"sources": [_part("base16", 1, 4), _part("a16", 1, 4)], "parameters": {"t": [0.9, 0.3]}},
        ],
    },
    "stacked": {
        "merge_method": "passthrough", "dtype": "bfloat16",
        "slices": [{"sources": [_part("a", 0, 3)]}, {"sources": [_part("b", 1, 4)]}],
    },
    "stacked and scaled": {
        "merge_method": "passthrough", **F32,
        "slices": [
            {"sources": [_part("a", 0, 2)]},
            {"sources": [_part("a", 1, 4, scale=[{"filter": "o_proj", "value": 0.0}, {"value": 1.0}])]},
        ],
    },
    "layers of other depth": {
        "merge_method": "linear", **F32,
        "slices": [
            {"sources": [_part("a", 0, 2), _part("b", 1, 3)], "parameters": {"weight": 0.5}},
            {"sources": [_part("c", 3, 4, weight=1.0), _part("b", 0, 1, weight=2.0)]},
        ],
    },
    "modules": {
        "merge_method": "linear", **F32,
        "modules": {"default": {"slices": [{"sources": [_part("a", 0, 4, weight=0.2), _part("b", 0, 4, weight=0.3)]}]}},
    },
    "tied": {"merge_method": "ties", "base_model": "@baset", "models": _models("at", "bt", weight=0.5, density=0.5), **F32},
    "tied and untied": {"merge_method": "linear", "models": _models("at", "b", weight=0.5), **F32},
    "base tied": {"merge_method": "task_arithmetic", "base_model": "@baset", "models": _models("a", "bt", weight=0.5), **F32},
    "widened": {"merge_method": "arcee_fusion", "base_model": "@base16", "models": _models("a16"), "dtype": "bfloat16"},
    "numbers in quotes": {
        "merge_method": "linear", "models": _models("a", "b", weight=("0.25", ["0.1", 0.9, "1e-1"])), "random_seed": 3,
        "dtype": "torch.float32",
    },
    "more models behind": {
        "merge_method": "ties", "base_model": "@base16", "parameters": {"weight": 0.5, "density": 0.4},
        "slices": [
            {"sources": [_part("base16", 0, 2), _part("a16", 0, 2)]},
            {"sources": [_part("base16", 2, 4), _part("b16", 2, 4), _part("c16", 2, 4, weight=0.9)]},
        ],
    },
    "beyond the models": {
        "merge_method": "slerp", "base_model": "@base", "models": _models("a"), **F32,
        "parameters": {"t": [-0.25, 1.5], "embed_slerp": True},
    },
    "nothing of one": {
        "merge_method": "ties", "base_model": "@base", "models": _models("a", "b", weight=0.5, density=([0, 0.5], 0.5)), **F32,
    },
    "exponent": {"merge_method": "nearswap", "base_model": "@base", "models": _models("a"), "parameters": {"t": 4e-3}, **F32},
}  # fmt: skip
