"""Memory of a thread's own for what is at once thrown away."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Buffers of each thread's own, used again: fresh memory costs as much as the work that is done in it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        """n entries, whatever they hold; the thread's next call for `name` gives the same memory."""
        size = n * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8)
        return buffer[:size].view(dtype)
