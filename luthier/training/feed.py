"""From the data room's batches to what a model's forward takes, and to the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from luthier.bases.load import Base
from luthier.data.collate import segment_mask
from luthier.training.view import Batch


class Feed:
    """Endless steps of micro-batches that never cross an epoch; its place is saved and resumed."""

    def __init__(self, base: Base, batches: Any, accumulate: int, dtype: torch.dtype) -> None:
        self.base, self.batches, self.accumulate, self.dtype = base, batches, accumulate, dtype

    def __next__(self) -> Batch:
        return ready(next(self.batches), self.base, self.dtype)

    def step(self) -> list[Batch]:
        """The next step's micro-batches; the last step of an epoch may have fewer."""
        out: list[Batch] = []
        while len(out) < self.accumulate:
            out.append(next(self))
            if out[-1].get("last"):
                break
        return out

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


def ready(batch: Batch, base: Base, dtype: torch.dtype) -> Batch:
    """Adds what the base's forward needs: the mask of packed records, the decoder's shifted input."""
    if "segments" in batch:
        batch["mask_4d"] = segment_mask(batch["segments"], dtype)
    if base.kind == "seq2seq":
        batch["decoder_input_ids"] = base.model.prepare_decoder_input_ids_from_labels(batch["target_ids"])
    return batch


def all_ready(batches: Iterator[Batch], base: Base, dtype: torch.dtype) -> Iterator[Batch]:
    """`ready` over an iterator."""
    return (ready(batch, base, dtype) for batch in batches)
