"""From a PEFT adapter folder to a delta: every tensor finds its place, and every place its tensor, or it is an error."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bridge.peft_config import by_pattern, listed, matched, read_config
from luthier.bridge.peft_experts import expert_sites, take, unstacked
from luthier.bridge.peft_keys import LORA, PREFIX, ROWS, TOKENS, checked, some
from luthier.bridge.peft_parts import Found, expected_sites, moved, new_piece, saved_pieces, split, untied
from luthier.bridge.peft_virtual import read_prefix, read_prompt
from luthier.bridge.peft_words import base_of, unwrapped
from luthier.bridge.target import Target
from luthier.bridge.weights_file import read_safetensors
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.parts.bits import encode


def from_peft(folder: str | os.PathLike[str], base: Any = None) -> Delta:
    """The delta of an adapter folder that PEFT (or TRL, axolotl, LLaMA-Factory …) wrote; same logits to rounding.

    base: a model, what load_base gives, or a name; default the one adapter_config.json names, and of a name with the tokens
    that the adapter's own tokenizer adds. It is not changed. Keys
    that match nothing, expected ones that are missing, other shapes, pickles and settings that are not supported are
    LuthierErrors.
    """
    folder = Path(folder)
    config, tensors = unwrapped(folder, read_config(folder), read_safetensors(folder / "adapter_model.safetensors"))
    on = base_of(folder, base)
    matrix = re.compile(r"\.lora_[AB]\b(?!.*\.bias$)")
    empty = [k for k, t in tensors.items() if t.numel() == 0 or matrix.search(k) and t.dim() < 2]
    if empty:
        raise LuthierError(
            f"{folder}: {len(empty)} tensors are empty shards ({empty[0]}): gather them before saving (ZeRO-3: "
            "stage3_gather_16bit_weights_on_model_save, FSDP: FULL_STATE_DICT)"
        )
    if not tensors:
        raise LuthierError(f"{folder}/adapter_model.safetensors holds no tensor: nothing was trained or saved")
    try:
        pieces = READERS[config["peft_type"]](folder, config, tensors, on)
    except LuthierError as e:  # a form that refuses its settings knows of no folder
        raise e if str(folder) in str(e) else LuthierError(f"{folder}: {e}") from e
    lineage = {
        "made_by": "from_peft",
        "peft": {k: config.get(k) for k in ("peft_type", "peft_version", "base_model_name_or_path", "revision")},
    }
    return Delta(pieces, on.card(), lineage)


def _lora(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    dora, tensors = bool(config["use_dora"]), dict(tensors)
    experts = expert_sites(folder, config, on)
    if experts and (dora or config.get("lora_bias")):
        raise LuthierError(
            f"{folder}: target_parameters with use_dora or lora_bias, which PEFT itself refuses: save again"
        )
    flat = take(folder, experts, tensors, on)
    rows = {k: tensors.pop(k) for k in list(tensors) if k.endswith(ROWS)}
    biased = {"lora_B.bias": "b"} if config.get("lora_bias") else {}
    numbers, rest = split(folder, tensors, on, LORA | biased)
    names = {"A", "B", *(["m"] if dora else []), *biased.values()}
    alone = experts and not numbers and not config.get("target_modules")
    sites = {} if alone else expected_sites(folder, config, numbers, on, names)
    p: Found = {}
    for name, site in sites.items():
        r = _scale(config, name)[0]
        shapes = {"A": (r, site.d_in), "B": (site.d_out, r), "m": (site.d_out,), "b": (site.d_out,)}
        p[name] = {k: checked(folder, site, k, t, shapes[k]) for k, t in numbers[name].items()}
    added = {name: held.pop("b") for name, held in p.items() if "b" in held}
    pieces = [new_piece("dora" if dora else "lora", _settings(config, list(sites)), sites, p, on)] if sites else []
    if added:  # PEFT scales it with the rest
        form: Any = pieces[0].form
        scaled: Found = {name: {"b": b * form.at_site(sites[name])[1]} for name, b in added.items()}
        pieces.append(new_piece("bias", {}, sites, scaled, on))
    pieces += _experts(folder, config, experts, flat)
    return pieces + saved_pieces(folder, config, rest, on, sites) + _lora_rows(folder, config, rows, on)


def _scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and alpha of one target."""
    r = by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
    return r, float(by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))


