"""Places that are no module's output: extra keys and values of attention, extra embeddings before the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PLACES: dict[str, Callable[[Any, Any], None]] = {}


def remove(handle: Any, piece: str) -> None:
    """Takes a piece's extra inputs off the model."""
    for undo in handle.extras.pop(piece, []):
        undo()
