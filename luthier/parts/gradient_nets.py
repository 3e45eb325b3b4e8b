"""Small networks from the two factors of a linear map's gradient to two others (MEND)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Net = Mapping[str, Tensor]
Factors = tuple[Tensor, Tensor]
"""Inputs u [n, d_in] and gradients d [n, d_out] of n tokens, or b and a of a change."""


def fresh(d_in: int, d_out: int, layers: int, hidden: int, rate: float, g: torch.Generator) -> dict[str, Tensor]:
    """Numbers of the network for one shape of weight: two low-rank residual blocks, the identity at the start, with a
    scale and shift of their own for every layer; running mean and spread of what goes in; log of every layer's rate."""
    wide, net = d_in + d_out, {}
    for block in ("1", "2"):
        net[f"V{block}"] = torch.randn(hidden, wide, generator=g) / wide**0.5
        net[f"U{block}"] = torch.zeros(wide, hidden)
        net[f"bias{block}"] = torch.zeros(wide)
        net[f"scale{block}"], net[f"shift{block}"] = torch.ones(layers, wide), torch.zeros(layers, wide)
    net["mean"], net["std"] = torch.zeros(wide), torch.ones(wide)
    net["rate"] = torch.full((layers,), rate).log()
    return net


def transformed(net: Net, layer: int, u: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(u', d') from inputs u [n, d_in] and gradients d [n, d_out] of n tokens.

    z = ([u; d] − mean) / std goes through h = z + relu(scale ∘ (U V z + bias) + shift) twice; then the normalisation is
    taken back, so that the start is the gradient itself (our reading; the paper leaves the outcome normalised).
    """
    z = (torch.cat([u, d], -1) - net["mean"]) / net["std"]
    for block in ("1", "2"):
        low = z @ net[f"V{block}"].t() @ net[f"U{block}"].t() + net[f"bias{block}"]
        inner = net[f"scale{block}"][layer] * low + net[f"shift{block}"][layer]
        z = z + inner.clamp(min=0)  # unlike relu's, its gradient at 0, where everything starts, is 1
    return (z * net["std"] + net["mean"]).split([u.shape[-1], d.shape[-1]], -1)  # pyright: ignore[reportReturnType]


class Nets:
    """One network for every shape of weight, by the shape's name."""

    def __init__(self, tables: Mapping[str, dict[str, Tensor]]) -> None:
        self.tables = dict(tables)

    @classmethod
    def started(
        cls, seen: Mapping[str, Sequence[Sequence[Factors]]], hidden: int, rate: float, g: torch.Generator
    ) -> Nets:
        """Networks at their start. seen: shape -> weight of that shape -> (u, d) of some examples, which give what is
        normalised by."""
        tables = {}
        for name, weights in seen.items():
            u, d = weights[0][0]
            rows = torch.cat([torch.cat(pair, -1) for pairs in weights for pair in pairs])
            std = rows.std(0)
            table = fresh(u.shape[-1], d.shape[-1], len(weights), hidden, rate, g)
            table |= {"mean": rows.mean(0), "std": std.clamp_min(0.1 * std.mean())}
            tables[name] = {k: v.to(u.device) for k, v in table.items()}
        return cls(tables)

    @classmethod
    def read(cls, flat: Mapping[str, Tensor], device: torch.device) -> Nets:
        """What `flat` gave, on a device."""
        tables: dict[str, dict[str, Tensor]] = {}
        for name, value in flat.items():
            tables.setdefault(name.partition("/")[0], {})[name.partition("/")[2]] = value.to(device)
        return cls(tables)

    def flat(self) -> dict[str, Tensor]:
        """ "shape/name" -> tensor, on the CPU."""
        return {f"{name}/{k}": v.detach().cpu() for name, table in self.tables.items() for k, v in table.items()}

    def knows(self, name: str, number: int) -> bool:
        """Whether there is a network for this shape that knows so many weights of it."""
        return name in self.tables and number < len(self.tables[name]["rate"])

    def change(self, name: str, number: int, u: Tensor, d: Tensor) -> Factors:
        """(b [d_out, n], a [n, d_in]) of the change b a = −rate · Σ d' u'ᵀ of a shape's weight, from n tokens' factors."""
        u, d = transformed(self.tables[name], number, u, d)
        return -self.tables[name]["rate"][number].exp() * d.t(), u

    def optimiser(self, lr: float) -> torch.optim.Adam:
        """Of all numbers but those that normalise; learnt rates move ten times as fast."""
        groups: dict[bool, list[Tensor]] = {False: [], True: []}
        for table in self.tables.values():
            for k, v in table.items():
                if k not in ("mean", "std"):
                    groups[k == "rate"].append(v.requires_grad_(True))
        return torch.optim.Adam([{"params": groups[r], "lr": lr * (10 if r else 1)} for r in (False, True)])
