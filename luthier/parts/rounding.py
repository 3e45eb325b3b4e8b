"""Rounding to a few bits, alone and with the errors made good by the columns still to come (optimal brain surgery)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from luthier.errors import LuthierError

_SHRINK = tuple(0.15 + 0.05 * k for k in range(18))


def levels(bits: int) -> float:
    """Half the range of codes: code c in [0, 2^bits) stands for (c − levels) · step, symmetric and without a zero."""
    return (2**bits - 1) / 2


def to_codes(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """Nearest codes, int64 of w's shape; `step` broadcasts."""
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return torch.round(w / safe + levels(bits)).clamp(0, 2**bits - 1).long()


def from_codes(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """What the codes stand for, float32."""
    return (codes.float() - levels(bits)) * step


def best_step(w: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """Step [r, 1] of every row of w [r, n] with the least squared error, among 18 shares of the row's largest entry.

    mask [r, n]: only these entries count.
    """
    w = w if mask is None else w * mask
    top = w.abs().amax(1, keepdim=True) / levels(bits) if bits > 1 else None
    if top is None:  # one bit: ± mean, which is the optimum
        count = mask.sum(1, keepdim=True).clamp_min(1) if mask is not None else w.shape[1]
        return w.abs().sum(1, keepdim=True) / count * 2
    best, least = top, torch.full_like(top, torch.inf)
    for share in _SHRINK:
        step = top * share
        off = (from_codes(to_codes(w, step, bits), step, bits) - w).square()
        error = (off if mask is None else off * mask).sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def power_of_two(size: Tensor) -> Tensor:
    """The power of two next to a positive size, 1 for 0: numbers divided by it fit float16 and come back exactly."""
    return torch.where(size > 0, torch.exp2(torch.log2(size.clamp_min(1e-30)).round()), torch.ones_like(size))


def hessian(x: Tensor | None, width: int, damp: float = 0.01) -> Tensor:
    """XᵀX / N + damp · its mean diagonal, [width, width] in float32 on the CPU, wherever x is; where there are no
    inputs x [N, width], or only zeros, the unit matrix's diagonal. Raises LuthierError for inputs that are not finite."""
    if x is None or not len(x):
        return torch.ones(width)
    h = (x.float().t() @ x.float() / max(1, len(x))).cpu()
    mean = h.diagonal().mean()
    if not torch.isfinite(mean):
        raise LuthierError("calibration: a matrix's inputs are not finite: the base is broken, or its type too narrow")
    if mean == 0:
        return torch.ones(width)
    return h + torch.eye(width) * (damp * mean)


def inverse_factor(h: Tensor) -> Tensor:
    """Upper Cholesky factor of H⁻¹; more damping is added until H can be inverted."""
    damp, mean = 0.0, float(h.diagonal().mean())
    for _ in range(8):
        lower, bad = torch.linalg.cholesky_ex(h + torch.eye(len(h)) * damp)
        if not bad:
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bad and bool(torch.isfinite(upper).all()):
                return upper
        damp = max(damp * 10, 1e-4 * mean)
    return torch.eye(len(h)) / max(mean, 1e-12) ** 0.5


def surgeon(w: Tensor, h: Tensor, column: Callable[[int, Tensor, Tensor], Tensor], block: int = 128) -> Tensor:
    """W rounded column by column, each column's error spread over those to come so that (W − Ŵ) H (W − Ŵ)ᵀ stays small.

    w [d_out, d_in] and h [d_in, d_in], or its diagonal where that is all. column(j, w, d) gives the rounded column [d_out] from the weights as they are
    now (up to date to the end of j's block of `block` columns); d [d_in] is the diagonal of the upper Cholesky factor
    of H⁻¹, so that (w_j / d_j)² is what setting w_j to zero costs. With H a multiple of the unit matrix this is plain
    rounding. Source: Frantar et al. 2022 (GPTQ), after Hassibi & Stork 1993 (OBS).
    """
    w = w.clone()
    alone = h.dim() == 1  # then no column can make good another's error
    upper = h if alone else inverse_factor(h)
    diagonal = h.clamp_min(1e-30).rsqrt() if alone else upper.diagonal()
    out = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.empty(w.shape[0], stop - start)
        for j in range(start, stop):
            out[:, j] = column(j, w, diagonal)
            if alone:
                continue
            error = (w[:, j] - out[:, j]) / upper[j, j]
            w[:, j:stop].addr_(error, upper[j, j:stop], alpha=-1)
            errors[:, j - start] = error
        if stop < w.shape[1] and not alone:
            w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return out


def round_groups(
    w: Tensor, h: Tensor, ranks: Sequence[int], bits: Sequence[int], across: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """w [r, n], whose rows are directions, or, `across`, [n, r] with directions as columns, rounded by `surgeon` under h,
    each of ranks[k] directions in bits[k] bits with a step of its own that float16 holds.

    Gives what was rounded, and of every group the codes [ranks[k], n] int64 and the steps [ranks[k]].
    """
    widths = torch.repeat_interleave(torch.tensor(bits[: len(ranks)]), torch.tensor(ranks))
    lines, half = w.t() if across else w, (2.0**widths - 1) / 2
    parts = zip(lines.split(list(ranks)), bits, strict=True)
    steps = [best_step(p, b).half().float()[:, 0] if len(p) else p.new_zeros(0) for p, b in parts]
    step, codes = torch.cat(steps), torch.zeros(lines.shape, dtype=torch.int64)

    def column(j: int, now: Tensor, d: Tensor) -> Tensor:
        if across:  # one direction, all its entries
            codes[j] = to_codes(now[:, j], step[j], int(widths[j]))
            return from_codes(codes[j], step[j], int(widths[j]))
        codes[:, j] = torch.minimum((now[:, j] / step + half).round().clamp_min(0), 2 * half).long()
        return (codes[:, j] - half) * step

    return surgeon(w, h, column), list(codes.split(list(ranks))), steps
