"""Singular values and vectors of large matrices, only as many as are wanted: randomised subspace iteration that goes on
until it has converged, and the trimming of a product of two thin factors that is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 4
"""A decomposition is randomised where no more than 1/FEW of all directions are wanted; else it is a full one."""


def truncated_svd(
    m: Tensor,
    rank: int,
    *,
    oversample: int | None = None,
    tolerance: float = 1e-4,
    passes: int = 12,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values of m [d_out, d_in] with their vectors: U [d_out, r], S [r], Vh [r, d_in].

    In float32 (float64 stays). Halko, Martinsson and Tropp 2011: a random subspace of rank + oversample directions
    (default rank / 2, at least 16), multiplied by m and mᵀ in turn, orthonormal after each pass, until the squared
    norm that it captures grows by less than `tolerance` of itself, or after `passes`. U S Vh then captures the energy
    that the best matrix of that rank does, short of about that share. Wide wants are decomposed in full.
    generator: of the start; default one of seed 0, so that the same matrix gives the same factors.
    """
    m = m if m.dtype == torch.float64 else m.float()
    short = min(m.shape)
    rank = min(rank, short)
    width = min(rank + (max(16, rank // 2) if oversample is None else oversample), short)
    if width * FEW > short:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    g = generator or torch.Generator().manual_seed(0)
    v = torch.randn(m.shape[1], width, generator=g, dtype=m.dtype).to(m.device)
    q, before = m.new_zeros(0), 0.0
    for _ in range(passes):
        q, _ = torch.linalg.qr(m @ v)
        back = m.t() @ q
        captured = float(_top(back, rank))
        v, _ = torch.linalg.qr(back)
        if captured - before <= tolerance * captured:
            break
        before = captured
    q, _ = torch.linalg.qr(m @ v)
    u, s, vh = torch.linalg.svd(q.t() @ m, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vh[:rank]


def _top(back: Tensor, rank: int) -> Tensor:
    """Sum of the largest `rank` squared singular values of a thin matrix [n, width], by its Gram matrix."""
    return torch.linalg.eigvalsh(back.t() @ back)[-rank:].clamp_min(0).sum()


def svd_to(
    m: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh as `truncated_svd`, with as many directions as are asked for: the smallest number that meets the wish.

    energy: share of the squared Frobenius norm that has to be kept, in (0, 1]. ratio: values below ratio · the largest
    are left out. rank: an upper bound, or the number itself where nothing else is asked. At least one direction.
    """
    short = min(m.shape)
    most = short if rank is None else min(rank, short)
    if energy is None and ratio is None:
        return truncated_svd(m, most, generator=generator)
    total = float(m.float().square().sum())
    take = min(most, max(8, short // 64))
    while True:
        u, s, vh = truncated_svd(m, take, generator=generator)
        if take == most or enough(s, energy, ratio, total) < take:
            keep = min(enough(s, energy, ratio, total), most)
            return u[:, :keep], s[:keep], vh[:keep]
        take = min(take * 2, most)


def enough(s: Tensor, energy: float | None, ratio: float | None, total: float | None = None) -> int:
    """How many of the sorted singular values s [n] meet the wish, n where none does; at least 1.

    total: the squared norm of the whole matrix, default that of s.
    """
    keep = len(s)
    if energy is not None:
        kept = s.double().square().cumsum(0)
        wanted = energy * (float(kept[-1]) if total is None else total)
        keep = min(keep, int((kept < wanted * (1 - 1e-9)).sum()) + 1)
    if ratio is not None:
        keep = min(keep, int((s >= ratio * s[0]).sum()))
    return max(1, keep)


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] with B A = U S Vh, the singular values shared evenly between them."""
    root = s.sqrt()
    return (root[..., :, None] * vh).contiguous(), (u * root[..., None, :]).contiguous()


def trimmed(
    a: Tensor, b: Tensor, *, rank: int | None = None, energy: float | None = None, ratio: float | None = None
) -> tuple[Tensor, Tensor]:
    """The best A' [r, d_in], B' [d_out, r] for b @ a, a [R, d_in] and b [d_out, R], without forming the product.

    QR of both factors and an SVD of the R x R core, in float64 (R is small): exact but for rounding, so that r = R gives
    the product back. Leading dimensions (experts) are worked through together; they then share one r.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    keep = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    if energy is not None or ratio is not None:
        keep = min(keep, max(enough(row, energy, ratio) for row in s.reshape(-1, s.shape[-1])))
    new_a, new_b = balanced(qb @ u[..., :keep], s[..., :keep], vh[..., :keep, :] @ qa.mT)
    return new_a.to(a.dtype), new_b.to(b.dtype)
