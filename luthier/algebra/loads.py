"""What goes through a merge: jobs, their inputs in memory, and the memory itself, used again and bounded."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from luthier.algebra.layout import Item
from luthier.delta import Merge
from luthier.parts.bits import INTEGER
from luthier.parts.spread import spans

PIECE = 1 << 20
"""Entries of a flat piece of a tensor, where tensors are read or merged in pieces."""
LARGE = 4 << 20
"""Bytes from which a buffer is given large pages."""
LOOK = 1 << 18
"""Entries looked at together: a copy of their bits stays in cache."""


class Tokens(Protocol):
    """Rows of tokens made one vocabulary."""

    def align(self, name: str, tensors: Sequence[Tensor], models: Sequence[int]) -> list[Tensor]:
        """A table of several models (by their place in the plan), each with one row for every token of the result."""
        ...


@dataclass
class Job:
    """One tensor and how it is merged."""

    item: Item
    merge: Merge | None
    """None copies what all models agree on: integers."""
    arithmetic: torch.dtype
    written: torch.dtype
    shape: tuple[int, ...]
    """Of the result."""
    each: Mapping[str, list[float]]
    base: int | None = None
    """Place of the base among the inputs, where the merge wants it apart."""
    tokens: Tokens | None = None

    @property
    def size(self) -> int:
        """Entries of the result."""
        return math.prod(self.shape)

    @property
    def in_pieces(self) -> bool:
        """Whether flat pieces of it are merged one by one."""
        merge = self.merge
        return (
            merge is not None
            and type(merge).pointwise
            and self.tokens is None
            and not merge.looks
            and self.size > PIECE
        )


@dataclass
class Load:
    """A job's inputs, whole or one flat piece of each."""

    job: Job
    tensors: list[Tensor]
    buffers: list[Tensor]
    """Where the tensors lie, to be used again."""
    nbytes: int
    first: bool
    """Whether it is the job's first piece."""
    number: int = 0
    """Its place in the order of reading."""


class Budget:
    """Bytes alive at once; whoever wants more waits, but one holder is always let in."""

    def __init__(self, most: int) -> None:
        self.most, self._now, self._stopped, self._changed = most, 0, False, threading.Condition()

    def take(self, nbytes: int) -> None:
        """Waits until so many bytes may be held."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._now == 0 or self._now + nbytes <= self.most)
            self._now += nbytes

    def give(self, nbytes: int) -> None:
        """Gives them back."""
        with self._changed:
            self._now -= nbytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Pool:
    """Buffers used again: the system takes as long to hand out fresh memory as the copy into it takes."""

    def __init__(self, most: int) -> None:
        """most: bytes kept; of more, the sizes that were asked for longest ago are given up."""
        self.most, self._size, self._lock = most, 0, threading.Lock()
        self._free: dict[int, list[Tensor]] = {}

    def get(self, nbytes: int) -> Tensor:
        """A flat tensor of bytes."""
        with self._lock:
            kept = self._free.pop(nbytes, [])
            self._free[nbytes] = kept  # now the latest
            if kept:
                self._size -= nbytes
                return kept.pop()
        return fresh(nbytes)

    def like(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """A contiguous tensor of the same shape and type, its numbers yet to be written, and the buffer it lies in."""
        buffer = self.get(nbytes_of(tensor))
        return buffer.view(tensor.dtype).view(tensor.shape), buffer

    def put(self, buffers: Sequence[Tensor]) -> None:
        """Takes buffers back."""
        with self._lock:
            for buffer in buffers:
                size = buffer.numel()
                if size > self.most:
                    continue
                while self._size + size > self.most:
                    oldest = next(iter(self._free))
                    self._size -= oldest * len(self._free.pop(oldest))
                self._free.setdefault(size, []).append(buffer)
                self._size += size

    def clear(self) -> None:
        """Keeps nothing."""
        with self._lock:
            self._free.clear()
            self._size = 0


def fresh(nbytes: int) -> Tensor:
    """A flat tensor of bytes in memory not used before; in large pages where the system has them, else each small one
    is handed out, and cleared, by itself."""
    if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without them
        pass
    return torch.frombuffer(block, dtype=torch.uint8)


def nbytes_of(tensor: Tensor) -> int:
    """Bytes of its numbers."""
    return tensor.numel() * tensor.element_size()


def finite(tensor: Tensor) -> bool:
    """Whether no entry of a contiguous tensor is NaN or infinite.

    Of 16-bit types the largest exponent tells, of wider ones a sum: every entry is asked only where that is not finite.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    kind = tensor.dtype
    if kind.itemsize == 2:
        bits = tensor.reshape(-1).view(INTEGER[kind])
        limit = int(torch.tensor(math.inf, dtype=kind).view(INTEGER[kind]))
        return all(int(bits[a:b].bitwise_and(0x7FFF).max()) < limit for a, b in spans(len(bits), LOOK))
    if kind.itemsize == 1:
        tensor = tensor.float()
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
