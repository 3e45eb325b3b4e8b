"""moe: a sparse mixture assembled from dense models, by a plan with `experts`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.algebra.moe import Assembled, write_moe
from luthier.algebra.sources import open_source
from luthier.algebra.writer import bytes_of
from luthier.delta.folder import new_folder, refuse_existing
from luthier.plan.moe import MoePlan, load_moe

__all__ = ["Assembled", "moe"]


def moe(
    plan: MoePlan | Mapping[str, Any] | str | os.PathLike[str], *, out: str | os.PathLike[str], sync: bool = True
) -> Assembled:
    """Writes the mixture as a checkpoint that transformers loads to the folder `out`, which must be new or empty.

    plan: a YAML file or its content, with `base_model` and `experts`; mergekit-moe's files are read as they are. Llama and
    Mistral models become a Mixtral, with one shared expert a Qwen2 MoE; Qwen3 models a Qwen3 MoE. Weights go through tensor
    by tensor; `gate_mode: hidden` needs the base in memory. sync: wait until the disk holds the weights.
    """
    read = load_moe(plan)
    models = [read.base_model, *(e.source_model for e in read.every())]
    refuse_existing(out, [place for ref in models for place in (ref.path, ref.lora)])
    name = str(read.base_model.path)
    base = open_source(name, read.base_model.lora, None, read.base_model.revision)
    opened = [base]
    try:
        for expert in read.every():
            ref = expert.source_model
            opened.append(open_source(ref.path, ref.lora, name if ref != read.base_model else None, ref.revision))
        with new_folder(out, sync) as new:
            made = write_moe(read, base, opened[1:], new, bytes_of(read.shard), sync)
    finally:
        for source in opened:
            source.close()
    return dataclasses.replace(made, out=Path(out))