def _settings(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """LoRA's settings, with the commonest rank and alpha of these targets as the rule."""
    scales = {name: _scale(config, name) for name in names}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*scales.values(), strict=True))
    return {
        "rank": rank,
        "alpha": alpha,
        "ranks": {k: r for k, (r, _) in scales.items() if r != rank},
        "alphas": {k: a for k, (_, a) in scales.items() if a != alpha},
        "scaling": "rslora" if config.get("use_rslora") else "standard",
        "dropout": config.get("lora_dropout", 0.0),
    }


def _experts(folder: Path, config: Mapping[str, Any], sites: Mapping[str, Site], flat: Found) -> list[Piece]:
    """target_parameters: a piece for each rank and alpha, since the parameters of one module share its name."""
    groups: dict[tuple[int, float], list[str]] = {}
    for name in sites:
        groups.setdefault(_scale(config, name), []).append(name)
    pieces = []
    for (rank, _), names in groups.items():
        form = FORMS.make("lora", _settings(config, names) | {"ranks": {}, "alphas": {}})
        keys = {n: n if sites[n].experts else sites[n].name for n in names}
        p = {keys[n]: unstacked(folder, sites[n], rank, flat[n]) for n in names}
        title = "experts" if not pieces else f"experts-{len(pieces) + 1}"
        pieces.append(Piece(title, form, {keys[n]: sites[n] for n in names}, p, {keys[n]: {} for n in names}))
    return pieces


def _lora_rows(folder: Path, config: Mapping[str, Any], rows: Mapping[str, Tensor], on: Target) -> list[Piece]:
    """trainable_token_indices of LoRA."""
    stated = config.get("trainable_token_indices")
    if not stated and not rows:
        return []
    if not stated or not rows:
        raise LuthierError(f"{folder}: trainable_token_indices and the tensors for them are not both there: save again")
    tables, ids = {}, {}
    for key, values in rows.items():
        module = key.removeprefix(PREFIX).removesuffix("." + ROWS)
        leaf = module.rpartition(".")[2]
        tables[module] = values
        ids[module] = stated if isinstance(stated, list) else stated.get(leaf, stated.get(module))
    return _rows(folder, tables, ids, on)


def _tokens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    """TRAINABLE_TOKENS: rows alone."""
    numbers, rest = split(folder, tensors, on, {TOKENS: "rows"})
    if rest or not numbers:
        raise LuthierError(f"{folder}: holds {some(tensors)} where rows of an embedding alone are expected: save again")
    tables = {module: held["rows"] for module, held in numbers.items()}
    return _rows(folder, tables, dict.fromkeys(tables, config.get("token_indices")), on)


def _rows(folder: Path, tables: Mapping[str, Tensor], ids: Mapping[str, Any], on: Target) -> list[Piece]:
    """Some rows of embeddings (module -> values [n, width] and their n tokens), replaced."""
    p, fixed, sites = {}, {}, {}
    dtype = None
    first = untied(folder, {f"{module}.weight": t for module, t in tables.items()}, on, alone=True)
    for module, values in tables.items():
        if f"{module}.weight" not in first:
            continue
        own, name = ids[module], f"{module}.weight"
        if not own or name not in on.roles.owner or len(own) != len(values):
            raise LuthierError(
                f"{folder}: the rows of {module} do not fit the tokens that are stated ({own}): save again"
            )
        base = on.tensor(name).cpu()
        site = on.site(name)
        if max(own) >= len(base):
            raise LuthierError(f"{folder}: token {max(own)} is not in the base's {len(base)} rows: add base.new_tokens")
        if values.shape[1:] != base.shape[1:]:
            raise LuthierError(f"{folder}: rows of {module} are {tuple(values.shape)}, the base's are {base.shape[1]} wide: "
                               "another base")  # fmt: skip
        dtype = torch.promote_types(dtype or base.dtype, torch.promote_types(values.dtype, base.dtype))
        order = sorted(range(len(own)), key=lambda i: own[i])
        index = torch.cat([torch.arange(own[i] * base.shape[1], (own[i] + 1) * base.shape[1]) for i in order])
        tuned = values[order].flatten().to(dtype)
        p[name] = {"bits": encode(tuned, base.flatten()[index].to(dtype))}
        fixed[name] = {"index": index}
        sites[name] = replace(site, entries=len(index))
    form = FORMS.make("entries", {"dtype": str(dtype).removeprefix("torch.")})
    return [Piece("tokens", form, sites, p, fixed)]


