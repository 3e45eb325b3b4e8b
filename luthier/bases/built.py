"""The practice bases: the table of them, and where those lie that were built on this machine."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, nearest

ASSETS = Path(str(package_files("luthier"))) / "assets" / "practice"
SHIPPED = "m"
"""The one that stands in the package; `practice` alone names it too."""


@cache
def table() -> dict[str, dict[str, Any]]:
    """Every practice base by its short name, as luthier/assets/practice/bases.yaml describes it."""
    import yaml

    return yaml.safe_load((ASSETS / "bases.yaml").read_text(encoding="utf-8"))


def home() -> Path:
    """Where built bases lie: $LUTHIER_PRACTICE, by default `practice` in $LUTHIER_CACHE or in ~/.cache/luthier."""
    cache_folder = os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier"
    return Path(os.environ.get("LUTHIER_PRACTICE") or Path(cache_folder) / "practice")


def entry(short: str) -> dict[str, Any]:
    """A base's row of the table. Raises LuthierError for an unknown one, with the choices."""
    if short not in table():
        raise LuthierError(f"base practice/{short}: no such practice base; {nearest(short, table(), 'base')}")
    return table()[short]


def practice_folder(name: str) -> Path:
    """The folder of `practice`, `practice/NAME` or `practice/NAME/K`, the K-th checkpoint on its way.

    Raises LuthierError in one line for an unknown name (with the choices) and for a base that is not built (with the
    command that builds it).
    """
    short, _, mark = name.removeprefix("practice").removeprefix("/").partition("/")
    short = short or SHIPPED
    marks = entry(short).get("run", {}).get("marks", 0)
    if mark and mark not in {str(k) for k in range(1, marks + 1)}:
        choices = f"checkpoints 1 to {marks}" if marks else "no checkpoints on its way"
        raise LuthierError(f"base {name}: practice/{short} has {choices}")
    if short == SHIPPED:
        folder, command = ASSETS / "base", "make practice-base"
    else:
        folder, command = home() / short, f"make practice-base NAME={short}"
    found = folder if mark in ("", str(marks)) else folder / mark  # the last checkpoint is the base itself
    if not (found / "config.json").is_file():
        raise LuthierError(f"base {name}: not built at {found}; run `{command}`")
    return found
