"""Log-probabilities of given tokens, in float32 whatever the logits' type, without a second tensor of the logits' size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS, ENTRIES = 256, 1 << 18
"""Rows of logits turned to float32 at a time; on a processor as many as have 1 MB of entries, which stays in a cache."""
FRESH = {"MmBackward0", "AddmmBackward0", "BmmBackward0", "LinearBackward0"}
"""Operations that do not need their own result in the backward pass, so that it may be overwritten there."""
VIEWS = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward1",
    "TBackward0",
}
"""Operations whose result is the memory of what they were given: what made that decides."""


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(logits)[targets]; the gradient (onehot − softmax) is written over the logits where that is safe."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, reuse: bool) -> Tensor:
        out = torch.empty(len(logits), device=logits.device)
        for at in _blocks(logits):
            out[at] = torch.log_softmax(logits[at], -1, dtype=torch.float32).gather(1, targets[at, None])[:, 0]
        # The logits are not saved through the graph, which would forbid the writing: only `reuse` says whether that is safe.
        ctx.save_for_backward(targets)
        ctx.logits, ctx.reuse = logits.detach(), reuse
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (targets,), logits = grads, ctx.saved_tensors, ctx.logits
        out = logits if ctx.reuse else torch.empty_like(logits)
        for at in _blocks(logits):
            part = torch.softmax(logits[at], -1, dtype=torch.float32).mul_(-grad[at, None])
            out[at] = part.scatter_add_(1, targets[at, None], grad[at, None])
        if ctx.reuse:
            ctx.logits = None
        return out, None, None


def _blocks(logits: Tensor) -> list[slice]:
    rows = ROWS if logits.device.type != "cpu" else max(1, ENTRIES // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


def token_logprobs(logits: Tensor, targets: Tensor, keep: bool = False) -> Tensor:
    """log p(target) of each row: logits [N, V], targets [N] -> [N] float32.

    Where the logits come straight from a matrix product, the backward pass reuses their memory; `keep` forbids it
    (the caller reads the logits after backward, or calls backward twice).
    """
    reuse = not keep and _fresh(logits.grad_fn)
    return _TokenLogProbs.apply(logits, targets, reuse)  # pyright: ignore[reportReturnType]


def _fresh(node: Any) -> bool:
    """Whether what made a tensor, beneath all views of it, has no use for it in the backward pass."""
    while node is not None and type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    return node is not None and type(node).__name__ in FRESH
