"""Seeded draws that are the same on every machine and every Python version."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices from a text seed.

    Only ``Random.random`` is used, because Python promises its sequence across versions and promises nothing about
    ``choice``, ``sample`` or ``shuffle``.
    """

    __slots__ = ("real",)

    def __init__(self, seed: str) -> None:
        self.real = Random(seed).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self.real() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.real() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self.real() * len(items))]

    def some(self, items: Sequence[T], k: int) -> list[T]:
        """k different positions of items, in drawn order (k = len(items) shuffles)."""
        pool = list(items)
        n = len(pool)
        for i in range(k):
            j = i + int(self.real() * (n - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]
