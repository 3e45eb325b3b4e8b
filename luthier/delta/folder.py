"""Folders that are to be written."""

from __future__ import annotations

import os
from pathlib import Path

from luthier.errors import LuthierError


def refuse_existing(folder: str | os.PathLike[str]) -> Path:
    """The folder's path; an error where it is there already and not empty, or is no folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LuthierError(f"{folder} is there and not empty: name another folder, or remove it")
    return folder
