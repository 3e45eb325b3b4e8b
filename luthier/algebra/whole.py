"""From a plan and two opened models to the checkpoint that a merge unit by unit makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.algebra.calibrate import read_text
from luthier.algebra.outcome import same_tokens, write_beside
from luthier.algebra.sources import Source, Tuned
from luthier.algebra.units import Units
from luthier.algebra.writer import ShardedFile, Spec
from luthier.bases.load import Base, load_base
from luthier.delta import MERGES
from luthier.errors import LuthierError
from luthier.plan.merge import MergePlan
from luthier.plan.schema import BaseSpec


def write_units(
    plan: MergePlan,
    sources: Sequence[Source],
    new: Path,
    shard: int,
    sync: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[int, int, list[str]]:
    """Writes the merge of the plan's two models into the fresh folder `new`: its tensors, its numbers and what is to be said.

    sources: the two models, whatever base the plan names beside them. Both are loaded, in float32; the result is written
    in the plan's type, or the one that most of the first model is stored in.
    Errors: no calibration text, other than two models, other tokenizers or architectures, stretches of layers.
    """
    told = f"{plan.method} matches the units of two whole models"
    if not plan.calibration:
        raise LuthierError(f"{told} by what they do on text: state calibration (a file, or practice:FAMILY)")
    if plan.slices or plan.modules or plan.tokenizer is not None:
        raise LuthierError(f"{told}: it takes neither slices, modules nor a tokenizer's merge; state models")
    models = plan.models or []
    if len(sources) != 2 or len(models) != 2 or any(m.parameters for m in models):
        raise LuthierError(
            f"{told}, and their settings hold for both: name two different ones, without settings of their own"
        )
    same_tokens(sources)
    method = MERGES.make(plan.method, plan.parameters)
    bases = [_loaded(s) for s in sources]
    text = read_text(plan.calibration, bases[0].tokenizer, "causal", plan.tokens, plan.length)
    units = Units(method, (bases[0].model, bases[1].model), bases[0].roles, text.ids)
    stated = plan.out_dtype or plan.dtype
    dtype = getattr(torch, stated) if stated else _stored(sources[0])
    made = {}
    for name, value in units.run(progress):
        made[name] = value.to(dtype)
        if not torch.isfinite(made[name]).all():
            raise LuthierError(
                f"{name} is not finite in {str(dtype)[6:]}: one of the models is broken, or dtype is narrow"
            )
    file = ShardedFile(new, [Spec(n, t.dtype, tuple(t.shape)) for n, t in made.items()], shard, sync)
    try:
        for name in file.order:
            file.write(name, made[name])
        file.close()
    finally:
        file.abandon()
    config: dict[str, Any] = json.loads(json.dumps(sources[0].config))
    config |= {"intermediate_size": units.inner, "dtype": str(dtype)[6:]}
    config.pop("torch_dtype", None)
    before, after = units.errors
    notes = [
        f"features: squared error {after:.3g} of their square, {before:.3g} by averaging, on {text.ids.numel()} tokens"
    ]
    write_beside(new, plan, sources, config, None, notes)
    return len(made), sum(t.numel() for t in made.values()), notes


def _loaded(source: Source) -> Base:
    """A model in memory; one that is a delta on a checkpoint with its tensors written in."""
    base = load_base(BaseSpec.model_validate({"name": str(source.folder), "dtype": "float32"}))
    if isinstance(source, Tuned):
        if source.tied != source.base.tied:
            raise LuthierError(
                f"{source.name} gives the head numbers of its own: 'luthier export' it and name the checkpoint"
            )
        with torch.no_grad():
            for name, parameter in base.model.named_parameters():
                parameter.copy_(source.read(name))
    return base


def _stored(source: Source) -> torch.dtype:
    """The type of most of its numbers."""
    source = source.base if isinstance(source, Tuned) else source
    sizes: dict[torch.dtype, int] = {}
    for name in source.names():
        size = 1
        for n in source.shape(name):
            size *= n
        sizes[source.dtype(name)] = sizes.get(source.dtype(name), 0) + size
    return max(sizes, key=lambda k: sizes[k])
