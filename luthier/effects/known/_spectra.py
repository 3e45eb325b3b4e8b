"""Intruder dimensions of a tuned model (Shuttleworth et al. 2024): new singular directions that the base does not have."""

from __future__ import annotations

from typing import Any

import torch

from luthier.attach.weights import module_at

TOP = 10
"""Singular directions of the tuned matrix that are looked at, from the largest on."""
NEAR = 0.5
"""Largest cosine to any left singular vector of the base below which a direction is an intruder."""


def count(before: torch.Tensor, after: torch.Tensor) -> int:
    """Intruders among the ``TOP`` left singular vectors of ``after``, [out, in] like ``before``."""
    own = torch.linalg.svd(before.float(), full_matrices=False).U
    new = torch.linalg.svd(after.float(), full_matrices=False).U[:, :TOP]
    return int(((own.T @ new).abs().amax(0) < NEAR).sum())


def intruders(training: Any) -> list[float]:
    """Intruders of every matrix inside the layers, in the order of their names."""
    handle: Any = training.handle
    model: Any = training.base.model
    names = sorted(
        n for n, m in model.named_modules() if ".layers." in n and isinstance(getattr(m, "weight", None), torch.Tensor)
    )
    names = [n for n in names if _weight(model, n).ndim == 2]
    with handle.off():
        before = {n: _weight(model, n).clone() for n in names}
    handle.fold()
    try:
        return [float(count(before[n], _weight(model, n))) for n in names]
    finally:
        handle.unfold()


def _weight(model: Any, name: str) -> torch.Tensor:
    weight: Any = module_at(model, name).weight
    return weight.detach()
