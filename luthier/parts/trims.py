"""Which entries of a large tensor are among the k largest, exactly, without sorting it, in pieces that stay in cache."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.parts.spread import SPAN, Over, alone, spans

__all__ = ["SMALL", "SPAN", "Band", "Chunk", "band", "kth", "spans", "wide"]

SMALL = 1 << 20
"""Up to so many entries, those that tie at a limit are told apart by torch's own sort; above, of those at the lower limit
the last are kept, of those at the upper one the first."""

Chunk = Callable[[int, int], Tensor]
"""Entries a to b of a flat tensor, on demand: (a, b) -> [b − a]. What it gives may be overwritten by the next call."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in: float32 for 16-bit types, else the type itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _bits(x: Tensor) -> Tensor:
    """|x| as integers of the same order: 16-bit types in 16 bits, others as float32 in 32."""
    if x.dtype.itemsize > 4:
        x = x.float()
    if x.dtype.itemsize == 2:
        return x.view(torch.int16).bitwise_and(0x7FFF)
    return x.view(torch.int32).bitwise_and(0x7FFFFFFF)


def _tally(chunk: Chunk, n: int, keys: list[Callable[[Tensor], Tensor]], bins: int, over: Over) -> list[Tensor]:
    """For every key, from bit patterns to bins, how many of the n entries fall into each bin, int64 [bins]."""
    totals, lock = [torch.zeros(bins, dtype=torch.int64) for _ in keys], threading.Lock()

    def work(a: int, b: int) -> None:
        bits = _bits(chunk(a, b))
        counts = [torch.bincount(key(bits), minlength=bins) for key in keys]
        with lock:
            for total, count in zip(totals, counts, strict=True):
                total += count

    over(n, work, SPAN)  # pieces of more entries than there are bins: adding up the counts is the smaller part
    return totals


def kth(chunk: Chunk, n: int, ranks: list[int], over: Over = alone) -> list[tuple[int, int, int]]:
    """The magnitudes at the given ranks (0 the smallest) among n entries.

    Each as (bits, below, equal): the bit pattern of |x| (of float32 for wider types), how many entries are smaller
    and how many equal. One pass counts the upper 16 bits, for 32-bit types a second one counts the lower 15 bits in
    the bucket that holds the rank. Exact; n must be positive.
    """
    shift, bins = (0, 1 << 15) if chunk(0, 1).dtype.itemsize == 2 else (15, 1 << 16)
    (counts,) = _tally(chunk, n, [lambda bits: bits.bitwise_right_shift(shift) if shift else bits], bins, over)
    upto = counts.cumsum(0)
    buckets = [int(torch.searchsorted(upto, rank, right=True)) for rank in ranks]
    if not shift:
        return [(k, int(upto[k] - counts[k]), int(counts[k])) for k in buckets]
    size, distinct = 1 << shift, list(dict.fromkeys(buckets))

    def within(k: int) -> Callable[[Tensor], Tensor]:
        return lambda bits: bits.sub(k * size - 1).clamp_(0, size + 1)  # bins 0 and size + 1 hold what lies outside

    inside = dict(zip(distinct, _tally(chunk, n, [within(k) for k in distinct], size + 2, over), strict=True))
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
    since: int = 0
    """Of the entries equal to `low`, those before this place fall out."""
    until: int = sys.maxsize
    """Of the entries equal to `high`, those from this place on fall out."""
    listed: Tensor | None = None
    """Flags of all entries [n], where a sort has decided."""

    def apply(self, a: int, d: Tensor) -> Tensor:
        """Sets the entries of d (a flat piece that starts at entry a) to 0 in place, but for those in the band."""
        n = d.numel()
        if self.listed is not None:
            return d.mul_(self.listed[a : a + n])
        cuts = {0, n, *(min(max(place - a, 0), n) for place in (self.since, self.until))}
        for i, j in itertools.pairwise(sorted(cuts)):
            _zero_outside(d[i:j], self.low + (a + i < self.since), self.high - (a + i >= self.until))
        return d


def _zero_outside(d: Tensor, low: int, high: int) -> None:
    """Multiplies by 0 and 1 as integers of d's width, which is the fastest of ways."""
    bits = _bits(d)
    if d.dtype.itemsize != bits.dtype.itemsize:
        d.mul_(bits.ge(low).logical_and_(bits.le(high)))
        return
    raw = d.view(bits.dtype)
    if high < torch.iinfo(bits.dtype).max:
        raw.mul_(bits.clone().le_(high))
    raw.mul_(bits.ge_(low))


def _behind(chunk: Chunk, n: int, key: int, count: int) -> int:
    """The place behind the entry that is the `count`-th with the bit pattern `key`; 0 for none."""
    if not count:
        return 0
    for a, b in spans(n):
        tied = _bits(chunk(a, b)) == key
        here = int(tied.count_nonzero())
        if here >= count:
            return a + 1 + int(tied.nonzero()[count - 1, 0])
        count -= here
    return n


def band(chunk: Chunk, n: int, first: int, last: int, sort: Callable[[Tensor], Tensor], over: Over = alone) -> Band:
    """The band of ranks first … last − 1 of n entries given by `chunk`, 0 ≤ first < last ≤ n.

    sort: magnitudes [n] to the indices of the band; asked only where entries tie at a limit and n ≤ SMALL.
    """
    top = torch.iinfo(torch.int32).max
    (low, below, equal), *rest = kth(chunk, n, [first] if last == n else [first, last - 1], over)
    skip, high, take, same = first - below, top, 0, 0
    if rest:
        high, under, same = rest[0]
        take = last - under
    if (skip or take < same) and n <= SMALL:
        whole = torch.cat([chunk(a, b).abs() for a, b in spans(n)])
        flags = torch.zeros(n, dtype=whole.dtype)
        flags[sort(whole.float())] = 1
        return Band(low, high, listed=flags)
    until = _behind(chunk, n, high, take) if take < same else sys.maxsize
    return Band(low, high, _behind(chunk, n, low, skip), until)
