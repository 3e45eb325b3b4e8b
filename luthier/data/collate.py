"""Rows as tensors: padded on the right, or packed with segments that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from luthier.data.rows import Row


def pad_id_of(tokenizer: Any) -> int:
    """The id that fills up rows: the pad token, else the end token, else 0. It is masked and never carries loss."""
    found = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    return found[0] if found else 0


class Collate:
    """Turns lines of rows into one batch: a dict of tensors, and the rows' places under "where".

    input_ids, attention_mask, position_ids [B, T] long; weights [B, T] float: loss weight of predicting that token,
    0 at position 0, at padding and at the first token of every packed segment.
    segments [B, T] long (packed only): 1, 2, … by record, 0 at padding; positions restart with each segment. The model
    must be called with use_cache=False, and with `segment_mask` where it does not read the positions itself.
    target_ids, target_mask, weights [B, S] (seq2seq): the decoder's targets; position 0 is predicted too.
    labels [B] long, label_weights [B] float (classify).
    pairs (comparisons): B; then the tensors have 2B lines, the better answers first.
    """

    def __init__(self, pad_id: int, kind: str = "causal", packed: bool = False):
        self.pad_id, self.kind, self.packed = pad_id, kind, packed

    def __call__(self, lines: Sequence[Sequence[Row]], silent: bool = False) -> dict[str, Any]:
        rows = [row for line in lines for row in line]
        if self.kind == "pair":
            lines = [[r] for r in rows] + [[Row(second(r), weights_of(r), r.where)] for r in rows]
        batch: dict[str, Any] = padded(lines, self.pad_id)
        if not self.packed:
            del batch["segments"]
        if self.kind == "pair":
            batch["pairs"] = len(rows)
        if self.kind == "seq2seq":
            targets = padded([[Row(second(r), weights_of(r), r.where)] for r in rows], self.pad_id)
            batch |= {
                "target_ids": targets["input_ids"],
                "target_mask": targets["attention_mask"],
                "weights": targets["weights"],
            }
        if self.kind == "classify":
            batch["labels"] = torch.tensor([r.label for r in rows])
            batch["label_weights"] = torch.tensor([r.weight for r in rows])
        if silent:
            for name in ("weights", "label_weights"):
                if name in batch:
                    batch[name].zero_()
        batch["where"] = [] if silent else [r.where for r in rows]
        return batch


def second(row: Row) -> np.ndarray:
    assert row.second is not None, "a row of one side in a batch of two"
    return row.second


def weights_of(row: Row) -> np.ndarray:
    assert row.second_weights is not None, "a row of one side in a batch of two"
    return row.second_weights


def padded(lines: Sequence[Sequence[Row]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, weights, position_ids, segments [B, T], each line holding its rows one after the other."""
    width = max(sum(len(r.ids) for r in line) for line in lines)
    shape = (len(lines), width)
    ids = np.full(shape, pad_id, np.int64)
    mask, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    positions = np.zeros(shape, np.int64)
    for i, line in enumerate(lines):
        at = 0
        for number, row in enumerate(line, 1):
            to = at + len(row.ids)
            ids[i, at:to], weights[i, at:to] = row.ids, row.weights
            mask[i, at:to], segments[i, at:to] = 1, number
            positions[i, at:to] = np.arange(to - at)
            at = to
        positions[i, at:] = np.arange(width - at) if len(line) > 1 else np.arange(at, width)
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "weights": weights,
        "position_ids": positions,
        "segments": segments,
    }
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


def segment_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask [B, 1, T, T]: 0 where a token may look (earlier or itself, in its own segment), else the lowest
    number of the type. Padding looks only at itself, so that no row of the mask is closed all through. Floating point,
    because eager attention takes a boolean mask for numbers to add.
    """
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    open_ = (same & causal) | torch.eye(length, dtype=torch.bool, device=segments.device)
    mask = torch.zeros(segments.shape[0], 1, length, length, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~open_[:, None], torch.finfo(dtype).min)
