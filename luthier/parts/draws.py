"""Random masks in pieces, the same ones again as often as they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """A stream of draws of its own, split off a generator, that starts anew at entry 0."""

    def __init__(self, generator: torch.Generator) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        self.generator = torch.Generator().manual_seed(seed)
        self.start = self.generator.get_state()

    def at(self, a: int) -> torch.Generator:
        """The generator for the piece that starts at entry a; pieces have to come in order, from entry 0."""
        if a == 0:
            self.generator.set_state(self.start)
        return self.generator


class Coin(Draw):
    """Keeps every entry with probability `density`, independently.

    Sixteen random bits an entry decide, and a further draw for the one entry in 65536 that they leave open, so that
    the probability is exact: a tenth of the time of torch.bernoulli.
    """

    def __init__(self, density: float, generator: torch.Generator) -> None:
        super().__init__(generator)
        whole = int(density * 65536)
        self.limit, self.rest = whole - 32768, density * 65536 - whole

    def apply(self, a: int, d: Tensor) -> Tensor:
        """Sets the dropped entries of d (a flat piece that starts at entry a) to 0 in place."""
        n, g = d.numel(), self.at(a)
        lanes = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None, generator=g).view(torch.int16)[:n]
        if self.rest:
            open_ = (lanes == self.limit).nonzero()[:, 0]
            lanes[open_[torch.rand(len(open_), generator=g) < self.rest]] = -32768
        if d.dtype.itemsize == 2:
            d.view(torch.int16).mul_(lanes.lt_(self.limit))
        else:
            d.mul_(lanes.lt_(self.limit).to(d.dtype))
        return d
