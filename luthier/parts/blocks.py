"""Products with a matrix that is never whole in memory: made a block of rows at a time, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ENTRIES = 1 << 20
"""Largest block: 4 MB in float32, which stays in a cache."""
Block = Callable[[int, int], Tensor]
"""Rows a to b of the matrix, [b − a, columns] in float32."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, rows: int) -> Tensor:
        ctx.block, ctx.rows = block, rows
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty(len(flat), rows)
        for a, b in spans(rows, x.shape[-1]):
            torch.mm(flat, block(a, b).to(x.dtype).t(), out=out[:, a:b])
        return out.view(*x.shape[:-1], rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        flat, total = grad.reshape(-1, ctx.rows), None
        for a, b in spans(ctx.rows, 1024):
            part = flat[:, a:b] @ ctx.block(a, b).to(grad.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.view(*grad.shape[:-1], -1), None, None


def spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows of at most ENTRIES entries."""
    step = max(1, ENTRIES // max(1, columns))
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


def product(x: Tensor, block: Block, rows: int) -> Tensor:
    """x Mᵀ [..., rows] for x [..., columns], in x's type; the gradient reaches x."""
    return _Product.apply(x, block, rows)  # pyright: ignore[reportReturnType]


def whole(block: Block, rows: int, columns: int) -> Tensor:
    """The matrix itself, [rows, columns] in float32."""
    return torch.cat([block(a, b) for a, b in spans(rows, columns)])
