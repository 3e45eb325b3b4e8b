"""Names in memory and names on disk: transformers fuses and renames some tensors while loading (experts, mostly)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def to_checkpoint(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in memory -> the same numbers under the checkpoint's names, fused experts taken apart.

    A fused tensor goes in whole, with every part that the checkpoint keeps apart. Other names stay as they are.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def checkpoint_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Parameter name in memory -> its names in a checkpoint: itself, another one, or one for each expert and part."""
    empty = {name: torch.empty_like(value, device="meta") for name, value in model.named_parameters()}
    return {name: tuple(to_checkpoint(model, {name: value})) for name, value in empty.items()}
