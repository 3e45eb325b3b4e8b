"""From PEFT's tensors to pieces: every tensor finds its place in the base, and every place its tensor, or it is an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.attach.weights import read_weight
from luthier.bridge.peft_config import matched, saved_module
from luthier.bridge.peft_keys import PREFIX, some
from luthier.bridge.target import Target
from luthier.delta import FORMS, Form, Site, State
from luthier.delta.artefact import Piece
from luthier.errors import LuthierError
from luthier.parts.bits import encode

KINDS = ("linear", "conv1d", "embedding")
Found = dict[str, dict[str, Tensor]]
"""Module -> name -> tensor."""


def split(folder: Path, tensors: Mapping[str, Tensor], on: Target, ends: Mapping[str, str]) -> tuple[Found, Found]:
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
            f"{folder}: {len(lost)} of {len(tensors)} tensors match nothing in base {on.name} ({some(lost)}): an adapter "
            "of another architecture, or keys that were renamed; give the base it was trained on"
        )
    return numbers, whole


def expected_sites(
    folder: Path, config: Mapping[str, Any], numbers: Found, on: Target, names: set[str]
) -> dict[str, Site]:
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
        raise LuthierError(f"{folder}: tensors for modules that adapter_config.json does not target: {some(stray)}")
    missing = [f"{m} ({', '.join(sorted(gap))})" for m in sorted(wanted) if (gap := names - set(numbers.get(m, {})))]
    if missing:
        raise LuthierError(
            f"{folder}: {len(missing)} of {len(wanted)} targeted modules lack their tensors: {some(missing)}; the save was "
            "partial, so part of the training is lost: save again from the training process"
        )
    return {m: on.weight(m) for m in sorted(wanted, key=list(parts).index)}


def new_piece(kind: str, settings: dict[str, Any], sites: dict[str, Site], p: Found, on: Target) -> Piece:
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


def saved_pieces(
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
        raise LuthierError(f"{folder}: {some(list(absent))} of modules_to_save are not in the file: save again")
    return [moved(name, untied(folder, table, on), on, str(folder)) for name, table in groups.items()]


def _same(saved: Tensor, base: Tensor) -> bool:
    """Whether two tensors hold the same values, in the type of one or the other."""
    if saved.shape != base.shape:
        return False
    return torch.equal(saved.to(base.dtype), base) or torch.equal(saved, base.to(saved.dtype))


def untied(folder: Path, tuned: Mapping[str, Tensor], on: Target, alone: bool = False) -> dict[str, Tensor]:
    """Without the second names of tied parameters, whose values must then agree with the first's. alone: the first name
    may be there without the others."""
    out = dict(tuned)
    for key, tensor in tuned.items():
        part = on.roles.owner.get(key)
        if part is None:
            continue
        others = {n for p in on.roles.parts if p.name in part.tied_with for n in p.parameters if n.endswith("weight")}
        if not key.endswith("weight") or not others:
            continue
        held = [n for n in others if n in tuned] if alone and key in on.items else others
        if not all(n in tuned and torch.equal(tuned[n], tensor) for n in held):
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
