"""Low-rank products, never forming B·A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AddLowRank(torch.autograd.Function):
    """total + scale · x Aᵀ Bᵀ in one pass over `total`, in place: the sum is the only large thing written.

    Saved for the backward pass are x (which the base's own product keeps anyway) and x Aᵀ [n, r]. With w, total is x wᵀ and
    outside the graph: x's gradient of both products is summed where it is made.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, w: Tensor | None) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        ctx.types = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        h = x2 @ a.t()
        total.view(-1, total.shape[-1]).addmm_(h, b.t(), alpha=scale)
        ctx.save_for_backward(x, h, a, b, w)
        ctx.scale = scale
        if w is None:
            ctx.mark_dirty(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, h, a, b, w = ctx.saved_tensors
        g2 = grad.reshape(-1, grad.shape[-1])
        gb = (g2 @ b).mul_(ctx.scale)
        grad_b = (h.t() @ g2).mul_(ctx.scale).to(ctx.types[1]).t() if ctx.needs_input_grad[3] else None
        grad_a = (gb.t() @ x.reshape(-1, x.shape[-1])).to(ctx.types[0]) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (gb @ a if w is None else (g2 @ w).addmm_(gb, a)).view_as(x)
        return grad if w is None else None, grad_x, grad_a, grad_b, None, None


def add_lowrank(total: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, w: Tensor | None = None) -> Tensor:
    """total [..., out] + scale · x [..., in] Aᵀ [in, r] Bᵀ [r, out]. `total` may be overwritten; use the result.

    A and B are cast to x's type. w [out, in]: a frozen weight whose product with x `total` is, but for a constant, and which
    nobody else reads: `total` is then taken out of the graph, and x's gradients of both products are made as one. Without w,
    where `total` is a leaf or a view, without gradients, and under torch.compile, which fuses by itself, the plain product is
    taken.
    """
    if torch.compiler.is_compiling():
        return torch.add(total, (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t(), alpha=scale)
    if torch.is_grad_enabled() and total.is_contiguous() and total.dtype == x.dtype:
        if w is not None and w.dtype == x.dtype:
            return _AddLowRank.apply(total.detach(), x, a, b, scale, w)  # pyright: ignore[reportReturnType]
        if not total.is_leaf and not total._is_view():
            return _AddLowRank.apply(total, x, a, b, scale, None)  # pyright: ignore[reportReturnType]
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
