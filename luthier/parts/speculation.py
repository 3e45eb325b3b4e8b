"""Speculative sampling: a cheap model's draws, kept or replaced so that they are distributed as the other's.

Source: Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p/q) [..., V]: how often a token drawn from q is kept; 1 where q is 0."""
    return torch.where(q > 0, p / q.clamp(min=torch.finfo(q.dtype).tiny), torch.ones_like(p)).clamp(max=1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p − q, 0), normalised [..., V]: what a token that was not kept is replaced from; p itself where p = q."""
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=torch.finfo(p.dtype).tiny), p)


def accept(p: Tensor, q: Tensor, drafted: list[int], uniforms: Tensor) -> tuple[int, int]:
    """(number of drafted tokens that stay, the token after them): jointly distributed as draws from p.

    p [k + 1, V] and q [k, V] are the probabilities after 0, 1 … drafted tokens, the k drafted ones drawn from q;
    uniforms [k + 1] are fresh numbers from [0, 1), the last one for the token that follows.
    """
    rates = acceptance(p[: len(drafted)], q)
    for n, token in enumerate(drafted):
        if float(uniforms[n]) >= float(rates[n, token]):
            return n, draw(residual(p[n], q[n]), uniforms[-1])
    return len(drafted), draw(p[len(drafted)], uniforms[-1])


def draw(p: Tensor, uniform: Tensor | float) -> int:
    """A token [V] -> id by inverting the distribution; one of probability 0 is never drawn."""
    total = p.double().cumsum(-1)
    at = int(torch.searchsorted(total, torch.as_tensor(uniform).to(total) * total[-1], right=True))
    return min(at, int(p.nonzero()[-1]))
