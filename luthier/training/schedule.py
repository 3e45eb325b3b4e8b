"""Learning-rate factors: warm-up, then the plan's schedule down to its floor."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAY_SHARE = 0.2
"""Share of the steps in which 'wsd' decays."""


def _linear(t: float) -> float:
    return 1 - t


def _cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


def _wsd(t: float) -> float:
    return 1.0 if t <= 1 - DECAY_SHARE else (1 - t) / DECAY_SHARE


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
"""Share of the steps after warm-up in [0, 1] -> factor in [0, 1]."""


def factor(step: int, steps: int, schedule: str, warmup: float, floor: float) -> float:
    """Factor on the peak rate at optimiser step `step` (from 0) of `steps`.

    >>> [round(factor(s, 10, "linear", 2, 0.0), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.12]
    """
    warm = int(warmup) if warmup >= 1 else int(round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    t = (step - warm) / max(steps - warm, 1)
    return floor + (1 - floor) * SHAPES[schedule](min(t, 1.0))
