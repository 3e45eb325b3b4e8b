"""Callbacks for a plan to name."""

from __future__ import annotations

from typing import Any

seen: list[tuple[str, int]] = []


def note(event: str, loop: Any) -> None:
    """Writes down what it is told."""
    seen.append((event, loop.progress.step))