def _norms(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    ends = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
    numbers, rest = split(folder, tensors, on, ends)
    wanted = matched(config, [p.name for p in on.roles.parts])
    if missing := sorted(wanted - set(numbers)):
        raise LuthierError(f"{folder}: {len(missing)} targeted norms lack their tensors: {some(missing)}; save again")
    flat = {f"{module}.{name}": t for module, named in numbers.items() for name, t in named.items()}
    return [moved("norm", flat, on, str(folder)), *saved_pieces(folder, config, rest, on)]


def _ia3(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    numbers, rest = split(folder, tensors, on, {"ia3_l": "l"})
    sites = expected_sites(folder, config, numbers, on, {"l"})
    inner = {name for name in sites if listed(config.get("feedforward_modules"), name)}
    roles = tuple(sorted({sites[name].role for name in inner}))
    if mixed := [n for n, site in sites.items() if n not in inner and site.role in roles]:
        raise LuthierError(
            f"{folder}: {mixed[0]} multiplies the output where its like multiply the input: not supported"
        )
    p = {}
    for name, site in sites.items():
        shape = (1, site.d_in) if name in inner else (site.d_out, 1)
        p[name] = {"l": checked(folder, site, "l", numbers[name]["l"], shape).flatten()}
    return [new_piece("ia3", {"inputs": roles}, sites, p, on), *saved_pieces(folder, config, rest, on, sites)]


def _bias(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    """BEFT: a bias added to a linear map's output."""
    numbers, rest = split(folder, tensors, on, {"beft_bias": "b"})
    sites = expected_sites(folder, config, numbers, on, {"b"})
    p = {n: {"b": checked(folder, s, "b", numbers[n]["b"], (1, s.d_out)).flatten()} for n, s in sites.items()}
    return [new_piece("bias", {}, sites, p, on), *saved_pieces(folder, config, rest, on, sites)]


def _sparse(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    """SHIRA: r (in + out) single entries of a weight; a piece for each number of them."""
    numbers, rest = split(folder, tensors, on, {"shira_weight": "values", "shira_indices": "index"})
    sites = expected_sites(folder, config, numbers, on, {"values", "index"})
    groups: dict[int, Found] = {}
    for name, site in sites.items():
        n = len(numbers[name]["values"])
        values, at = checked(folder, site, "values", numbers[name]["values"], (n,)), numbers[name]["index"].long()
        if (
            at.shape != (2, n)
            or bool((at < 0).any())
            or bool((at.amax(1) >= torch.tensor([site.d_out, site.d_in])).any())
        ):
            raise LuthierError(f"{folder}: {site.name} shira_indices do not lie in a weight [{site.d_out}, {site.d_in}]: "
                               "another base, or an altered file")  # fmt: skip
        index, where = (at[0] * site.d_in + at[1]).unique(return_inverse=True)
        found = {"values": values.new_zeros(len(index)).index_add_(0, where, values), "index": index}
        groups.setdefault(len(index), {})[name] = found
    pieces = []
    for n, found in groups.items():
        form = FORMS.make("sparse", {"entries": n})
        p = {name: {"values": own["values"]} for name, own in found.items()}
        fixed = {name: {"index": own["index"]} for name, own in found.items()}
        title = "sparse" if not pieces else f"sparse-{len(pieces) + 1}"
        pieces.append(Piece(title, form, {name: sites[name] for name in found}, p, fixed))
    return pieces + saved_pieces(folder, config, rest, on, sites)


READERS = {
    "LORA": _lora,
    "LN_TUNING": _norms,
    "IA3": _ia3,
    "BEFT": _bias,
    "SHIRA": _sparse,
    "TRAINABLE_TOKENS": _tokens,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
    "PREFIX_TUNING": read_prefix,
}
"""peft_type -> reader."""
