"""Networks of two or three layers that learn in a fraction of a second, for tests of what becomes of what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import MERGES, Stack

Net = dict[str, Tensor]
"""w0 [d_1, d_0], b0 [d_1], w1 …: linear maps with tanh between them."""


def net(*sizes: int, seed: int = 0) -> Net:
    """A network at its random start; sizes: input, hidden …, output."""
    g, out = torch.Generator().manual_seed(seed), {}
    for n, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        out |= {f"w{n}": torch.randn(b, a, generator=g) / a**0.5, f"b{n}": torch.zeros(b)}
    return out


def answers(net: Net, x: Tensor) -> Tensor:
    """[n, d_out] for inputs [n, d_in]."""
    last = len(net) // 2 - 1
    for n in range(last + 1):
        x = F.linear(x, net[f"w{n}"], net[f"b{n}"])
        x = x.tanh() if n < last else x
    return x


def mse(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return (answers(net, x) - y).square().mean()


def drawn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(x: Tensor, y: Tensor, seed: int = 0, size: int = 32) -> Callable[[Net, int], Tensor]:
    """The squared error of another random batch at every step, for `fit`."""
    g = torch.Generator().manual_seed(seed)

    def loss(net: Net, step: int) -> Tensor:
        at = torch.randint(len(x), (size,), generator=g)
        return mse(net, x[at], y[at])

    return loss


def plus(net: Net, *others: tuple[float, Net]) -> Net:
    """The network with multiples of others added to its numbers."""
    return {k: v + torch.stack([f * o[k] for f, o in others]).sum(0) for k, v in net.items()}


def fit(start: Net, loss: Callable[[Net, int], Tensor], steps: int, lr: float = 1e-2) -> Net:
    """The network after so many steps of Adam on loss(net, step)."""
    out = {k: v.clone().requires_grad_(True) for k, v in start.items()}
    optimiser = torch.optim.Adam(list(out.values()), lr=lr)
    for step in range(steps):
        optimiser.zero_grad()
        loss(out, step).backward()
        optimiser.step()
    return {k: v.detach() for k, v in out.items()}


def merge_nets(
    method: str, models: Sequence[Net], base: Net, settings: dict[str, Any] | None = None, **each: Any
) -> Net:
    """One network of several, tensor by tensor. each: numbers by model, over what the method has by default."""
    made = MERGES.make(method, settings or {})
    table = {k: list(each.pop(k, [v] * len(models))) for k, v in made.each.items()}
    assert not each
    depth = len(base) // 2
    return {
        k: made.merge(Stack(k, [m[k] for m in models], v, table, layer=int(k[1:]), layers=depth))
        for k, v in base.items()
    }
