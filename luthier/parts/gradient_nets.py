"""Small networks from the two factors of a linear map's gradient to two others (MEND)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Net = Mapping[str, Tensor]


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


def nested(flat: Mapping[str, Tensor], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Shape -> name -> tensor, from "shape/name" -> tensor."""
    nets: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        nets.setdefault(name.partition("/")[0], {})[name.partition("/")[2]] = value.to(device)
    return nets
