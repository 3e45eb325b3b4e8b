"""Reading single tensors of safetensors files into memory of our own, by name, whole or in part.

A mapped file would count as memory of the process, and as address space under a limit; `pread` does neither, releases
the interpreter while it copies, and reads into buffers that are used again.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bridge.weights_file import read_safetensors, shards
from luthier.errors import LuthierError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor's numbers are."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    nbytes: int


def buffer_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any type, as a writable view."""
    flat = tensor.detach().contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(raw)


def read_places(file: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file, from its header. A file that is cut short or altered is one line."""

    def broken(why: Any) -> LuthierError:
        return LuthierError(f"{file} is truncated or altered ({why}): copy it again")

    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER):
                raise broken("its header is longer than the file")
            header = json.loads(f.read(length))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise LuthierError(
                    f"{file}: {name} is of type {entry['dtype']}, which is not read here: convert it first"
                )
            dtype = DTYPES[entry["dtype"]]
            place = Place(file, dtype, shape, 8 + length + start, end - start)
            if place.nbytes != math.prod(shape) * dtype.itemsize or start < 0 or 8 + length + end > size:
                raise broken(f"{name} does not fit")
            places[name] = place
    except FileNotFoundError:
        read_safetensors(file)  # raises with the reason
        raise
    except OSError as e:
        raise LuthierError(f"{file} cannot be read ({e.strerror}): check its permissions") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise broken(e) from e
    return places


def places_of(folder: Path) -> dict[str, Place]:
    """Tensor name -> place, over the shards of a checkpoint folder; they must hold all that its index names."""
    files, named = shards(folder)
    places: dict[str, Place] = {}
    for file in files:
        places |= read_places(file)
    if absent := sorted(named - set(places)):
        raise LuthierError(
            f"{folder}: its index names {absent[0]}, which no shard holds ({len(absent)} such): copy it again"
        )
    return places


class Files:
    """Open files, read at any place by any thread. They are closed by `close`, or with the last reference."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, place: Place, out: Tensor, first: int = 0) -> None:
        """Fills `out` (contiguous, of the place's type) with its entries from number `first` on."""
        if place.file not in self._open:
            self._open[place.file] = os.open(place.file, os.O_RDONLY)
        fd, view = self._open[place.file], buffer_of(out)
        at = place.start + first * place.dtype.itemsize
        while len(view):
            got = os.preadv(fd, [view], at)
            if got == 0:
                raise LuthierError(f"{place.file} became shorter while it was read: copy it again")
            view, at = view[got:], at + got

    def close(self) -> None:
        """Closes them all."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def __del__(self) -> None:
        self.close()
