"""Work on flat tensors in pieces that stay in cache, on as many cores as are to spare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

SPAN = 1 << 18
"""Entries worked on at a time: a few buffers of this many stay in cache, and the calls themselves cost next to nothing."""

T = TypeVar("T")


def spans(n: int, size: int = SPAN) -> Iterator[tuple[int, int]]:
    """(0, size), (size, 2 size) … up to n."""
    for a in range(0, n, size):
        yield a, min(a + size, n)


class Over(Protocol):
    """Has pieces of a flat tensor worked on, on one core or several."""

    def __call__(self, n: int, work: Callable[[int, int], T], size: int = SPAN) -> list[T]:
        """work(a, b) of every piece (0, size), (size, 2 size) … up to n; what it gives, in the order of the pieces.

        Pieces may be worked on at once and in any order: `work` writes to nothing that another piece reads or writes.
        """
        ...


def alone(n: int, work: Callable[[int, int], T], size: int = SPAN) -> list[T]:
    """One piece after the other, in the caller's thread."""
    return [work(a, b) for a, b in spans(n, size)]
