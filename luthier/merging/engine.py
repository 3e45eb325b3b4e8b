"""What task-vector merges share: changes thinned out, weighted, agreed on and added, in one pass in cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from luthier.delta import Merge, Stack
from luthier.errors import LuthierError
from luthier.parts.bits import INTEGER
from luthier.parts.scratch import Scratch
from luthier.parts.spread import SPAN, Over, spans
from luthier.parts.trims import Chunk, wide

NOTHING = 1e-8
"""A sum of weights below this is 0 and is not divided by."""


class Thin(Protocol):
    """Sets the entries of a change that fall out to 0."""

    def apply(self, a: int, d: Tensor) -> Tensor:
        """In place, for the flat piece d that starts at entry a; in any order, by any thread, as often as asked."""
        ...


class Nothing:
    """Drops everything."""

    def apply(self, a: int, d: Tensor) -> Tensor:
        return d.zero_()


def share(name: str, value: float, what: str = "density") -> float:
    """`value`, checked to lie in [0, 1]."""
    if not 0 <= value <= 1:
        raise LuthierError(f"{what} {value} at {name} is out of range: give a number from 0 to 1")
    return value


def fixed(value: float, dtype: torch.dtype) -> float:
    """A number as the type of the arithmetic holds it."""
    return float(torch.tensor(value, dtype=dtype))


def divisor(t: Stack, weights: Tensor, setting: str) -> Tensor:
    """The sum of the weights, checked not to be 0; `setting` is the one that asks for the division."""
    if float(total := weights.sum()) == 0:
        raise LuthierError(
            f"the weights {t.each['weight']} add up to 0 at {t.name}: change one, or set {setting}: false"
        )
    return total


def length(chunk: Chunk, n: int, dtype: torch.dtype) -> Tensor:
    """The Euclidean norm of n entries given in pieces, rounded once to `dtype`. A scalar tensor.

    16-bit entries are put side by side for torch's own norm, whose rounding mergekit's numbers have; others are summed wide.
    """
    if dtype.itemsize == 2:
        whole = torch.empty(n, dtype=dtype)
        for a, b in spans(n):
            whole[a:b] = chunk(a, b)
        return torch.linalg.vector_norm(whole)
    squares = sum(float(chunk(a, b).to(wide(dtype)).square().sum()) for a, b in spans(n))
    return torch.tensor(squares, dtype=torch.float64).sqrt().to(dtype)


def sizes(t: Stack, merged: Tensor) -> tuple[float, float]:
    """(‖Σ τᵢ‖₁, ‖τ‖₁): of the models' changes added up, and of the change that is the merged tensor's."""
    assert t.base is not None
    summed = apart = 0.0
    base, merged = t.base.reshape(-1), merged.reshape(-1)
    for a, b in spans(base.numel()):
        changes = [x.reshape(-1)[a:b].float() - base[a:b] for x in t.tensors]
        summed += float(sum(changes[1:], changes[0]).abs().sum())
        apart += float((merged[a:b].float() - base[a:b]).abs().sum())
    return summed, apart


def weighted_sum(t: Stack, normalize: bool) -> Tensor:
    """Σ wᵢ Wᵢ of the models themselves, over Σ wᵢ where `normalize`; summed in float32 (float64 stays), rounded once.

    Raises LuthierError where the weights to be divided by add up to 0.
    """
    models = [x.reshape(-1) for x in t.tensors]
    kind = wide(models[0].dtype)
    weights = torch.tensor(t.each["weight"], dtype=kind)
    total = divisor(t, weights, "normalize") if normalize else weights.sum()
    out = t.blank()
    flat = out.view(-1)

    def work(a: int, b: int) -> None:
        piece = torch.zeros(b - a, dtype=kind)
        for x, weight in zip(models, weights, strict=True):
            piece.addcmul_(x[a:b].to(kind), weight)
        flat[a:b] = piece.div_(total) if normalize else piece

    t.over(flat.numel(), work, SPAN)
    return out


@dataclass(frozen=True)
class TaskVectors(Merge):
    """W = W₀ + λ Σ wᵢ thin(Wᵢ − W₀), where the models' changes may first have to agree on a sign.

    Every operation is rounded to the type of the arithmetic, in the order of mergekit 0.1.5, so that its numbers are
    met also in 16 bits.
    """

    int8_mask: bool = False
    """Without effect, read for the field's files: masks take no type of their own here."""
    normalize: bool = False
    """Divide by the sum of the weights: of the models that agree where they have to, else of all."""
    rescale: bool = False
    """Multiply what is left of a change by a number that gives it back the absolute sum (L1) that it had."""
    lambda_: float = 1.0
    """λ: the whole change is multiplied by it."""

    each: ClassVar[Mapping[str, float | None]] = {"weight": 1.0, "density": 1.0}
    consensus: ClassVar[bool] = False
    """Whether, entry by entry, only changes with the sign of the weighted sum count (Yadav et al. 2023)."""
    base: ClassVar[Literal["needed", "optional", "unused"]] = "needed"

    def odd(self, each: Mapping[str, Sequence[float]]) -> str:
        weights = list(each["weight"])
        if self.normalize and abs(sum(weights)) < NOTHING:
            return f"the weights {weights} add up to 0, and nothing is divided by that: change one, or set normalize: false"
        if "density" in type(self).each and 0 in each["density"]:
            return "a density of 0 leaves nothing of that model: state more than 0, or leave the model out"
        return ""

    def thin(self, t: Stack, i: int, chunk: Chunk) -> Thin | None:
        """What thins out model i's change, given by `chunk` in flat pieces; None where it stays whole."""
        return None

    def scale(self, t: Stack, i: int) -> float | None:
        """What is left of model i's change is multiplied by this; None is what gives it back its absolute sum."""
        return None if self.rescale else 1.0

    def span(self, t: Stack) -> int:
        """Entries to be worked on at a time."""
        return SPAN

    def merge(self, t: Stack) -> Tensor:
        assert t.base is not None
        base, models, out = t.base.reshape(-1), [x.reshape(-1) for x in t.tensors], t.blank()
        dtype, n, flat = base.dtype, base.numel(), out.view(-1)
        span = self.span(t) if n else SPAN
        chunks = [_difference(x, base) for x in models]
        thins = [self.thin(t, i, chunk) if n else None for i, chunk in enumerate(chunks)]
        weights = [fixed(w, dtype) for w in t.each["weight"]]
        factors = [_multiplied(self, t, i, *row, span) for i, row in enumerate(zip(chunks, thins, strict=True))]
        own, mix = Scratch(), _agreed if self.consensus else _summed

        def work(a: int, b: int) -> None:
            parts = [_thinned(*row, a, b) for row in zip(chunks, thins, factors, strict=True)]
            mixed = mix(parts, weights, self.normalize, flat[a:b], own)
            if self.lambda_ != 1:
                mixed.mul_(self.lambda_)
            torch.add(base[a:b], mixed, out=mixed)

        t.over(n, work, span)
        return out


