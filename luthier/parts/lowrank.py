"""Low-rank products, never forming B·A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AddLowRank(torch.autograd.Function):
    """total + scale · x Aᵀ Bᵀ in one pass over `total`, in place: the sum is the only large thing written.

    Saved for the backward pass are x (which the base's own product keeps anyway) and x Aᵀ [n, r].
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        ctx.types = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        h = x2 @ a.t()
        total.view(-1, total.shape[-1]).addmm_(h, b.t(), alpha=scale)
        ctx.save_for_backward(x, h, a, b)
        ctx.scale = scale
        ctx.mark_dirty(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, h, a, b = ctx.saved_tensors
        g2 = grad.reshape(-1, grad.shape[-1])
        gb = (g2 @ b).mul_(ctx.scale)
        grad_b = (h.t() @ g2).mul_(ctx.scale).to(ctx.types[1]).t() if ctx.needs_input_grad[3] else None
        grad_a = (gb.t() @ x.reshape(-1, x.shape[-1])).to(ctx.types[0]) if ctx.needs_input_grad[2] else None
        grad_x = (gb @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_a, grad_b, None


def add_lowrank(total: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """total [..., out] + scale · x [..., in] Aᵀ [in, r] Bᵀ [r, out]. `total` may be overwritten; use the result.

    A and B are cast to x's type. Works where `total` is a leaf, a view or needed elsewhere only out of place: then,
    without gradients, and under torch.compile, which fuses by itself, the plain product is taken.
    """
    if torch.compiler.is_compiling():
        return torch.add(total, (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t(), alpha=scale)
    safe = total.is_contiguous() and not total.is_leaf and not total._is_view() and total.dtype == x.dtype
    if torch.is_grad_enabled() and safe:
        return _AddLowRank.apply(total, x, a, b, scale)  # pyright: ignore[reportReturnType]
    return torch.add(total, (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t(), alpha=scale)


def row_norms(w: Tensor, w2: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖w_i + scale · b_i a‖ for every row i, [out] in float32, without forming B A.

    w [out, in], w2 [out] its squared row norms, a [r, in], b [out, r]. Rows where the two terms nearly cancel (the sum
    below a hundredth of the terms) lose their digits in the Gram sum and are taken directly. On a device b a is formed
    after all, 4096 rows at a time: which rows cancel could not be asked without waiting for it. Nor could a traced tensor,
    which has no values.
    """
    a, b = a.float(), b.float()
    if w.device.type != "cpu" or hasattr(w, "fake_mode"):
        rows = zip(w.split(4096), w2.split(4096), b.split(4096), strict=True)
        return torch.cat([_squared(part.float(), had, scale * (own @ a)) for part, had, own in rows]).sqrt()
    cross = torch.cat([part.float() @ a.t() for part in w.split(4096)])
    own = ((b @ (a @ a.t())) * b).sum(1) * scale**2
    squared = w2 + 2 * scale * (cross * b).sum(1) + own
    near = (squared < 0.01 * (w2 + own)).nonzero()[:, 0]
    if len(near):
        direct = (w[near].float() + scale * (b[near] @ a)).square().sum(1)
        squared = squared.index_copy(0, near, direct)
    return squared.clamp_min(0).sqrt()


def _squared(w: Tensor, w2: Tensor, change: Tensor) -> Tensor:
    """‖w_i + change_i‖² [n], exactly w2 without a change."""
    squared = w2 + (change * (2 * w + change)).sum(1)
    near = squared < 0.01 * (w2 + change.square().sum(1))
    return torch.where(near, (w + change).square().sum(1), squared)
