"""Places that are no module's output: extra keys and values of attention, extra embeddings before the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.attach import prompts
from luthier.attach.prefixes import place as place_keys_values

PLACES: dict[str, Callable[[Any, Any], None]] = {"keys-values": place_keys_values, "input": prompts.place}
"""A form's `at` -> what puts it there; each leaves an undo in the handle's `extras`."""


def remove(handle: Any, piece: str) -> None:
    """Takes a piece's extra inputs off the model."""
    for undo in handle.extras.pop(piece, []):
        undo()
