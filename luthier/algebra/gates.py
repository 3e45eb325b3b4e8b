"""Routers without training: every expert's row is the direction in which the base's hidden states of its prompts lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.sources import Source
from luthier.bases.load import quiet
from luthier.bases.tokens import load_tokenizer
from luthier.errors import LuthierError
from luthier.parts.seeds import generator_of
from luthier.plan.moe import DRAWN, Expert, MoePlan

SMALLEST = 1e-8
"""Norms below are taken for this."""
ALIKE = 5.0
"""Condition number of a layer's rows above which prompts are too alike to tell experts apart."""


def gates(plan: MoePlan, experts: Sequence[Expert], base: Source, layers: int, hidden: int) -> Tensor:
    """Router rows [layers, experts, hidden], in float32, or the type the base is held in to read the prompts.

    random: standard normal. uniform_random: as a linear layer starts, U(±1/√hidden). cheap_embed: the sum of the prompts'
    embeddings, the same for all layers. hidden: the hidden state before each layer at the last token (hidden_avg: the
    mean over positions, padding included), mean over prompts; negative prompts subtract theirs. All but the drawn ones
    have norm 1. The rules are mergekit's; drawn rows here come from the plan's seed.
    """
    shape = (layers, len(experts), hidden)
    g = generator_of(plan.seed, "gates")
    if plan.gate_mode == "random":
        return torch.randn(shape, generator=g)
    if plan.gate_mode == "uniform_random":
        return (torch.rand(shape, generator=g) * 2 - 1) / math.sqrt(hidden)
    words = load_tokenizer(base.folder)
    words.padding_side = "left"
    words.pad_token = words.bos_token or words.eos_token
    embedded = plan.gate_mode == "cheap_embed"
    read = (
        _embedded(base, layers) if embedded else _states(base.folder, plan.gate_mode == "hidden_avg", plan.gate_dtype)
    )
    rows = []
    for expert in experts:
        row = read(_tokens(words, expert.positive_prompts))
        if expert.negative_prompts:
            row = row - read(_tokens(words, expert.negative_prompts))
        rows.append(row / row.norm(dim=-1, keepdim=True).clamp_min(SMALLEST))
    found = torch.stack(rows, 1)
    if not torch.isfinite(found).all():
        raise LuthierError(
            f"{base.name} gives hidden states that are not finite: check the model, or gate_mode: random"
        )
    return found


def alike(rows: Tensor) -> list[int]:
    """Layers whose rows [layers, experts, hidden] are nearly dependent: some experts there get little to do."""
    return [i for i, layer in enumerate(rows) if float(torch.linalg.cond(layer.float())) > ALIKE]


def drawn(plan: MoePlan) -> bool:
    """Whether no prompt decides."""
    return plan.gate_mode in DRAWN


def _tokens(words: Any, prompts: Sequence[str]) -> Any:
    start = words.bos_token or ""
    return words([start + p for p in prompts], return_tensors="pt", padding=True, add_special_tokens=False)


def _embedded(base: Source, layers: int) -> Callable[[Any], Tensor]:
    name = next((n for n in base.names() if n.endswith("embed_tokens.weight")), None)
    if name is None:
        raise LuthierError(f"{base.name} has no embed_tokens: state gate_mode: hidden")
    table = base.read(name)

    def read(batch: Any) -> Tensor:
        rows = table[batch["input_ids"]].float() * batch["attention_mask"].unsqueeze(-1)
        total = rows.sum(1).sum(0, keepdim=True)
        return (total / total.norm(dim=-1, keepdim=True).clamp_min(SMALLEST)).repeat(layers, 1)

    return read


def _states(folder: Path, mean: bool, dtype: str) -> Callable[[Any], Tensor]:
    from transformers import AutoModel

    try:
        with quiet():
            model: Any = AutoModel.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
            ).eval()
    except (OSError, ValueError, RuntimeError) as e:
        raise LuthierError(f"{folder} cannot be loaded to read the prompts ({str(e).splitlines()[0][:160]})") from e

    @torch.no_grad()
    def read(batch: Any) -> Tensor:
        states = torch.stack(model(**batch, output_hidden_states=True).hidden_states[:-1])
        states = states.sum(2) / states.shape[2] if mean else states[:, :, -1, :]
        return states.sum(1) / states.shape[1]

    return read
