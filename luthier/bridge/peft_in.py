"""From a PEFT adapter folder to a delta: every tensor finds its place, and every place its tensor, or it is an error."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.attach.sites import sites_for
from luthier.attach.weights import read_weight
from luthier.bridge.peft_config import by_pattern, listed, matched, named_base, read_config, saved_module
from luthier.bridge.target import Target, target
from luthier.bridge.weights_file import read_safetensors
from luthier.delta import FORMS, Form, Site, State
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.parts.bits import encode

PREFIX = "base_model.model."
LORA = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
"""End of a key -> name of the number in the form."""
ROWS = "token_adapter.trainable_tokens_delta"
KINDS = ("linear", "conv1d", "embedding")
Found = dict[str, dict[str, Tensor]]
"""Module -> name -> tensor."""


def from_peft(folder: str | os.PathLike[str], base: Any = None) -> Delta:
    """The delta of an adapter folder that PEFT (or TRL, axolotl, LLaMA-Factory …) wrote; same logits to rounding.

    base: a model, what load_base gives, or a name; default the one adapter_config.json names. It is not changed. Keys
    that match nothing, expected ones that are missing, other shapes, pickles and settings that are not supported are
    LuthierErrors.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    on = target(base if base is not None else named_base(folder))
    matrix = re.compile(r"\.lora_[AB]\b(?!.*\.bias$)")
    empty = [k for k, t in tensors.items() if t.numel() == 0 or matrix.search(k) and t.dim() < 2]
    if empty:
        raise LuthierError(
            f"{folder}: {len(empty)} tensors are empty shards ({empty[0]}): gather them before saving (ZeRO-3: "
            "stage3_gather_16bit_weights_on_model_save, FSDP: FULL_STATE_DICT)"
        )
    if not tensors:
        raise LuthierError(f"{folder}/adapter_model.safetensors holds no tensor: nothing was trained or saved")
    pieces = READERS[config["peft_type"]](folder, config, tensors, on)
    lineage = {
        "made_by": "from_peft",
        "peft": {k: config.get(k) for k in ("peft_type", "peft_version", "base_model_name_or_path", "revision")},
    }
    return Delta(pieces, on.card(), lineage)


def _split(folder: Path, tensors: Mapping[str, Tensor], on: Target, ends: Mapping[str, str]) -> tuple[Found, Found]:
    """(numbers of the form by module, whole parameters by module); a key with no place in the base is an error."""
    modules = {name for name, _ in on.model.named_modules()}
    numbers: Found = {}
    whole: Found = {}
    lost = []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        end = next((e for e in ends if path.endswith("." + e)), None)
        if end is not None:
            module = path[: -len(end) - 1]
            table, name = numbers, ends[end]
        else:
            module, _, name = path.replace(".base_layer.", ".").rpartition(".")
            table = whole
        known = module in modules and key.startswith(PREFIX)
        if not known or (table is whole and f"{module}.{name}" not in on.roles.owner):
            lost.append(key)
            continue
        table.setdefault(module, {})[name] = tensor
    if lost:
        raise LuthierError(
            f"{folder}: {len(lost)} of {len(tensors)} tensors match nothing in base {on.name} ({_some(lost)}): an adapter "
            "of another architecture, or keys that were renamed; give the base it was trained on"
        )
    return numbers, whole


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _expected(folder: Path, config: Mapping[str, Any], numbers: Found, on: Target, names: set[str]) -> dict[str, Site]:
    """The sites that the config targets; each must have exactly these numbers, and no other module any."""
    parts = {p.name: p for p in on.roles.parts if p.kind in KINDS}
    linear = [n for n, p in parts.items() if p.kind != "embedding" and p.role not in ("head", "classifier")]
    if config.get("target_modules") is None:
        wanted = set(numbers) - {m for m in numbers if "experts" in m}
    else:
        wanted = matched(config, parts, linear)
    if not wanted:
        raise LuthierError(
            f"{folder}: target_modules {config.get('target_modules')} match no module of base {on.name}: give the base it "
            "was trained on"
        )
    if stray := [m for m in numbers if m not in wanted]:
        raise LuthierError(f"{folder}: tensors for modules that adapter_config.json does not target: {_some(stray)}")
    missing = [f"{m} ({', '.join(sorted(gap))})" for m in sorted(wanted) if (gap := names - set(numbers.get(m, {})))]
    if missing:
        raise LuthierError(
            f"{folder}: {len(missing)} of {len(wanted)} targeted modules lack their tensors: {_some(missing)}; the save was "
            "partial, so part of the training is lost: save again from the training process"
        )
    return {m: on.weight(m) for m in sorted(wanted, key=list(parts).index)}


