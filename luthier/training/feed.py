"""From the data room's batches to what a model's forward takes, and to the micro-batches of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from luthier.bases.load import Base
from luthier.data.collate import segment_mask
from luthier.training.view import Batch, block_of

CPU_TOKENS = 2048
"""Positions in one forward pass on a CPU, where larger products are hardly faster: activations stay small."""


ROW_KEYS = ("input_ids", "weights", "position_ids", "segments", "token_type_ids", "attention_mask")
TARGET_KEYS = ("target_ids", "weights", "target_mask")
"""Tensors that are as long as the rows of their mask; the mask itself comes last."""


class Feed:
    """Endless steps of micro-batches that never cross an epoch; its place is saved and resumed.

    `at_once`: positions of one forward pass; batches with more are cut into parts of whole rows, which give the same
    sums. None leaves batches whole.
    """

    def __init__(
        self, base: Base, batches: Any, accumulate: int, dtype: torch.dtype, at_once: int | None = None
    ) -> None:
        self.base, self.batches, self.accumulate, self.dtype, self.at_once = base, batches, accumulate, dtype, at_once

    def __next__(self) -> Batch:
        return ready(next(self.batches), self.base, self.dtype)

    def step(self) -> list[Batch]:
        """The next step's micro-batches, in parts; the last step of an epoch may have fewer."""
        out: list[Batch] = []
        for _ in range(self.accumulate):
            batch = next(self.batches)
            out += self.parts(batch)
            if batch.get("last"):
                break
        return out

    def parts(self, batch: Batch) -> list[Batch]:
        """A batch of the data room, as `micro_batches` gives it."""
        return micro_batches(batch, self.base, self.dtype, self.at_once)

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


def positions_at_once(stated: int | str | None, device: torch.device, sharded: bool) -> int | None:
    """What train.tokens_at_once means on a machine. Sharded models gather at each forward pass, so all take as many."""
    if sharded or stated is None:
        return None
    return stated if isinstance(stated, int) else CPU_TOKENS if device.type == "cpu" else None


def micro_batches(batch: Batch, base: Base, dtype: torch.dtype, at_once: int | None) -> list[Batch]:
    """A batch of the data room, ready, in parts of at most `at_once` positions (but at least one row)."""
    return [ready(part, base, dtype) for part in split(batch, at_once)]


def in_blocks(batch: Batch, block: int, room: int | None = None) -> Batch:
    """The batch of a decoder-only base padded on the right until its positions are a multiple of `block`, counting on from
    the last one; left as it is where that would take more than `room` positions."""
    rows, width = batch["input_ids"].shape
    more = -width % (block // math.gcd(rows, block))
    if not more or "target_ids" in batch or "labels" in batch or (room and width + more > room):
        return batch
    zero = ("attention_mask", "weights", "segments")
    last = {n: batch[n][:, -1:].expand(-1, more) for n in ROW_KEYS if n in batch}
    last |= {n: v * 0 for n, v in last.items() if n in zero}
    if (
        "position_ids" in last
    ):  # repeated ones would be taken for packed records, and lose the kernel for causal attention
        last["position_ids"] = last["position_ids"] + torch.arange(1, more + 1, device=batch["input_ids"].device)
    return batch | {n: torch.cat([batch[n], v], 1) for n, v in last.items()}


def split(batch: Batch, at_once: int | None) -> list[Batch]:
    """Whole rows of a batch in parts of at most `at_once` positions, each cut to its longest row.

    Sums over the parts are sums over the batch. Both rows of a comparison stay together.
    """
    rows, width = batch["input_ids"].shape
    if at_once is None or rows * width <= at_once or rows < 2:
        return [batch]
    if "pairs" in batch:
        return split_pairs(batch, max(1, at_once // (2 * width)))
    height = max(1, at_once // width)
    records = batch["segments"].amax(1).tolist() if "segments" in batch else [1] * rows
    out = []
    for at in range(0, rows, height):
        part = {k: v[at : at + height] if torch.is_tensor(v) else v for k, v in batch.items()}
        own = {"target_mask": TARGET_KEYS} if "target_mask" in part else {}
        for mask, names in ({"attention_mask": ROW_KEYS} | own).items():
            names = [n for n in names if n != "weights"] if mask == "attention_mask" and own else names
            if mask in part:
                width = part[mask].shape[1]
                longest = int(part[mask].sum(1).max())
                part |= {n: part[n][:, :longest] for n in names if n in part and part[n].shape[1] == width}
        if batch["where"]:
            part["where"] = batch["where"][sum(records[:at]) : sum(records[: at + height])]
        out.append(part)
    return out


def split_pairs(batch: Batch, height: int) -> list[Batch]:
    """Comparisons in parts of `height` pairs, each cut to its longest row."""
    pairs, out = batch["pairs"], []
    for at in range(0, pairs, height):
        here = torch.arange(at, min(at + height, pairs))
        part = {k: v[torch.cat([here, here + pairs])] if torch.is_tensor(v) else v for k, v in batch.items()}
        longest = int(part["attention_mask"].sum(1).max())
        part |= {n: part[n][:, :longest] for n in ROW_KEYS if n in part}
        out.append(part | {"pairs": len(here), "where": batch["where"][at : at + height]})
    return out


def records_of(batch: Batch) -> list[tuple[str, list[int]]]:
    """Where each record of a batch comes from, and its token ids."""
    if "segments" not in batch:
        lengths = batch["attention_mask"].sum(1).tolist()
        return [(w, batch["input_ids"][i, : lengths[i]].tolist()) for i, w in enumerate(batch["where"])]
    places = [(i, k) for i, most in enumerate(batch["segments"].amax(1).tolist()) for k in range(1, most + 1)]
    return [
        (w, batch["input_ids"][i][batch["segments"][i] == k].tolist())
        for w, (i, k) in zip(batch["where"], places, strict=False)
    ]


def ready(batch: Batch, base: Base, dtype: torch.dtype) -> Batch:
    """Adds what the base's forward needs: padding to whole blocks, the mask of packed records, the decoder's shifted input."""
    room = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    batch = in_blocks(batch, block_of(dtype, base.model.device), room)
    if "segments" in batch:
        # [B, 1, T, T]: made where it is read, not carried there.
        batch["mask_4d"] = segment_mask(batch["segments"].to(base.model.device), dtype)
    if base.kind == "seq2seq":
        batch["decoder_input_ids"] = base.model.prepare_decoder_input_ids_from_labels(batch["target_ids"])
    return batch


def all_ready(batches: Iterator[Batch], base: Base, dtype: torch.dtype) -> Iterator[Batch]:
    """`ready` over an iterator."""
    return (ready(batch, base, dtype) for batch in batches)
