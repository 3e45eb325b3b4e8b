"""An output folder in use is locked: two runs never write into each other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import LuthierError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when the process ends, however it ends.

    A folder that was made for a run which failed before it wrote anything is taken away again.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as e:
        raise LuthierError(f"{folder} cannot be written to ({e.strerror}): choose another --out") from e
    with file as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            f.seek(0)
            raise LuthierError(
                f"{folder} is in use by process {f.read().strip() or '?'}: wait for it or choose another --out"
            ) from e
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        try:
            yield
        except BaseException:
            if folder in made and [p.name for p in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                for place in made:
                    if not any(place.iterdir()):
                        place.rmdir()
            raise
