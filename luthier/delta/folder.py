"""Folders that are to be written."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError

from luthier.errors import LuthierError

UNWRITABLE = (OSError, SafetensorError)
"""What writing raises where it fails: safetensors tells a full disk by an error of its own."""


def unwritten(what: str, error: BaseException, left: str) -> LuthierError:
    """The error of a write that failed; `left` says what of it, or before it, is there."""
    why = getattr(error, "strerror", None) or error
    return LuthierError(f"cannot write {what} ({why}): free some space, or name another place; {left}")


def refuse_existing(folder: str | os.PathLike[str]) -> Path:
    """The folder's path; an error where it is there already and not empty, is no folder, or cannot be made there."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise LuthierError(f"{folder} is there and not empty: name another folder, or remove it")
    return free_for_files(folder)


def free_for_files(folder: Path) -> Path:
    """The folder, if files can be put there: to be asked before anything is worked out. Nothing is made."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            if place.is_dir() and os.access(place, os.W_OK):
                return folder
            raise LuthierError(f"{place} is no folder that can be written to: choose another --out")
    return folder
