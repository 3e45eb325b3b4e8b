"""What a run cost, as far as it is measured here: time and bytes on disk."""

from __future__ import annotations

import time
from pathlib import Path


class Watch:
    """Seconds since it was made or last read; `with Watch() as w: …` then `w.seconds`."""

    def __init__(self) -> None:
        self._start, self.seconds = time.perf_counter(), 0.0

    def __enter__(self) -> Watch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.read()

    def read(self) -> float:
        """Seconds up to now, also kept in `seconds`."""
        self.seconds = time.perf_counter() - self._start
        return self.seconds


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder (or of one file); links are not followed."""
    folder = Path(folder)
    if folder.is_file():
        return folder.stat().st_size
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
