"""Numbers of a few bits, packed: signs, small codes, and sorted positions in Golomb codes. Exact both ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_WEIGHTS = 1 << torch.arange(8)
_BITS = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()  # [256, 8], lowest bit first
TWO_OF_FOUR = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
"""The six ways to keep two of four, by number."""


def pack_bits(bits: Tensor) -> Tensor:
    """[..., n] of zeros and ones (or booleans) to uint8 [..., ceil(n / 8)], lowest bit first, the last byte filled up with zeros."""
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    return (padded.unflatten(-1, (-1, 8)) * _WEIGHTS.to(bits.device, torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The first n bits of every row, as float32 zeros and ones [..., n]."""
    return F.embedding(packed.int(), _BITS.to(packed.device)).flatten(-2)[..., :n]


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """As `unpack_bits`, with −1 for 0."""
    return F.embedding(packed.int(), 2 * _BITS.to(packed.device) - 1).flatten(-2)[..., :n]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers in [0, 2^bits) of shape [r, n] to bit planes, uint8 [bits, r, ceil(n / 8)]: `bits` bits each, for any number."""
    return torch.stack([pack_bits((codes >> k) & 1) for k in range(bits)])


def unpack_codes(planes: Tensor, n: int) -> Tensor:
    """Float32 [r, n] of what `pack_codes` packed."""
    out = unpack_bits(planes[0], n)
    for k in range(1, planes.shape[0]):
        out = out.add_(unpack_bits(planes[k], n), alpha=2**k)
    return out


def pack_sixths(numbers: Tensor) -> Tensor:
    """Integers 0 … 5 of shape [r, n] to uint8 [r, ceil(n / 3)]: three in a byte, 2.67 bits each where 2.58 are needed."""
    padded = F.pad(numbers.long(), (0, -numbers.shape[-1] % 3)).unflatten(-1, (-1, 3))
    return (padded * torch.tensor([1, 6, 36], device=numbers.device)).sum(-1).to(torch.uint8)


def unpack_sixths(packed: Tensor, n: int) -> Tensor:
    """Int64 [r, n] of what `pack_sixths` packed."""
    number = packed.long()
    return torch.stack([number % 6, number // 6 % 6, number // 36], -1).flatten(-2)[..., :n]


# -- sorted positions


def rice_parameter(count: int, total: int) -> int:
    """Low bits stored as they are, for `count` of `total` positions: Golomb's rule for geometric gaps, as a power of two."""
    share = count / max(total, 1)
    if not 0 < share < 1:
        return 0
    golden = math.log((math.sqrt(5) - 1) / 2)
    return max(0, 1 + math.floor(math.log2(golden / math.log1p(-share))))


def rice_encode(positions: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sorted distinct positions [k] in [0, total) as Golomb codes of their gaps, (unary, low), both uint8.

    The divisor is 2^b with b = rice_parameter(k, total). A gap's quotient is that many zero bits and a one in `unary`;
    its low b bits stand in `low`. Kept apart, both decode without a loop; together they take a code's usual length.
    Source: Golomb 1966, Rice 1979.
    """
    b = rice_parameter(len(positions), total)
    gaps = positions.long().diff(prepend=positions.new_full((1,), -1, dtype=torch.int64)) - 1
    ends = (gaps >> b).add_(1).cumsum(0) - 1
    bits = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.uint8)
    bits[ends] = 1
    low = ((gaps[:, None] >> torch.arange(b)) & 1).flatten() if b else bits[:0]
    return pack_bits(bits), pack_bits(low)


def rice_decode(unary: Tensor, low: Tensor, count: int, total: int) -> Tensor:
    """Int64 positions [count] of what `rice_encode` coded."""
    b = rice_parameter(count, total)
    ends = _ones(unary)[:count]
    gaps = ends.diff(prepend=ends.new_full((1,), -1)).sub_(1) << b
    if b:
        bits = F.embedding(low.int(), _BITS).flatten()[: count * b].view(count, b).long()
        gaps = gaps + (bits << torch.arange(b)).sum(1)
    return gaps.add_(1).cumsum(0) - 1


def _ones(packed: Tensor) -> Tensor:
    return (F.embedding(packed.int(), _BITS).flatten() > 0).nonzero()[:, 0]


def entropy(density: float) -> float:
    """Bits a position needs on average where a share `density` is taken: H(k), without the signs."""
    k = density
    return 0.0 if k <= 0 or k >= 1 else -(k * math.log2(k) + (1 - k) * math.log2(1 - k))


def sums_of_eight(x: Tensor) -> Tensor:
    """[ceil(columns / 8) · 256, n] for x [n, columns]: row 256 g + b is the sum of the g-th eight inputs with b's bits as signs."""
    groups = F.pad(x, (0, -x.shape[1] % 8)).unflatten(1, (-1, 8))
    return torch.einsum("nge,be->gbn", groups, 2 * _BITS.to(x.device) - 1).flatten(0, 1)
