"""Prompts and prefixes of PEFT, both ways: one table of virtual tokens in a file.

An encoder-decoder's prompt stands before the encoder's tokens; its prefix lies in the decoder's self-attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.attach.sites import sites_for
from luthier.bridge.target import Target
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Piece
from luthier.errors import LuthierError


def _table(folder: Path, tensors: dict[str, Tensor], rows: int, width: int) -> Tensor:
    """The one tensor of a prompt or prefix, [rows, width]."""
    table = tensors.get("prompt_embeddings")
    if table is None or len(tensors) > 1:
        raise LuthierError(
            f"{folder}: holds {sorted(tensors)[:3]} where 'prompt_embeddings' alone is expected: save again"
        )
    if tuple(table.shape) != (rows, width):
        raise LuthierError(
            f"{folder}: prompt_embeddings is {tuple(table.shape)}, this base and config ask for {(rows, width)}: another base"
        )
    if not torch.isfinite(table).all():
        raise LuthierError(f"{folder}: prompt_embeddings holds numbers that are not finite: the training broke down")
    return table.float()


def _length(folder: Path, config: dict[str, Any]) -> int:
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or length < 1:
        raise LuthierError(
            f"{folder}: adapter_config.json states num_virtual_tokens {length}: give the one it was saved with"
        )
    return length


def read_prompt(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    """PROMPT_TUNING, and P_TUNING, whose file holds what its encoder made of the prompt.

    For an encoder-decoder PEFT stores a second half too, which its forward pass leaves out; so do we.
    """
    length, width = _length(folder, config), on.model.get_input_embeddings().weight.shape[1]
    parts = config.get("num_transformer_submodules") or (2 if on.kind == "seq2seq" else 1)
    table = _table(folder, tensors, length * parts, width)[:length].contiguous()
    form = FORMS.make("prompt", {"length": length})
    (site,) = sites_for(on.roles, form)
    return [Piece("prompt", form, {"": site}, {"": {"embeddings": table}}, {"": {}})]


def read_prefix(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], on: Target) -> list[Piece]:
    """PREFIX_TUNING: keys and values of every layer, of an encoder-decoder of the decoder's."""
    length, paired = _length(folder, config), on.kind == "seq2seq"
    sites = _layers(on, paired)
    table = _table(folder, tensors, length, 2 * len(sites) * on.roles.d_kv)
    slots = table.view(length, 2 * len(sites), on.roles.d_kv).unbind(1)
    form = FORMS.make("prefix", {"length": length, "shift_positions": True})
    p = {}
    for i, site in enumerate(sites):
        keys, values = _slots(i, len(sites), paired)
        p[site.name] = {"keys": slots[keys].contiguous(), "values": slots[values].contiguous()}
    return [Piece("prefix", form, {s.name: s for s in sites}, p, {s.name: {} for s in sites})]


def _layers(on: Target, paired: bool) -> list[Site]:
    sites = sites_for(on.roles, FORMS.make("prefix", {}))
    return [s for s in sites if "decoder" in s.name.split(".")] if paired else sites


def _slots(layer: int, layers: int, paired: bool) -> tuple[int, int]:
    """Where a layer's keys and values lie among the 2 · layers vectors of a row.

    For encoder-decoders PEFT repeats a row and deals out four vectors a layer, of which the last two, meant for attention
    to the encoder, are dropped: with an even number of layers, layer i and layer i + layers / 2 get the same ones.
    """
    first = 4 * layer % (2 * layers) if paired else 2 * layer
    return first, first + 1


def _one(pieces: list[Piece]) -> Piece:
    if len(pieces) > 1:
        raise LuthierError(
            f"{len(pieces)} pieces of one form stand before the text, PEFT's adapter holds one: export one"
        )
    return pieces[0]


def write_prompt(pieces: list[Piece], on: Target | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PROMPT_TUNING; of an encoder-decoder with the encoder's prompt alone."""
    (state,) = _one(pieces).states()
    table = state.p["embeddings"]
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(table), "token_dim": table.shape[1]}
    config |= {"num_transformer_submodules": 1, "num_layers": state.site.layers or None, "num_attention_heads": None}
    return config, {"prompt_embeddings": table}


def write_prefix(pieces: list[Piece], on: Target | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PREFIX_TUNING; refused where PEFT would put other keys and values in a layer than the delta has there."""
    piece = _one(pieces)
    form: Any = piece.form
    if not form.shift_positions:
        raise LuthierError(
            "this prefix leaves the text's positions unshifted, PEFT always shifts them: keep it as a delta"
        )
    states = sorted(piece.states(), key=lambda s: s.site.layer or 0)
    site = states[0].site
    stacks = {next((w for w in s.site.name.split(".") if w in ("encoder", "decoder")), "") for s in states}
    if on is None and stacks != {""}:
        raise LuthierError("where PEFT puts a prefix follows from the kind of base: state the base (--base)")
    paired = on is not None and on.kind == "seq2seq"
    if paired and "encoder" in stacks:
        raise LuthierError("this prefix is in the encoder, where PEFT has none (the decoder alone): keep it as a delta")
    if len(states) != site.layers:
        raise LuthierError(
            f"this prefix is on {len(states)} of {site.layers} layers, PEFT's is on all: keep it as a delta"
        )
    width = site.kv_heads * site.head_dim
    rows = torch.zeros(form.length, 2 * len(states), width)
    filled: dict[int, Tensor] = {}
    for i, s in enumerate(states):
        pair: Any = form.extra(s)
        for slot, numbers in zip(_slots(i, len(states), paired), pair, strict=True):
            flat = numbers.transpose(0, 1).flatten(1).detach().float().cpu()  # [length, kv_heads · head_dim]
            if slot in filled and not torch.equal(filled[slot], flat):
                raise LuthierError(
                    f"{s.site.name}: PEFT gives layers i and i + {len(states) // 2} of an encoder-decoder the same prefix, and "
                    "these differ: keep it as a delta"
                )
            filled[slot] = rows[:, slot] = flat
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": form.length,
        "token_dim": width,
        "num_attention_heads": site.kv_heads,
        "num_layers": site.layers,
        "num_transformer_submodules": 2 if paired else 1,
        "prefix_projection": False,
        "encoder_hidden_size": width,
    }
    return config, {"prompt_embeddings": rows.flatten(1)}
