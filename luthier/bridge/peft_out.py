"""From a delta to an adapter folder that PEFT reads, with the same logits; what PEFT cannot say is refused with the reason."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from luthier.bridge.peft_experts import short_parameters, stacked, stems
from luthier.bridge.peft_keys import HEADS, PREFIX, ROWS, TASKS, TOKENS
from luthier.bridge.peft_virtual import write_prefix, write_prompt
from luthier.bridge.target import Target, target
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Delta, Piece
from luthier.delta.folder import new_folder, refuse_existing
from luthier.errors import LuthierError

"""Modules that PEFT takes for a classifier's head."""
MATRIX = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
TABLE = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
Written = tuple[dict[str, Any], dict[str, Tensor]]


def to_peft(
    delta: Delta, folder: str | os.PathLike[str], *, base: Any = None, base_name: str | None = None, task: str = ""
) -> Path:
    """Writes adapter_config.json, adapter_model.safetensors and a card; gives the folder, which must be new or empty.

    base: a model or what load_base gives; needed where the delta moves whole parameters or rows (PEFT stores values, not
    differences), and used to shorten target_modules. base_name: what the adapter says it belongs to; default the delta's.
    task: PEFT's task_type; default by the base's kind.
    """
    folder = refuse_existing(folder)
    on = None if base is None else target(base)
    if not delta.pieces:
        raise LuthierError("the delta has no piece: there is nothing to write")
    config, tensors = _write(delta, on)
    config |= {
        "base_model_name_or_path": base_name or delta.base.get("name"),
        "task_type": task or TASKS.get(delta.base.get("kind", "causal"), "CAUSAL_LM"),
        "inference_mode": True,
        "revision": delta.base.get("revision"),
    }
    if config["task_type"] == "SEQ_CLS" and "modules_to_save" in config:
        _head(on, config, tensors)
    with new_folder(folder) as new:
        tensors = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        save_file(tensors, new / "adapter_model.safetensors", {"format": "pt"})
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (new / "README.md").write_text(_card(delta, config), encoding="utf-8")
        for name, content in delta.files.items():
            (new / name).write_bytes(content)
    return folder


def _write(delta: Delta, on: Target | None) -> Written:
    kinds: dict[str, list[Piece]] = {}
    for piece in delta.pieces:
        kinds.setdefault(FORMS.name_of(type(piece.form)), []).append(piece)
    base_kinds = {"dense", "entries"}
    main = [k for k in kinds if k not in base_kinds]
    biases = kinds["bias"] if set(main) == {"lora", "bias"} else []  # one adapter of PEFT's: lora_bias
    main = ["lora"] if biases else main
    if len(main) > 1:
        raise LuthierError(
            f"PEFT cannot hold {' and '.join(main)} in one adapter: export them apart (delta.only), or to hf"
        )
    kind = main[0] if main else "norm" if _only_norms(delta) else "entries" if set(kinds) == {"entries"} else ""
    if kind not in WRITERS:
        raise LuthierError(
            f"PEFT has no form for {kind or 'moved parameters alone'}: export to hf, or keep it as a delta"
        )
    config, tensors = WRITERS[kind](kinds.get(kind, []) or kinds["dense"], on)
    if main:
        _lora_bias(biases, kinds["lora"] if biases else [], config, tensors)
        for piece in kinds.get("dense", []):
            _saved(piece, on, config, tensors)
        for piece in kinds.get("entries", []):
            _rows(piece, on, config, tensors)
    elif len(kinds) > 1:
        raise LuthierError("PEFT cannot hold single entries beside norms: export to hf, or keep it as a delta")
    return config, tensors


