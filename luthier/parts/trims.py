"""Which entries of a large tensor are among the k largest, exactly, without sorting it, in pieces that stay in cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SPAN = 1 << 16
"""Entries worked on at a time: a few buffers of this many fit a core's second-level cache."""
SMALL = 1 << 20
"""Up to so many entries, those that tie at a limit are told apart by torch's own sort; above, the first ones are kept."""

Chunk = Callable[[int, int], Tensor]
"""Entries a to b of a flat tensor, on demand: (a, b) -> [b − a]. What it gives may be overwritten by the next call."""


def spans(n: int, size: int = SPAN) -> Iterator[tuple[int, int]]:
    """(0, size), (size, 2 size) … up to n."""
    for a in range(0, n, size):
        yield a, min(a + size, n)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in: float32 for 16-bit types, else the type itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _bits(x: Tensor) -> tuple[Tensor, int]:
    """|x| as integers of the same order, and how many low bits to leave out for a key of at most 16 bits."""
    if x.dtype.itemsize > 4:
        x = x.float()
    if x.dtype.itemsize == 2:
        return x.view(torch.int16).bitwise_and(0x7FFF), 0
    return x.view(torch.int32).bitwise_and(0x7FFFFFFF), 15


def kth(chunk: Chunk, n: int, ranks: list[int]) -> list[tuple[int, int, int]]:
    """The magnitudes at the given ranks (0 the smallest) among n entries.

    Each as (bits, below, equal): the bit pattern of |x| (of float32 for wider types), how many entries are smaller
    and how many equal. One pass counts the upper 16 bits, for 32-bit types a second one counts the lower 15 bits in
    the bucket that holds the rank. Exact; n must be positive.
    """
    counts, shift = torch.zeros(1 << 16, dtype=torch.int64), 0
    for a, b in spans(n):
        bits, shift = _bits(chunk(a, b))
        counts += torch.bincount(bits.bitwise_right_shift_(shift) if shift else bits, minlength=1 << 16)
    upto = counts.cumsum(0)
    buckets = [int(torch.searchsorted(upto, rank, right=True)) for rank in ranks]
    if not shift:
        return [(k, int(upto[k] - counts[k]), int(counts[k])) for k in buckets]
    size = 1 << shift
    inside = {k: torch.zeros(size + 2, dtype=torch.int64) for k in buckets}
    for a, b in spans(n):
        bits, _ = _bits(chunk(a, b))
        for k, found in inside.items():  # bins 0 and size + 1 hold what lies outside of the bucket
            found += torch.bincount(bits.sub(k * size - 1).clamp_(0, size + 1), minlength=size + 2)
    out = []
    for k, rank in zip(buckets, ranks, strict=True):
        below, fine = int(upto[k] - counts[k]), inside[k][1:-1]
        reach = fine.cumsum(0)
        j = int(torch.searchsorted(reach, rank - below, right=True))
        out.append((k * size + j, below + int(reach[j] - fine[j]), int(fine[j])))
    return out


@dataclass
class Band:
    """Keeps the entries whose magnitudes rank from `first` to `last` (exclusive), 0 the smallest; exactly last − first.

    Entries that tie at either limit: see SMALL.
    """

    low: int
    high: int
    skip: int = 0
    """How many of the entries equal to `low` fall out, the first ones, if not all of them stay."""
    take: int | None = None
    """How many of the entries equal to `high` stay, the first ones; None for all."""
    listed: Tensor | None = None
    """Flags of all entries [n], where a sort has decided."""

    def apply(self, a: int, d: Tensor) -> Tensor:
        """Sets the entries of d (a piece that starts at entry a) to 0 in place, but for those in the band.

        Pieces have to come in order, from entry 0.
        """
        if a == 0:
            self._skip, self._take = self.skip, self.take
        if self.listed is not None:
            return d.mul_(self.listed[a : a + d.numel()])
        bits, _ = _bits(d)
        low, high, dropped = self.low, self.high, None
        if self._skip:
            tied = torch.eq(bits, low, out=torch.empty_like(bits))
            count = int(tied.sum())
            if count <= self._skip:
                low += 1  # all that tie here fall out
                self._skip -= count
            else:
                dropped, self._skip = tied.nonzero()[: self._skip, 0], 0
        if self._take is not None:
            tied = torch.eq(bits, high, out=torch.empty_like(bits)) if self._take else None
            count = int(tied.sum()) if tied is not None else 1
            if tied is None:
                high -= 1
            elif count <= self._take:
                self._take -= count
            else:
                dropped, self._take = _join(dropped, tied.nonzero()[self._take :, 0]), 0
        _zero_outside(d, bits, low, high)
        if dropped is not None:
            d[dropped] = 0
        return d


def _join(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.cat([a, b])


def _zero_outside(d: Tensor, bits: Tensor, low: int, high: int) -> None:
    """Multiplies by 0 and 1 as integers of d's width, which is the fastest of ways; overwrites `bits`."""
    if d.dtype.itemsize != bits.dtype.itemsize:
        d.mul_(bits.ge(low).logical_and_(bits.le(high)))
        return
    raw = d.view(bits.dtype)
    if high < torch.iinfo(bits.dtype).max:
        raw.mul_(bits.clone().le_(high))
    raw.mul_(bits.ge_(low))


def band(chunk: Chunk, n: int, first: int, last: int, sort: Callable[[Tensor], Tensor]) -> Band:
    """The band of ranks first … last − 1 of n entries given by `chunk`, 0 ≤ first < last ≤ n.

    sort: magnitudes [n] to the indices of the band; asked only where entries tie at a limit and n ≤ SMALL.
    """
    top = torch.iinfo(torch.int32).max
    (low, below, equal), *rest = kth(chunk, n, [first] if last == n else [first, last - 1])
    skip, high, take, same = first - below, top, 0, 0
    if rest:
        high, under, same = rest[0]
        take = last - under
    if (skip or take < same) and n <= SMALL:
        whole = torch.cat([chunk(a, b).abs() for a, b in spans(n)])
        flags = torch.zeros(n, dtype=whole.dtype)
        flags[sort(whole.float())] = 1
        return Band(low, high, listed=flags)
    if low == high:  # both limits cut through the same ties: the first fall out, those after them stay
        take = skip + last - first
    return Band(low, high, skip, take if take < same else None)