def _multiplied(m: TaskVectors, t: Stack, i: int, chunk: Chunk, thin: Thin | None, span: int) -> list[float]:
    """What is left of model i's change is multiplied by these, one after the other."""
    assert t.base is not None
    n, dtype = t.base.numel(), t.base.dtype
    scale = m.scale(t, i) if thin else 1.0
    if thin and scale is None:
        scale = _regained(thin, chunk, n, span, dtype, m.draws, t.over)
    return _factors(scale or 1.0, fixed(t.each["weight"][i], dtype), dtype)


def _thinned(chunk: Chunk, thin: Thin | None, factors: list[float], a: int, b: int) -> Tensor:
    """A piece of one model's change, thinned out and multiplied."""
    d = chunk(a, b)
    if thin:
        thin.apply(a, d)
    for factor in factors:
        d.mul_(factor)
    return d


def _factors(scale: float, weight: float, dtype: torch.dtype) -> list[float]:
    """What a change is multiplied by, one after the other, each product rounded; as few as give the same numbers.

    A power of two as weight rounds nothing where the type has float32's range of exponents, so that it joins the scale.
    """
    if abs(math.frexp(weight)[0]) == 0.5 and dtype != torch.float16:
        scale, weight = scale * weight, 1.0
    return [f for f in (scale, weight) if f != 1]


