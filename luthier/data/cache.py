"""Tokenised rows in flat arrays, in memory or mapped from disk under a key of everything that made them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.ledger import Ledger
from luthier.data.rows import Row
from luthier.errors import LuthierError

ARRAYS = ("ids", "weights", "at", "where", "where_at", "truncated", "eot", "label", "weight")
PAIRS = ("second", "second_weights", "second_at")


class Store:
    """Rows side by side: ids and weights of all rows in one array each, and where each row begins.

    `store[i]` is a Row whose arrays are views; `lengths` [n] are what a row takes in a batch (the longer side of two).
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        a = arrays
        self.lengths: np.ndarray = np.diff(a["at"])
        if "second" in a:
            self.lengths = np.maximum(self.lengths, np.diff(a["second_at"]))

    def __len__(self) -> int:
        return len(self.arrays["at"]) - 1

    def __getitem__(self, index: int) -> Row:
        a = self.arrays
        span = slice(int(a["at"][index]), int(a["at"][index + 1]))
        place = slice(int(a["where_at"][index]), int(a["where_at"][index + 1]))
        row = Row(
            a["ids"][span],
            np.asarray(a["weights"][span], np.float32),
            bytes(a["where"][place]).decode(),
            int(a["truncated"][index]),
            {0: False, 1: True}.get(int(a["eot"][index])),
            int(a["label"][index]),
            float(a["weight"][index]),
        )
        if "second" in a:
            other = slice(int(a["second_at"][index]), int(a["second_at"][index + 1]))
            row.second, row.second_weights = a["second"][other], np.asarray(a["second_weights"][other], np.float32)
        return row

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max(initial=0))

    def digests(self) -> Iterable[bytes]:
        """What identifies each row's content, to find the same row twice."""
        a = self.arrays
        for i in range(len(self)):
            content = a["ids"][a["at"][i] : a["at"][i + 1]].tobytes()
            other = a["second"][a["second_at"][i] : a["second_at"][i + 1]].tobytes() if "second" in a else b""
            yield content + b"|" + other + bytes(str(int(a["label"][i])), "ascii")


def flat(parts: list[np.ndarray], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """All parts end to end, and where each begins (one more than there are parts)."""
    at = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(p) for p in parts], out=at[1:])
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype), at


def narrow(weights: np.ndarray) -> np.ndarray:
    """Weights that are only 0 and 1 in one byte each."""
    return weights.astype(np.uint8) if np.all((weights == 0) | (weights == 1)) else weights


def gather(rows: Iterable[Row]) -> Store:
    """A store of these rows, in memory."""
    held = list(rows)
    ids, at = flat([r.ids for r in held], np.int32)
    weights, _ = flat([r.weights for r in held], np.float32)
    where, where_at = flat([np.frombuffer(r.where.encode(), np.uint8) for r in held], np.uint8)
    arrays = {
        **{"ids": ids, "weights": narrow(weights), "at": at, "where": where, "where_at": where_at},
        "truncated": np.array([r.truncated for r in held], np.int32),
        "eot": np.array([-1 if r.eot is None else int(r.eot) for r in held], np.int8),
        "label": np.array([r.label for r in held], np.int32),
        "weight": np.array([r.weight for r in held], np.float32),
    }
    if held and held[0].second is not None:
        second, second_at = flat([r.second for r in held if r.second is not None], np.int32)
        second_weights, _ = flat([r.second_weights for r in held if r.second_weights is not None], np.float32)
        arrays |= {"second": second, "second_at": second_at, "second_weights": narrow(second_weights)}
    return Store(arrays)


def cache_folder() -> Path:
    """Where tokenised rows lie: $LUTHIER_CACHE, by default ~/.cache/luthier. Anything there may be deleted at any time."""
    return Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier") / "rows"


def load(folder: Path) -> tuple[Store, Ledger] | None:
    """The rows of a cache folder, mapped, with their ledger; None where it is missing or not whole."""
    try:
        about = json.loads((folder / "ledger.json").read_text())
        names = [n for n in (*ARRAYS, *PAIRS) if (folder / f"{n}.npy").exists()]
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
        whole = set(ARRAYS) <= arrays.keys() and all(len(arrays[n]) == about["sizes"].get(n) for n in names)
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return (Store(arrays), Ledger.from_state(about["ledger"])) if whole and len(about["sizes"]) == len(names) else None


def save(folder: Path, store: Store, ledger: Ledger) -> None:
    """Write rows and ledger under this name, whole or not at all. Of two writers the first one stays."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    except OSError as e:
        raise LuthierError(
            f"cannot write the cache in {folder.parent} ({e.strerror}); set LUTHIER_CACHE, or data.cache: false"
        ) from e
    try:
        for name, array in store.arrays.items():
            np.save(work / f"{name}.npy", array, allow_pickle=False)
        about = {"sizes": {n: len(a) for n, a in store.arrays.items()}, "ledger": ledger.state()}
        (work / "ledger.json").write_text(json.dumps(about))
        if load(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
    except OSError as e:
        if load(folder) is None:
            raise LuthierError(
                f"cannot write the cache {folder} ({e.strerror}); free space, or set data.cache: false"
            ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def cached(key: str | None, make: Callable[[], tuple[Store, Ledger]]) -> tuple[Store, Ledger]:
    """The rows under a key, made and written if they are not there; without a key just made."""
    if key is None:
        return make()
    folder = cache_folder() / key
    found = load(folder)
    if found is None:
        store, ledger = make()
        save(folder, store, ledger)
        found = load(folder) or (store, ledger)
    return found
