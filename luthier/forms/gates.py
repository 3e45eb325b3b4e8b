"""Stochastic gates before and behind a frozen linear map, that close until a wanted share is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.delta import FORMS, Form, No, Site, State

SPREAD = 0.5
"""Standard deviation in the probability that a gate is open, whatever the noise."""


@FORMS.add("gates")
@dataclass(frozen=True)
class Gates(Form):
    """y = g_out · (W (g_in · x) + b) with g = clip(tanh(a) + ε + ½, 0, 1), ε Gaussian in training and 0 otherwise.

    a ~ N(1, 0.1) at the start, where every gate is 1. `penalty`: strength · |mean probability of an open gate − (1 − target)|,
    averaged over a matrix's inputs and outputs and over the matrices. Rows and columns whose gates closed can be deleted
    (`parts.structure.compact`); the others fold. Our reading: a draw below 0.6 is put there, so that all gates start
    open. Source: FineGates (P169), as the authors' code has it.
    """

    target: float = 0.3
    """Share of gates to close: 0.4 on GLUE, 0.3 on Llama."""
    strength: float = 50.0
    noise: float = 0.1
    """Standard deviation of ε."""
    matrices: int = 7
    """Gated matrices of a layer, by which the average is taken."""

    paper: ClassVar[str] = "P169"
    at: ClassVar[str] = "output"
    scales: ClassVar[bool | No] = No(
        "the gates before and behind a matrix multiply each other: half of both is not half the change"
    )
    stride: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1:
            raise ValueError(f"target must lie in [0, 1), got {self.target}")
        if self.noise < 0 or self.strength < 0 or self.matrices < 1:
            raise ValueError("noise and strength must not be negative, matrices at least 1")

    def build(self, site: Site, g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sizes = {"inputs": site.d_in, "outputs": site.d_out}
        return {k: (1 + 0.1 * torch.randn(n, generator=g)).clamp_min(0.6) for k, n in sizes.items()}, {}

    def gate(self, s: State, side: str) -> Tensor:
        """The gates of a side, float32; with noise in training."""
        mu = s.p[side].tanh() + 0.5
        return (mu + self.noise * torch.randn_like(mu) if s.ctx.training and self.noise else mu).clamp(0, 1)

    def open(self, s: State, side: str) -> Tensor:
        """Probability of every gate to be open."""
        return 0.5 - 0.5 * torch.erf((-0.5 - s.p[side].tanh()) / (SPREAD * math.sqrt(2)))

    def before(self, x: Tensor, s: State) -> Tensor:
        return x * self.gate(s, "inputs").to(x.dtype)

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor:
        return (self.gate(s, "outputs") - 1).to(y.dtype) * y

    def delta(self, s: State) -> dict[str, Tensor]:
        rows, columns, w = self._still(s, "outputs"), self._still(s, "inputs"), s.W().float()
        change = {"weight": rows[:, None] * w * columns - w}
        return change if s.bias is None else change | {"bias": (rows - 1) * s.bias.float()}

    def _still(self, s: State, side: str) -> Tensor:
        return (s.p[side].tanh() + 0.5).clamp(0, 1)

    def count(self, site: Site) -> int:
        return site.d_in + site.d_out

    def penalty(self, s: State) -> Tensor:
        off = [(self.open(s, side).mean() - (1 - self.target)).abs() for side in ("inputs", "outputs")]
        return self.strength * (off[0] + off[1]) / 2 / (self.matrices * max(1, s.site.layers))
