"""Folders that are to be written."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from luthier.delta.stream import fsync
from luthier.errors import LuthierError

UNWRITABLE = (OSError, SafetensorError)
"""What writing raises where it fails: safetensors tells a full disk by an error of its own."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def unwritten(what: str, error: BaseException, left: str) -> LuthierError:
    """The error of a write that failed; `left` says what of it, or before it, is there."""
    why = getattr(error, "strerror", None) or error
    return LuthierError(f"cannot write {what} ({why}): free some space, or name another place; {left}")


def refuse_existing(folder: str | os.PathLike[str], sources: Iterable[Any] = ()) -> Path:
    """The folder's path; an error where it is there already and not empty, is no folder, cannot be made there, or lies in
    one of the sources. sources: names and folders of what is read; those that are no folder here count for nothing."""
    folder = Path(folder)
    for source in sources:
        if isinstance(source, (str, os.PathLike)) and os.fspath(source):
            if (place := Path(source).expanduser()).is_dir() and place.resolve() in folder.resolve().parents:
                raise LuthierError(f"{folder} lies in {source}, which is read: choose another --out")
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


@contextmanager
def new_folder(folder: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """A fresh neighbour of `folder` to write into; it takes the folder's name at the end, or vanishes with all in it.

    Raises LuthierError where the folder is there and not empty, and for what the system says of the writing.
    """
    folder = Path(folder)
    refuse_existing(folder)
    new: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        os.chmod(new, 0o755)
        yield new
        if sync:
            for path in [p for p in new.rglob("*") if p.is_file() and p.suffix != ".safetensors"]:
                fsync(path)
            fsync(new)
        if folder.exists():
            folder.rmdir()
        os.replace(new, folder)
        if sync:
            fsync(folder.parent)
    except UNWRITABLE as e:
        raise unwritten(str(folder), e, "nothing was left behind") from e
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