def _head(on: Target | None, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """PEFT saves the head of every classifier, moved or not, and misses it when loading: the base's own goes along."""
    if any(key.removeprefix(PREFIX).split(".")[0] in HEADS for key in tensors):
        return
    if on is None:
        raise LuthierError("PEFT stores a classifier's head beside the adapter: state the base (--base)")
    for name in HEADS:
        if hasattr(on.model, name):
            tensors |= {f"{PREFIX}{key}": on.tensor(key) for key in on.items if key.split(".")[0] == name}
            config["modules_to_save"] = sorted({*(config["modules_to_save"] or []), name})


def _only_norms(delta: Delta) -> bool:
    return all(site.kind == "norm" or site.role.startswith("norm") for q in delta.pieces for site in q.sites.values())


def _lora(pieces: list[Piece], on: Target | None) -> Written:
    ranks, alphas, tensors, kinds = {}, {}, {}, {}
    experts: dict[str, dict[str, Tensor]] = {}
    forms: list[Any] = [piece.form for piece in pieces]
    rslora = all(form.scaling == "rslora" for form in forms)
    dora = "m" in next(iter(pieces[0].p.values()))
    for piece, form in zip(pieces, forms, strict=True):
        if dora and piece.scale != 1:
            raise LuthierError(
                f"piece '{piece.name}' is DoRA scaled by {piece.scale}, which PEFT cannot say: scale 1 only"
            )
        for name, site in piece.sites.items():
            if name in ranks:
                raise LuthierError(
                    f"two pieces change {name}: PEFT's adapter holds one; export to hf, or merge them first"
                )
            if piece.fixed[name] and not dora:
                raise LuthierError(
                    f"{name}: this start keeps {sorted(piece.fixed[name])}, which PEFT cannot hold: to hf"
                )
            r, scale = form.at_site(site)
            ranks[name], kinds[name] = r, site.kind
            alphas[name] = scale * piece.scale * (math.sqrt(r) if rslora else r)
            if site.experts:
                experts[name] = stacked(piece.p[name])
                continue
            ends = TABLE if site.kind == "embedding" else MATRIX
            tensors |= {f"{PREFIX}{name}.{ends[key]}": t for key, t in piece.p[name].items()}
    rank, alpha = (Counter(t.values()).most_common(1)[0][0] for t in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"^{re.escape(k)}": v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {f"^{re.escape(k)}": _plain(v) for k, v in alphas.items() if v != alpha},
        "target_modules": short_names([n for n in ranks if n not in experts], on),
        "lora_dropout": forms[0].dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds.values(),
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if experts:
        if on is None:
            raise LuthierError("PEFT's keys of experts follow the order in their module: state the base (--base)")
        # PEFT refuses dropout on parameters; in an adapter that is used it means nothing.
        config |= {"target_parameters": short_parameters(list(experts), on), "lora_dropout": 0.0}
        for name, stem in stems(experts, on).items():
            tensors |= {f"{PREFIX}{stem}.lora_{key}.weight": t for key, t in experts[name].items()}
    return config, tensors


def _lora_bias(biases: list[Piece], pieces: list[Piece], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Biases beside LoRA as PEFT's lora_bias: one on every second matrix, zero where the delta has none; PEFT scales it
    with the rest."""
    if not biases:
        return
    scales: dict[str, float] = {}
    for piece in pieces:
        form: Any = piece.form
        scales |= {name: form.at_site(site)[1] * piece.scale for name, site in piece.sites.items()}
        if odd := [n for n, s in piece.sites.items() if s.kind not in ("linear", "conv1d")]:
            raise LuthierError(
                f"PEFT's lora_bias needs LoRA on matrices alone, and {odd[0]} is none: export them apart"
            )
        tensors |= {f"{PREFIX}{name}.lora_B.bias": torch.zeros(site.d_out) for name, site in piece.sites.items()}
    for piece in biases:
        for name, p in piece.p.items():
            if name not in scales:
                raise LuthierError(
                    f"PEFT's lora_bias lies on LoRA's own modules, and {name} has none: export them apart"
                )
            tensors[f"{PREFIX}{name}.lora_B.bias"] += p["b"].detach().float().cpu() * (piece.scale / scales[name])
    config["lora_bias"] = True


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def short_names(names: list[str], on: Target | None) -> list[str]:
    """target_modules: last components where, in this base, they mean exactly these modules; full names where not."""
    leaves = sorted({n.rpartition(".")[2] for n in names})
    if on is None:
        return sorted(names)
    meant = {n for n, _ in on.model.named_modules() if n.rpartition(".")[2] in leaves}
    return leaves if meant == set(names) else sorted(names)


def _tuned(piece: Piece, key: str, on: Target | None) -> Tensor:
    if on is None:
        raise LuthierError(f"piece '{piece.name}' moves {key} itself and PEFT stores values: state the base (--base)")
    if piece.scale != 1:
        raise LuthierError(f"piece '{piece.name}' is scaled by {piece.scale}: its values are not in the delta; to hf")
    base = on.tensor(key).cpu()
    return piece.form.edit(base, next(s for s in piece.states(lambda _: base) if s.site == piece.sites[key]))  # pyright: ignore


def _saved(piece: Piece, on: Target | None, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if config["peft_type"] not in ("LORA", "IA3", "BEFT", "SHIRA"):
        raise LuthierError(f"PEFT's {config['peft_type']} holds no moved parameters ('{piece.name}'): export to hf")
    if config["peft_type"] == "LORA" and all(key.endswith(".bias") for key in piece.sites):
        config["bias"] = "all"
        for key in piece.sites:
            module = key.rpartition(".")[0]
            wrapped = f"{PREFIX}{module}.lora_A.weight" in tensors
            tensors[f"{PREFIX}{module}{'.base_layer' if wrapped else ''}.bias"] = _tuned(piece, key, on)
        return
    names = []
    for key in piece.sites:
        module, _, leaf = key.rpartition(".")
        tensors[f"{PREFIX}{key}"] = _tuned(piece, key, on)
        assert on is not None
        for other in dict(on.model.get_submodule(module).named_parameters(recurse=False)):
            if f"{module}.{other}" not in piece.sites:
                tensors.setdefault(f"{PREFIX}{module}.{other}", on.tensor(f"{module}.{other}"))
        names.append(module)
    config["modules_to_save"] = sorted({*(config["modules_to_save"] or []), *short_names(sorted(set(names)), on)})


def _rows(piece: Piece, on: Target | None, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if config["peft_type"] != "LORA":
        raise LuthierError(f"PEFT's {config['peft_type']} holds no rows of embeddings ('{piece.name}'): export to hf")
    stated: dict[str, list[int]] = {}
    for key in piece.sites:
        module, ids = key.rpartition(".")[0], _ids(piece, key, on)
        tensors[f"{PREFIX}{module}.{ROWS}"] = _tuned(piece, key, on)[ids]
        stated[module.rpartition(".")[2]] = ids
    config["trainable_token_indices"] = stated


def _ids(piece: Piece, key: str, on: Target | None) -> list[int]:
    """The rows that a piece of entries moves whole; anything else is refused."""
    site, index = piece.sites[key], piece.fixed[key]["index"]
    width = site.shape[-1]
    ids = (index[::width] // width).tolist()
    # PEFT keeps rows of an untied head too, but its forward then leaves a bias out.
    table = site.kind == "embedding" or (site.role == "head" and site.kind == "linear" and not _biased(on, key))
    whole = table and len(index) == len(ids) * width
    if not whole or index.tolist() != [i * width + j for i in ids for j in range(width)]:
        raise LuthierError(f"piece '{piece.name}' moves single entries of {key}, which PEFT cannot hold: export to hf")
    return ids


def _tokens(pieces: list[Piece], on: Target | None) -> Written:
    """Rows of embeddings alone: TRAINABLE_TOKENS, whose tables all have the same tokens."""
    tensors: dict[str, Tensor] = {}
    stated: list[int] = []
    for piece in pieces:
        for key in piece.sites:
            ids, name = _ids(piece, key, on), f"{PREFIX}{key.rpartition('.')[0]}.{TOKENS}"
            if name in tensors or (stated and ids != stated):
                raise LuthierError(f"PEFT's TRAINABLE_TOKENS moves the same rows once in every table; at {key} others move, "
                                   "or twice: export to hf, or keep it as a delta")  # fmt: skip
            stated, tensors[name] = ids, _tuned(piece, key, on)[ids]
    modules = [k.removeprefix(PREFIX).removesuffix("." + TOKENS) for k in tensors]
    return {"peft_type": "TRAINABLE_TOKENS", "token_indices": stated, "target_modules": modules}, tensors


def _biased(on: Target | None, key: str) -> bool:
    return on is None or on.model.get_submodule(key.rpartition(".")[0])._parameters.get("bias") is not None


def _norms(pieces: list[Piece], on: Target | None) -> Written:
    tensors = {}
    modules = sorted({key.rpartition(".")[0] for piece in pieces for key in piece.sites})
    for piece in pieces:
        for key in piece.sites:
            module, _, leaf = key.rpartition(".")
            tensors[f"{PREFIX}{module}.ln_tuning_layers.{leaf}"] = _tuned(piece, key, on)
    assert on is not None
    for module in modules:
        for leaf in dict(on.model.get_submodule(module).named_parameters(recurse=False)):
            tensors.setdefault(f"{PREFIX}{module}.ln_tuning_layers.{leaf}", on.tensor(f"{module}.{leaf}"))
    return {"peft_type": "LN_TUNING", "target_modules": short_names(modules, on), "modules_to_save": None}, tensors


def _ia3(pieces: list[Piece], on: Target | None) -> Written:
    tensors, inner, kinds = {}, [], set()
    for piece in pieces:
        form: Any = piece.form
        for name, s in zip(piece.sites, piece.states(), strict=True):
            before = form.at_input(s.site)
            vector = 1 + piece.scale * (s.p["l"] - 1)
            key = f"{PREFIX}{name}.ia3_l"
            if key in tensors:
                raise LuthierError(
                    f"two pieces scale {name}: PEFT's adapter holds one; export to hf, or merge them first"
                )
            tensors[key] = vector[None] if before else vector[:, None]
            inner += [name] if before else []
            kinds.add(s.site.kind)
    names = [k.removeprefix(PREFIX).removesuffix(".ia3_l") for k in tensors]
    config = {
        "peft_type": "IA3",
        "target_modules": short_names(names, on),
        "feedforward_modules": short_names(inner, on) if inner else [],
        "fan_in_fan_out": "conv1d" in kinds,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    return config, tensors


def _bias(pieces: list[Piece], on: Target | None) -> Written:
    """BEFT, of linear maps alone."""
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        for name, site in piece.sites.items():
            key = f"{PREFIX}{name}.beft_bias"
            if site.kind != "linear" or key in tensors:
                raise LuthierError(f"PEFT's BEFT holds one bias of a linear layer, and {name} has two or is a {site.kind}: "
                                   "export to hf, or keep it as a delta")  # fmt: skip
            tensors[key] = (piece.p[name]["b"] * piece.scale)[None]
    modules = short_names([k.removeprefix(PREFIX).removesuffix(".beft_bias") for k in tensors], on)
    return {"peft_type": "BEFT", "target_modules": modules, "modules_to_save": None}, tensors


def _sparse(pieces: list[Piece], on: Target | None) -> Written:
    """SHIRA: r (in + out) entries of a linear weight, with one r for all; filled up with zeros."""
    sites: dict[str, tuple[Site, Tensor, Tensor]] = {}
    for piece in pieces:
        for name, site in piece.sites.items():
            if site.kind != "linear" or name in sites:
                raise LuthierError(f"PEFT's SHIRA holds one change of a linear layer, and {name} has two or is a {site.kind}: "
                                   "export to hf, or keep it as a delta")  # fmt: skip
            sites[name] = site, piece.p[name]["values"] * piece.scale, piece.fixed[name]["index"]
    r = max(math.ceil(len(values) / (site.d_in + site.d_out)) for site, values, _ in sites.values())
    tensors: dict[str, Tensor] = {}
    for name, (site, values, index) in sites.items():
        n = r * (site.d_in + site.d_out)
        if n > site.d_in * site.d_out:
            raise LuthierError(f"PEFT's SHIRA would hold {n} entries of {name}, which has {site.d_in * site.d_out}: "
                               "export to hf, or keep it as a delta")  # fmt: skip
        full, at = values.new_zeros(n), index.new_zeros(n)
        full[: len(values)], at[: len(index)] = values, index
        tensors[f"{PREFIX}{name}.shira_weight"] = full
        tensors[f"{PREFIX}{name}.shira_indices"] = torch.stack([at // site.d_in, at % site.d_in]).int()
    config = {"peft_type": "SHIRA", "r": r, "target_modules": short_names(list(sites), on), "modules_to_save": None}
    return config | {"mask_type": "random", "fan_in_fan_out": False}, tensors


WRITERS: dict[str, Callable[[list[Piece], Target | None], Written]] = {
    "lora": _lora,
    "dora": _lora,
    "ia3": _ia3,
    "bias": _bias,
    "sparse": _sparse,
    "prompt": write_prompt,
    "prefix": write_prefix,
    "norm": _norms,
    "entries": _tokens,
}
"""Form -> writer."""


def _card(delta: Delta, config: dict[str, Any]) -> str:
    name = config["base_model_name_or_path"] or "unknown"
    return (
        f"---\nlibrary_name: peft\nbase_model: {name}\n---\n\n# {config['peft_type']} adapter for {name}\n\n"
        f"Written by luthier; base fingerprint `{delta.base.get('fingerprint', 'unknown')}`, {delta.count():,} numbers.\n"
    )
