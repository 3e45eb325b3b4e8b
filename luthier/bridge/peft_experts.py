"""LoRA on single parameters (PEFT's target_parameters), both ways: the fused experts of a mixture, and linear weights.

PEFT wraps a module once for each of its parameters that is targeted, in their order, so that all but the last one's keys
hold `base_layer`. A stack of E experts lies flat: A [r·E, in] expert by expert, B [out, r·E] rank by rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.bridge.peft_keys import PREFIX, checked, some
from luthier.bridge.target import Target
from luthier.delta import Site
from luthier.errors import LuthierError


def expert_sites(folder: Path, config: Mapping[str, Any], on: Target) -> dict[str, Site]:
    """Full parameter name -> site, for every parameter that target_parameters name. Raises LuthierError where they name
    none, or one that is neither a stack of experts nor a linear weight."""
    wanted = list(config.get("target_parameters") or [])
    found = {}
    for full in on.roles.owner:
        if not any(full == w or full.endswith("." + w) for w in wanted):
            continue
        part = on.roles.owner[full]
        known = part.kind in ("fused-experts", "linear") and not part.transposed
        if not known or full != part.parameters[0] or full.endswith("bias"):
            raise LuthierError(
                f"{folder}: target_parameters reach {full}, which is no stack of experts (expert, out, in) and no linear "
                "weight: not supported; merge it with PEFT (merge_and_unload) and verify the checkpoint"
            )
        found[full] = on.weight(part.name)
    if wanted and not found:
        raise LuthierError(
            f"{folder}: target_parameters {wanted} match no parameter of base {on.name}: give the base it was trained on"
        )
    return found


def stems(names: Iterable[str], on: Target) -> dict[str, str]:
    """Full parameter name -> the key of its LoRA up to `.lora_A.weight`, without PEFT's prefix."""
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    out = {}
    for module, held in by_module.items():
        order = [f"{module}.{n}" for n, _ in on.model.get_submodule(module).named_parameters(recurse=False)]
        held = sorted(held, key=order.index)
        out |= {name: module + ".base_layer" * (len(held) - 1 - i) for i, name in enumerate(held)}
    return out


def take(
    folder: Path, sites: Mapping[str, Site], tensors: dict[str, Tensor], on: Target
) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> A and B as the file holds them, taken out of `tensors`; all of them must be there."""
    keys = {n: {k: f"{PREFIX}{stem}.lora_{k}.weight" for k in "AB"} for n, stem in stems(sites, on).items()}
    if missing := [n for n, own in keys.items() if not all(k in tensors for k in own.values())]:
        raise LuthierError(
            f"{folder}: {len(missing)} of {len(keys)} targeted parameters lack their tensors: {some(missing)}; the save was "
            "partial, or the base is another: save again from the training process"
        )
    return {name: {k: tensors.pop(key) for k, key in own.items()} for name, own in keys.items()}


def unstacked(folder: Path, site: Site, rank: int, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A [E, r, in] and B [E, out, r] of a stack of experts (without E for a linear weight), from PEFT's flat ones."""
    n = site.experts or 1
    a = checked(folder, site, "A", flat["A"], (rank * n, site.d_in))
    b = checked(folder, site, "B", flat["B"], (site.d_out, rank * n))
    if not site.experts:
        return {"A": a, "B": b}
    stacked = b.view(site.d_out, rank, n).permute(2, 0, 1).contiguous()
    return {"A": a.view(n, rank, site.d_in), "B": stacked}


def stacked(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's flat A [r·E, in] and B [out, r·E], from A [E, r, in] and B [E, out, r]."""
    return {"A": numbers["A"].flatten(0, 1), "B": numbers["B"].permute(1, 2, 0).flatten(1)}


def short_parameters(names: list[str], on: Target) -> list[str]:
    """target_parameters: the last two components where, in this base, they mean exactly these; full names where not."""
    leaves = sorted({".".join(n.split(".")[-2:]) for n in names})
    meant = {n for n in on.roles.owner if any(n == leaf or n.endswith("." + leaf) for leaf in leaves)}
    return leaves if meant == set(names) else sorted(names)
