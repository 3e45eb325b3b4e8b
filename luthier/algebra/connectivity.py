"""Whether two bases are linearly connected: the loss along the straight line between their weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from luthier.bridge.target import Target
from luthier.errors import LuthierError
from luthier.measuring import forward
from luthier.measuring.drift import own_text, starts
from luthier.measuring.items import Item
from luthier.measuring.sources import prepare_check
from luthier.plan.moving import ConnectivitySpec
from luthier.plan.schema import CheckSpec

_WRITTEN = 32  # tokens of a text that a base writes itself


@dataclass(frozen=True)
class Connectivity:
    """Mean loss in nats a token at each place t of (1 − t) · old + t · new, and how far it stands above the line between
    its ends: the barrier, at `at`."""

    places: list[float]
    losses: list[float]
    barrier: float
    at: float
    tolerance: float
    text: str
    tokens: int

    @property
    def connected(self) -> bool:
        """Whether there is no barrier to speak of."""
        return self.barrier <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"connected": self.connected}


def connectivity(old: Target, new: Target, spec: ConnectivitySpec, seed: int = 0) -> Connectivity:
    """Walks the new base's weights from the old to the new and measures; afterwards they are bit for bit what they were.

    Both bases have the same parameters. Takes a copy of the new base's weights, and a pass over the text for each place.
    Source: Frankle et al. 2020 for the barrier; its use before a transfer: Lin et al. 2025 (P147).
    """
    items, told = _text(old, new, spec, seed)
    places = [k / (spec.points - 1) for k in range(spec.points)]
    ours = dict(new.model.named_parameters())
    theirs = dict(old.model.named_parameters())
    kept = {name: p.detach().clone() for name, p in ours.items()}
    losses: list[float] = []
    try:
        for t in places:
            with torch.no_grad():
                for name, p in ours.items():
                    if t not in (0, 1) and not kept[name].is_floating_point():
                        continue
                    p.copy_(theirs[name] if t == 0 else kept[name] if t == 1 else _between(theirs[name], kept[name], t))
            losses.append(_loss(new, items))
    finally:
        with torch.no_grad():
            for name, p in ours.items():
                p.copy_(kept[name])
    above = [loss - ((1 - t) * losses[0] + t * losses[-1]) for t, loss in zip(places, losses, strict=True)]
    barrier = max(0.0, max(above))
    at = places[above.index(max(above))] if barrier > 0 else 0.0
    tokens = int(sum(w > 0 for item in items for w in item.weights))
    return Connectivity(places, losses, barrier, at, spec.tolerance, told, tokens)


def _between(old: torch.Tensor, new: torch.Tensor, t: float) -> torch.Tensor:
    """In float32; where both are equal exactly that."""
    old = old.to(new.device).float()
    return old + t * (new.float() - old)


def _loss(on: Target, items: list[Item]) -> float:
    found = forward.losses(on.model, on.kind, items, 32)
    weight = sum(r.tokens for r in found)
    return sum((r.loss or 0.0) * r.tokens for r in found) / weight


def _text(old: Target, new: Target, spec: ConnectivitySpec, seed: int) -> tuple[list[Item], str]:
    if spec.text is not None:
        check = CheckSpec.model_validate({"source": spec.text, "metric": "loss"})
        return prepare_check(new, check, "guard", items=spec.items, seed=seed).items, spec.text.path
    if new.kind != "causal" or new.tokenizer is None:
        raise LuthierError(
            "connectivity: this base writes no text of its own: state connectivity.text, records to measure on"
        )
    begin = starts(new.tokenizer, [])
    if not begin:
        raise LuthierError("connectivity: the tokenizer has no start token to write from: state connectivity.text")
    half = -(-spec.items // 2) * _WRITTEN
    written = [own_text(on.model, on.tokenizer or new.tokenizer, _On(), begin, half, seed=seed) for on in (old, new)]
    return written[0] + written[1], "what both bases write themselves"


class _On:
    """A base without deltas: there is nothing to switch off."""

    def off(self) -> Any:
        return nullcontext()
