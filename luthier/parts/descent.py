"""Short descents: Adam steps until enough, one checked update, batches in a shuffled order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from luthier.errors import LuthierError


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    after: Callable[[int], None] = lambda step: None,
    enough: float = -math.inf,
) -> None:
    """Adam steps on `parameters` until the loss is below `enough`; `after` is called behind each."""
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        value = loss(step)
        if float(value.detach()) < enough:
            return
        step_on(optimiser, value)
        after(step)


def step_on(optimiser: torch.optim.Optimizer, loss: Tensor, masks: Mapping[int, Tensor] | None = None) -> None:
    """One update; `masks` (id of a parameter -> what of it may move) stop the gradient. A loss that is not finite is an
    error."""
    if not bool(torch.isfinite(loss)):
        raise LuthierError(
            f"the edit's loss is {float(loss)}: choose a smaller lr than {optimiser.param_groups[0]['lr']:g}"
        )
    optimiser.zero_grad()
    loss.backward()
    for parameter in [p for group in optimiser.param_groups for p in group["params"] if id(p) in (masks or {})]:
        parameter.grad *= (masks or {})[id(parameter)]
    optimiser.step()


def shuffled(n: int, size: int, g: torch.Generator) -> Iterator[list[int]]:
    """Batches of positions 0 to n − 1 without end, every pass in a new order; the last of a pass may be short."""
    while True:
        order = torch.randperm(n, generator=g).tolist()
        yield from (order[i : i + size] for i in range(0, n, size))
