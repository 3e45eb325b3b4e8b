"""Random masks in pieces, the same ones again as often as they are asked for, wherever a piece begins."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.parts.bits import INTEGER


class Draw:
    """A stream of random numbers of its own, split off a generator, that can be read at any place by any thread."""

    def __init__(self, generator: torch.Generator) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        self._stream, self._at, self._lock = np.random.PCG64(seed), 0, threading.Lock()

    def words(self, first: int, count: int) -> Any:
        """`count` random words from number `first` on, a NumPy array of uint64."""
        with self._lock:
            if first != self._at:
                self._stream.advance((first - self._at) % (1 << 128))
            self._at = first + count
            return self._stream.random_raw(count)

    def uniform(self, a: int, n: int) -> Tensor:
        """n numbers in [0, 1) for the entries from a on, float32 multiples of 2⁻²⁴."""
        first = a // 2
        halves = self.words(first, (a + n + 1) // 2 - first).view(np.uint32)[a % 2 :][:n]
        return torch.from_numpy((halves >> 8).astype(np.float32)).mul_(2**-24)


class Coin(Draw):
    """Keeps every entry with probability `density`, rounded to a multiple of 2⁻²⁴, independently.

    The binary digits of the density, from the last to the first, join (1) or cut (0) a word of flags with a word of
    fresh random bits: each step leaves every flag set with the probability that the digits so far spell out. A density
    of one half takes a single bit an entry, one that bfloat16 holds ten or so. The flags are kept, a bit an entry.
    """

    def __init__(self, density: float, generator: torch.Generator) -> None:
        super().__init__(generator)
        code = round(density * 2**24)
        self.sure = code == 1 << 24
        digits = [] if self.sure else [code >> i & 1 for i in range(24)]
        self.digits = digits[digits.index(1) :] if 1 in digits else []
        self._kept: dict[tuple[int, int], Any] = {}

    def flags(self, a: int, n: int) -> Tensor:
        """1 for those that stay of the n entries from number a on, else 0; uint8."""
        first = a // 64
        count = (a + n + 63) // 64 - first
        words = self._kept.get((first, count))
        if words is None:
            words = self._kept[first, count] = self._joined(first, count)
        return torch.from_numpy(np.unpackbits(words.view(np.uint8), bitorder="little")[a % 64 :][:n])

    def _joined(self, first: int, count: int) -> Any:
        each = len(self.digits)
        drawn = self.words(first * each, count * each).reshape(count, each)
        words = np.full(count, 2**64 - 1 if self.sure else 0, np.uint64)
        for digit, bits in zip(self.digits, drawn.T, strict=True):
            (np.bitwise_or if digit else np.bitwise_and)(words, bits, out=words)
        return words

    def apply(self, a: int, d: Tensor) -> Tensor:
        """Sets the dropped entries of d (a flat piece that starts at entry a) to 0 in place."""
        kind = INTEGER[d.dtype]
        d.view(kind).mul_(self.flags(a, d.numel()))
        return d
