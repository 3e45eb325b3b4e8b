"""Keys and tensors of PEFT's adapter files: what reading and writing have in common."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from luthier.delta import Site
from luthier.errors import LuthierError

PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
TOKENS = "trainable_tokens_delta"
LORA = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
"""End of a key -> name of the number in the form."""


TASKS = {"causal": "CAUSAL_LM", "classify": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
"""Kind of a base -> PEFT's task_type."""
HEADS = ("classifier", "score")
"""Names of the modules that classify."""


def some(names: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def checked(folder: Path, site: Site, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A site's numbers in float32; another shape, whole numbers, and numbers that are not finite are errors."""
    if tuple(tensor.shape) != shape:
        raise LuthierError(
            f"{folder}: {site.name} {name} has shape {tuple(tensor.shape)}, this base and config ask for {shape}: "
            "another base, or a config that is not this adapter's"
        )
    if not tensor.is_floating_point():
        raise LuthierError(
            f"{folder}: {site.name} {name} is of type {str(tensor.dtype)[6:]}, which no training leaves: copy it again"
        )
    if not torch.isfinite(value := tensor.float()).all():
        raise LuthierError(f"{folder}: {site.name} {name} holds numbers that are not finite: the training broke down")
    return value
