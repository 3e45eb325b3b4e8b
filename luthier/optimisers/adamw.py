"""AdamW and plain SGD, from torch; fused where the device has it."""

from __future__ import annotations

from typing import Any

import torch

from luthier.delta import OPTIMISERS


@OPTIMISERS.add("adamw")
def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019). Groups carry their own lr and weight_decay."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


@OPTIMISERS.add("sgd")
def sgd(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum betas[0]; weight decay is added to the gradient, and eps is not used."""
    return torch.optim.SGD(groups, lr=1e-3, momentum=betas[0])
