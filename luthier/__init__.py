"""luthier: adapt language models, and know what each change gained and what it cost.

import luthier
run = luthier.tune("plan.yaml")
model = luthier.load("practice", deltas=["out"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.delta.artefact import Delta
    from luthier.errors import LuthierError
    from luthier.plan import Plan
    from luthier.verbs import audit, generate, load, tune, verify

__version__ = "0.1.0"
_HOME = {
    "Delta": "luthier.verbs",
    "LuthierError": "luthier.errors",
    "Plan": "luthier.plan",
    "audit": "luthier.verbs",
    "generate": "luthier.verbs",
    "load": "luthier.verbs",
    "tune": "luthier.verbs",
    "verify": "luthier.verbs",
}
__all__ = ["Delta", "LuthierError", "Plan", "audit", "generate", "load", "tune", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
