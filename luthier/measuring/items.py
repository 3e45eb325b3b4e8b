"""What a check measures on: one item a record, already in tokens, and what a model made of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Switch(Protocol):
    """Whatever can show the base behind a tuned model: inside `off()` the deltas are not there."""

    def off(self) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Item:
    """One record of a check.

    For answers `source` is the prompt. For losses of a causal model `ids` is the whole row and `weights` says which of
    its tokens count (the first never does); for an encoder–decoder `source` goes in and `ids` is what must come out; for
    a classifier `source` goes in and `label` is the class.
    """

    id: str
    prompt: str
    """What a person reads."""
    expected: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier reads: the record's own fields."""
    source: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    label: int | None = None


@dataclass(frozen=True)
class Response:
    """What a model made of an item, before anything judges it; only what was asked for is set."""

    text: str | None = None
    loss: float | None = None
    """Mean over the supervised tokens, in nats."""
    tokens: float = 0.0
    """Weight of the supervised tokens."""
    label: int | None = None
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}