def _difference(x: Tensor, base: Tensor) -> Chunk:
    own = Scratch()
    return lambda a, b: torch.sub(x[a:b], base[a:b], out=own.get("difference", b - a, x.dtype))


def _sum(parts: list[Tensor], into: Tensor, own: Scratch) -> Tensor:
    """`into`: the sum in the order given, taken wide and rounded once."""
    total = own.get("sum", len(into), wide(into.dtype)).copy_(parts[0])
    for d in parts[1:]:
        total += d
    return into.copy_(total)


def _summed(parts: list[Tensor], weights: list[float], normalize: bool, mixed: Tensor, own: Scratch) -> Tensor:
    """`mixed`: the sum of the changes; divided by the sum of the weights where `normalize`, unless that is near 0."""
    _sum(parts, mixed, own)
    total = fixed(sum(weights), mixed.dtype)
    return mixed.div_(total) if normalize and abs(total) >= NOTHING else mixed


def _agreed(parts: list[Tensor], weights: list[float], normalize: bool, mixed: Tensor, own: Scratch) -> Tensor:
    """`mixed`: the sum of the changes whose sign is that of the sum (≥ 0 counts as plus); divided by the weights that
    took part where `normalize`.

    Signs are flipped and changes cut off through the integers of the same width, which takes a third of the time.
    Overwrites `parts`.
    """
    dtype, kind = mixed.dtype, INTEGER[mixed.dtype]
    sign = _sum(parts, own.get("sign", len(mixed), dtype), own).view(kind).bitwise_and_(torch.iinfo(kind).min)
    raw = [d.view(kind).bitwise_xor_(sign).clamp_min_(0) for d in parts]
    _sum(parts, mixed, own)
    if normalize:
        divisor = _shares(raw, weights, dtype)
        mixed.div_(divisor.add_(torch.eq(divisor, 0, out=torch.empty_like(divisor))))
    mixed.view(kind).bitwise_xor_(sign)
    return mixed


def _shares(raw: list[Tensor], weights: list[float], dtype: torch.dtype) -> Tensor:
    """Σ wᵢ over the models whose entry is not 0, taken wide and rounded once; overwrites `raw`."""
    if len(set(weights)) == 1:
        count = raw[0].gt_(0)
        for d in raw[1:]:
            count += d.gt_(0)
        return count.to(dtype).mul_(weights[0])
    shares = torch.zeros(raw[0].shape, dtype=wide(dtype))
    for d, weight in zip(raw, weights, strict=True):
        shares.add_(d.gt_(0).to(shares.dtype), alpha=weight)
    return shares.to(dtype)


def _regained(thin: Thin, chunk: Chunk, n: int, span: int, dtype: torch.dtype, drawn: bool, over: Over) -> float:
    """Σ|d| / Σ|thinned d|, as the type of the arithmetic holds it; 1 where either is next to nothing.

    Random masks are worked on in float32 where the type is float16.
    """
    own = Scratch()

    def size(d: Tensor) -> float:
        return float(own.get("wide", len(d), wide(dtype)).copy_(d).abs_().sum())

    def sizes(a: int, b: int) -> tuple[float, float]:
        d = chunk(a, b)
        return size(d), size(thin.apply(a, d))

    before, after = map(sum, zip(*over(n, sizes, span), strict=True))
    kind = torch.float32 if dtype == torch.float16 and (drawn or before >= 65504) else dtype
    before, after = fixed(before, kind), fixed(after, kind)
    return 1.0 if before < 1e-7 or after < 1e-7 else fixed(before / after, kind)