def _check(folder: Path, site: Site, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise LuthierError(
            f"{folder}: {site.name} {name} has shape {tuple(tensor.shape)}, this base and config ask for {shape}: "
            "another base, or a config that is not this adapter's"
        )
    if not torch.isfinite(tensor).all():
        raise LuthierError(f"{folder}: {site.name} {name} holds numbers that are not finite: the training broke down")
    return tensor.float()


def _lora(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    if config.get("target_parameters"):
        raise LuthierError(
            f"{folder}: target_parameters {config['target_parameters']} put LoRA on fused experts, which is not read yet; "
            "merge it with PEFT (merge_and_unload) and verify the checkpoint"
        )
    dora = bool(config["use_dora"])
    rows = {k: t for k, t in tensors.items() if k.endswith(ROWS)}
    biased = {"lora_B.bias": "b"} if config.get("lora_bias") else {}
    numbers, whole = _split(folder, {k: t for k, t in tensors.items() if k not in rows}, on, LORA | biased)
    names = {"A", "B", *(["m"] if dora else []), *biased.values()}
    sites = _expected(folder, config, numbers, on, names)
    p, ranks, alphas = {}, {}, {}
    for name, site in sites.items():
        r = by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
        ranks[name], alphas[name] = r, float(by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        shapes = {"A": (r, site.d_in), "B": (site.d_out, r), "m": (site.d_out,), "b": (site.d_out,)}
        p[name] = {k: _check(folder, site, k, t, shapes[k]) for k, t in numbers[name].items()}
    added = {name: held.pop("b") for name, held in p.items() if "b" in held}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    settings = {
        "rank": rank,
        "alpha": alpha,
        "ranks": {k: v for k, v in ranks.items() if v != rank},
        "alphas": {k: v for k, v in alphas.items() if v != alpha},
        "scaling": "rslora" if config.get("use_rslora") else "standard",
        "dropout": config.get("lora_dropout", 0.0),
    }
    kind = "dora" if dora else "lora"
    pieces = [_piece(kind, settings, sites, p, on)]
    if added:  # PEFT scales it with the rest
        form: Any = pieces[0].form
        scaled: Found = {name: {"b": b * form.at_site(sites[name])[1]} for name, b in added.items()}
        pieces.append(_piece("bias", {}, sites, scaled, on))
    return pieces + _whole(folder, config, whole, on, sites) + _token_rows(folder, config, rows, on)


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _piece(kind: str, settings: dict[str, Any], sites: dict[str, Site], p: Found, on: Target) -> Piece:
    """A piece with the constants that its form takes from the base's weights."""
    form = FORMS.make(kind, settings)
    fixed: Found = {name: {} for name in sites}
    if type(form).start is not Form.start:
        for name, site in sites.items():
            module = on.model.get_submodule(name)
            drawn, constants = form.build(site, torch.Generator().manual_seed(0))
            bias = module._parameters.get("bias")
            weight = lambda m=module, s=site: read_weight(m, s).float()  # noqa: E731
            state = State(site, {**drawn, **p[name]}, constants, weight, None if bias is None else bias.detach())
            fixed[name] = dict(form.start(state)[1])
    return Piece(kind, form, sites, p, fixed)


def _whole(
    folder: Path, config: Mapping[str, Any], whole: Found, on: Target, adapted: Collection[str] = ()
) -> list[Piece]:
    """modules_to_save, trained biases and norms: parameters moved whole, kept exactly. adapted: modules that the form
    sits on.

    PEFT also saves embedding and head where one of them is adapted, or the vocabulary grew, without a word in the
    config. What equals the base's is left out. What differs moves, as PEFT loads it; but not under a form, where PEFT
    trains nothing: there it is of another base.
    """
    known = set(config.get("modules_to_save") or [])
    groups: dict[str, dict[str, Tensor]] = {}
    for module, named in whole.items():
        for name, tensor in named.items():
            saved = saved_module(config, module)
            if not saved and on.roles.owner[f"{module}.{name}"].role in ("embed", "head"):
                if _same(tensor, on.tensor(f"{module}.{name}").cpu()):
                    continue
                if module in adapted:
                    raise LuthierError(
                        f"{folder}: holds {module}.{name} as it was under the adapter, and this base's is another: give the "
                        "base it was trained on; if tokens were added, with base.new_tokens"
                    )
                saved = True
            if not saved and not (name == "bias" and config.get("bias", "none") != "none"):
                raise LuthierError(
                    f"{folder}: holds {module}.{name}, which adapter_config.json does not state (modules_to_save: "
                    f"{sorted(known) or 'none'}); if tokens were added, load the base with base.new_tokens"
                )
            groups.setdefault("saved" if saved else "bias", {})[f"{module}.{name}"] = tensor
    wanted = {name for name, module in on.model.named_modules() if saved_module(config, name) and _holds(module)}
    absent = wanted - set(whole)
    if absent:
        raise LuthierError(f"{folder}: {_some(list(absent))} of modules_to_save are not in the file: save again")
    return [moved(name, _untied(folder, table, on), on, str(folder)) for name, table in groups.items()]


def _same(saved: Tensor, base: Tensor) -> bool:
    """Whether two tensors hold the same values, in the type of one or the other."""
    if saved.shape != base.shape:
        return False
    return torch.equal(saved.to(base.dtype), base) or torch.equal(saved, base.to(saved.dtype))


def _untied(folder: Path, tuned: Mapping[str, Tensor], on: Target) -> dict[str, Tensor]:
    """Without the second names of tied parameters, whose values must then agree with the first's."""
    out = dict(tuned)
    for key, tensor in tuned.items():
        part = on.roles.owner[key]
        others = {n for p in on.roles.parts if p.name in part.tied_with for n in p.parameters if n.endswith("weight")}
        if not key.endswith("weight") or not others:
            continue
        if not all(n in tuned and torch.equal(tuned[n], tensor) for n in others):
            raise LuthierError(
                f"{folder} saved {key}, which this base ties to {', '.join(sorted(others))}, as a matrix of its own: load a "
                "base saved with tie_word_embeddings: false"
            )
        if key not in on.items:
            del out[key]
    return out


def _holds(module: torch.nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def moved(name: str, tuned: Mapping[str, Tensor], on: Target, where: str = "") -> Piece:
    """An exact piece from tuned parameters (full name -> values) and the base's."""
    base = {key: on.tensor(key).cpu() for key in tuned}
    for key, tensor in tuned.items():
        if tensor.shape != base[key].shape:
            raise LuthierError(
                f"{where}: {key} has shape {tuple(tensor.shape)}, the base's is {tuple(base[key].shape)}: another base, or "
                "tokens were added (load the base with base.new_tokens)"
            )
    dtype = next(iter(base.values())).dtype
    for tensor in [*tuned.values(), *base.values()]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    form = FORMS.make("dense", {"dtype": str(dtype).removeprefix("torch.")})
    p = {key: {"bits": encode(tensor.to(dtype), base[key].to(dtype))} for key, tensor in tuned.items()}
    return Piece(name, form, {key: on.site(key) for key in tuned}, p, {key: {} for key in tuned})


def _token_rows(folder: Path, config: Mapping[str, Any], rows: Mapping[str, Tensor], on: Target) -> list[Piece]:
    """trainable_token_indices: some rows of an embedding, replaced."""
    stated = config.get("trainable_token_indices")
    if not stated and not rows:
        return []
    if not stated or not rows:
        raise LuthierError(f"{folder}: trainable_token_indices and the tensors for them are not both there: save again")
    p, fixed, sites = {}, {}, {}
    dtype = None
    for key, values in rows.items():
        module = key.removeprefix(PREFIX).removesuffix("." + ROWS)
        leaf = module.rpartition(".")[2]
        ids = stated if isinstance(stated, list) else stated.get(leaf, stated.get(module))
        name = f"{module}.weight"
        if ids is None or name not in on.roles.owner or len(ids) != len(values):
            raise LuthierError(f"{folder}: {key} fits no entry of trainable_token_indices {stated}: save again")
        base = on.tensor(name).cpu()
        site = on.site(name)
        if max(ids) >= len(base):
            raise LuthierError(f"{folder}: token {max(ids)} is not in the base's {len(base)} rows: add base.new_tokens")
        dtype = torch.promote_types(dtype or base.dtype, torch.promote_types(values.dtype, base.dtype))
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        index = torch.cat([torch.arange(ids[i] * base.shape[1], (ids[i] + 1) * base.shape[1]) for i in order])
        tuned = values[order].flatten().to(dtype)
        p[name] = {"bits": encode(tuned, base.flatten()[index].to(dtype))}
        fixed[name] = {"index": index}
        sites[name] = replace(site, entries=len(index))
    form = FORMS.make("entries", {"dtype": str(dtype).removeprefix("torch.")})
    return [Piece("tokens", form, sites, p, fixed)]


def _norms(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    ends = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
    numbers, whole = _split(folder, tensors, on, ends)
    wanted = matched(config, [p.name for p in on.roles.parts])
    if missing := sorted(wanted - set(numbers)):
        raise LuthierError(f"{folder}: {len(missing)} targeted norms lack their tensors: {_some(missing)}; save again")
    flat = {f"{module}.{name}": t for module, named in numbers.items() for name, t in named.items()}
    return [moved("norm", flat, on, str(folder)), *_whole(folder, config, whole, on)]


def _ia3(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    numbers, whole = _split(folder, tensors, on, {"ia3_l": "l"})
    sites = _expected(folder, config, numbers, on, {"l"})
    inner = {name for name in sites if listed(config.get("feedforward_modules"), name)}
    roles = tuple(sorted({sites[name].role for name in inner}))
    if split := [n for n, site in sites.items() if n not in inner and site.role in roles]:
        raise LuthierError(
            f"{folder}: {split[0]} multiplies the output where its like multiply the input: not supported"
        )
    p = {}
    for name, site in sites.items():
        shape = (1, site.d_in) if name in inner else (site.d_out, 1)
        p[name] = {"l": _check(folder, site, "l", numbers[name]["l"], shape).flatten()}
    return [_piece("ia3", {"inputs": roles}, sites, p, on), *_whole(folder, config, whole, on, sites)]


def _virtual(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], width: int) -> Tensor:
    """The one tensor of a prompt or prefix, [length, width]."""
    table = tensors.get("prompt_embeddings")
    shape = (config.get("num_virtual_tokens"), width)
    if table is None or len(tensors) > 1:
        raise LuthierError(
            f"{folder}: holds {sorted(tensors)[:3]} where 'prompt_embeddings' alone is expected: save again"
        )
    if tuple(table.shape) != shape:
        raise LuthierError(
            f"{folder}: prompt_embeddings is {tuple(table.shape)}, this base asks for {shape}: another base"
        )
    if not torch.isfinite(table).all():
        raise LuthierError(f"{folder}: prompt_embeddings holds numbers that are not finite: the training broke down")
    return table.float()


def _prompt(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    if on.kind == "seq2seq":
        raise LuthierError(f"{folder}: a soft prompt of an encoder-decoder is not read yet: use PEFT for it")
    table = _virtual(folder, config, tensors, on.model.get_input_embeddings().weight.shape[1])
    form = FORMS.make("prompt", {"length": len(table)})
    (site,) = sites_for(on.roles, form)
    return [Piece("prompt", form, {"": site}, {"": {"embeddings": table}}, {"": {}})]


def _prefix(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    if on.kind == "seq2seq":
        raise LuthierError(f"{folder}: a deep prefix of an encoder-decoder is not read yet: use PEFT for it")
    sites = sites_for(on.roles, FORMS.make("prefix", {}))
    table = _virtual(folder, config, tensors, 2 * len(sites) * on.roles.d_kv)
    layers = table.view(len(table), len(sites), 2, on.roles.d_kv)
    form = FORMS.make("prefix", {"length": len(table), "shift_positions": True})
    p = {
        site.name: {"keys": layers[:, i, 0].contiguous(), "values": layers[:, i, 1].contiguous()}
        for i, site in enumerate(sites)
    }
    return [Piece("prefix", form, {s.name: s for s in sites}, p, {s.name: {} for s in sites})]


READERS = {"LORA": _lora, "LN_TUNING": _norms, "IA3": _ia3, "PROMPT_TUNING": _prompt, "PREFIX_TUNING": _prefix}
"""peft_type -> reader."""
