"""What a run cost: time, tokens, memory, numbers moved, bytes on disk."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Cost:
    """The price of a run; what was not measured is None. Memory and sizes in bytes, times in seconds."""

    seconds: float
    tokens: int | None = None
    supervised_tokens: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    device: str | None = None
    moved: int | None = None
    share: float | None = None
    delta_bytes: int | None = None
    audit_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_second is None and self.tokens is not None and self.seconds > 0:
            self.tokens_per_second = self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


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


def moved(model: Any) -> tuple[int, int]:
    """(numbers that train, numbers of the base), shared tensors counted once. Numbers of deltas are not the base's."""
    trained: dict[int, int] = {}
    base: dict[int, int] = {}
    for name, p in model.named_parameters():
        if "luthier" not in name.split("."):
            base[id(p)] = p.numel()
        if p.requires_grad:
            trained[id(p)] = p.numel()
    return sum(trained.values()), sum(base.values())


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below a folder (or of one file); links are not followed."""
    folder = Path(folder)
    if folder.is_file():
        return folder.stat().st_size
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
