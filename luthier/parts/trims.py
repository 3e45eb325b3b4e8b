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
    and how many equal. One pass counts the upper 16 bits, for 32-bit types a second one looks into the bucket that
    holds the rank. Exact; n must be positive.
    """
    counts, shift = torch.zeros(1 << 16, dtype=torch.int64), 0
    for a, b in spans(n):
        bits, shift = _bits(chunk(a, b))
        counts += torch.bincount(bits.bitwise_right_shift_(shift) if shift else bits, minlength=1 << 16)
    upto = counts.cumsum(0)
    buckets = [int(torch.searchsorted(upto, rank, right=True)) for rank in ranks]
    if not shift:
        return [(k, int(upto[k] - counts[k]), int(counts[k])) for k in buckets]
    members: dict[int, list[Tensor]] = {k: [] for k in buckets}
    for a, b in spans(n):
        bits, _ = _bits(chunk(a, b))
        keys = bits.bitwise_right_shift(shift)
        for k, found in members.items():
            found.append(bits[keys == k])
    out = []
    for k, rank in zip(buckets, ranks, strict=True):
        inside, below = torch.cat(members[k]), int(upto[k] - counts[k])
        value = int(inside.kthvalue(rank - below + 1).values)
        out.append((value, below + int((inside < value).sum()), int((inside == value).sum())))
    return out


@dataclass
class Band:
    """Keeps the entries whose magnitudes rank from `first` to `last` (exclusive), 0 the smallest; exactly last − first.

    Entries that tie at either limit: see SMALL.
    """

    low: int
    high: int
    skip: int = 0
    """How many of the entries equal to `low` fall out, if not all of them stay."""
    take: int | None = None
    """How many of the entries equal to `high` stay; None for all."""
    listed: Tensor | None = None
    """Flags of all entries [n], where a sort has decided."""

    def apply(self, a: int, d: Tensor) -> Tensor:
        """Sets the entries of d (a piece that starts at entry a) to 0 in place, but for those in the band.

        Pieces have to come in order, from entry 0.
        """
        if a == 0:
            self._skipped, self._taken = 0, 0
        if self.listed is not None:
            return d.mul_(self.listed[a : a + d.numel()])
        bits, _ = _bits(d)
        high, drop = self.high, []
        if self._skipped < self.skip:
            tied = (bits == self.low).nonzero()[:, 0][: self.skip - self._skipped]
            self._skipped += len(tied)
            drop.append(tied)
        if self.take is not None and self._taken < self.take:
            tied = (bits == high).nonzero()[:, 0]
            drop.append(tied[self.take - self._taken :])
            self._taken += len(tied)
        elif self.take is not None:
            high -= 1
        if d.dtype.itemsize == bits.dtype.itemsize:  # zeroed through the integers: the fastest of ways
            raw = d.view(bits.dtype)
            if high < torch.iinfo(bits.dtype).max:
                raw.mul_(bits.clone().le_(high))
            raw.mul_(bits.ge_(self.low))
        else:
            d.mul_(bits.ge(self.low).logical_and_(bits.le(high)))
        for tied in drop:
            d[tied] = 0
        return d


def band(chunk: Chunk, n: int, first: int, last: int, sort: Callable[[Tensor], Tensor]) -> Band:
    """The band of ranks first … last − 1 of n entries given by `chunk`, 0 ≤ first < last ≤ n.

    sort: magnitudes [n] to the indices of the band; asked only where entries tie at a limit and n ≤ SMALL.
    """
    (low, below, equal), (high, under, same) = kth(chunk, n, [first, last - 1])
    skip, take = first - below, last - under
    if (skip or take < same) and n <= SMALL:
        whole = torch.cat([chunk(a, b).abs() for a, b in spans(n)])
        flags = torch.zeros(n, dtype=whole.dtype)
        flags[sort(whole.float())] = 1
        return Band(low, high, listed=flags)
    if low == high:
        take = skip + last - first
    top = torch.iinfo(torch.int32).max
    return Band(low, high if last < n else top, skip, take if take < same else None)
