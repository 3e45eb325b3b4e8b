"""Causal attention of short rows on a processor, as products of whole blocks: the library's kernel forms small ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Queries of one product. Keys behind a block's last query are never multiplied."""
LONGEST = 512
"""Rows beyond it go to the library's kernel: what is kept for the backward pass grows with the square of the length."""
BLOCKED = "luthier-blocked"
"""Name of the attention function that `blocked` registers with transformers."""


class _CausalAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ) v over the keys up to each query. Kept: q, k, v and the shares of each block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1])
        queries, into = _grouped(q, k.shape[1]), _grouped(out.transpose(1, 2), k.shape[1])
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        shares = []
        for at, end in _blocks(length):
            scores = torch.baddbmm(_closed(at, end, queries), _rows(queries, at), keys[:, :end].mT, alpha=scale)
            shares.append(torch.ops.aten._softmax(scores, -1, False))  # as it is, where autocast would make it float32
            _put(into, at, torch.bmm(shares[-1], values[:, :end]))
        ctx.save_for_backward(q, k, v, *shares)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *shares = ctx.saved_tensors
        batch, heads, length, width = q.shape
        queries, above = _grouped(q, k.shape[1]), _grouped(grads[0].transpose(1, 2), k.shape[1])
        grad_q = q.new_empty(batch, length, heads, width).transpose(1, 2)
        into = _grouped(grad_q, k.shape[1])
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for (at, end), share in zip(_blocks(length), shares, strict=True):
            given = _rows(above, at)
            grad_v[:, :end] += share.mT @ given
            pulled = torch.ops.aten._softmax_backward_data(given @ values[:, :end].mT, share, -1, share.dtype).mul_(
                ctx.scale
            )
            grad_k[:, :end] += pulled.mT @ _rows(queries, at)
            _put(into, at, pulled @ keys[:, :end])
        return grad_q, grad_k.to(k.dtype).view(k.shape), grad_v.to(v.dtype).view(v.shape), None


def _blocks(length: int) -> Iterator[tuple[slice, int]]:
    """(queries of a block, how many keys the last of them sees)."""
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        yield slice(start, end), end


def _grouped(x: Tensor, kv: int) -> Tensor:
    """[B, H, T, D] as [B, kv, H / kv, T, D], a view: queries that share keys stand together."""
    return x.unflatten(1, (kv, -1))


def _rows(x: Tensor, at: slice) -> Tensor:
    """A block's [B · kv, H / kv · t, D]."""
    return x[:, :, :, at].flatten(2, 3).flatten(0, 1)


def _put(x: Tensor, at: slice, rows: Tensor) -> None:
    """What `_rows` reads, written."""
    part = x[:, :, :, at]
    part.copy_(rows.view(part.shape))


def _closed(at: slice, end: int, queries: Tensor) -> Tensor:
    """[H / kv · t, end]: 0 where a query sees a key, minus infinity where the key is ahead of it."""
    ahead = torch.full((end - at.start, end), -torch.inf, dtype=queries.dtype, device=queries.device)
    return ahead.triu_(at.start + 1).repeat(queries.shape[2], 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention without a mask, [B, T, H, Dv]. q [B, H, T, D], k [B, kv, T, D], v [B, kv, T, Dv] where kv divides H and
    neighbouring heads share keys. Sums are in float32 inside each product; scores and shares have the type of q, or of autocast."""
    if torch.is_autocast_enabled(q.device.type):
        kind = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(kind), k.to(kind), v.to(kind)
    return _CausalAttention.apply(q, k, v, scale)  # pyright: ignore[reportReturnType]


@cache
def blocked() -> str:
    """Registers an attention function with transformers that is `sdpa` but for causal rows without a mask, on a processor and of
    at most `LONGEST` positions, which `causal_attention` works out. Gives its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        plain = mask is None and all(
            more.get(k) in (None, False, 0.0) for k in ("dropout", "output_attentions", "softcap")
        )
        plain = plain and all(more.get(k) is None for k in ("position_bias", "cache"))
        short = 1 < q.shape[2] == k.shape[2] <= LONGEST
        if not (causal and plain and short and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)):
            return sdpa(module, q, k, v, mask, **more)
        scale = more.get("scaling")
        return causal_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale), None

    AttentionInterface.register(BLOCKED, attend)
    AttentionMaskInterface.register(BLOCKED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return BLOCKED
