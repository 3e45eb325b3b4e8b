"""What a folder that a plan or a command names holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Kind = Literal["assembly", "delta", "adapter", "checkpoint"]
MARKS: dict[str, Kind] = {
    "assembly.json": "assembly",
    "delta.json": "delta",
    "adapter_config.json": "adapter",
    "config.json": "checkpoint",
}
"""File that marks a folder -> what it then holds; of several the first."""


def kind_of(folder: str | os.PathLike[str]) -> Kind | None:
    """What the folder holds: an assembly, a delta of ours, a PEFT adapter, or a checkpoint; None where no file says."""
    return next((kind for name, kind in MARKS.items() if (Path(folder) / name).is_file()), None)
