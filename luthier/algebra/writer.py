"""Writing safetensors front to back: the header first, from names, types and shapes known beforehand, then the numbers.

Memory is that of what is handed in. A checkpoint is written to a neighbour of its folder and moved there whole, so that
nothing half-written is ever left under the name that was asked for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bridge.tensors import NAMES, buffer_of
from luthier.errors import LuthierError

SHARD = 5 * 1000**3
"""Most bytes of one file of a checkpoint."""
INDEX = "model.safetensors.index.json"
UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Spec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


def in_file_order(specs: Sequence[Spec]) -> list[Spec]:
    """The order in which tensors can stand in a file: wider types first, so that each starts at a multiple of its size."""
    return sorted(specs, key=lambda s: -s.dtype.itemsize)


class TensorFile:
    """One safetensors file. Tensors are written in the order of `specs`, whole or in flat pieces."""

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> None:
        """specs: in the order of `in_file_order`. Raises LuthierError where the disk has no room."""
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        at = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        free = shutil.disk_usage(path.parent).free
        if at > free:
            raise LuthierError(
                f"{path.parent} has {free / 1e9:.1f} GB free and {at / 1e9:.1f} GB are to be written: free the disk, or "
                "name another place"
            )
        self.path, self._specs, self._next, self._left = path, list(specs), 0, 0
        self._file = open(path, "wb", buffering=0)
        try:
            self._put(len(text).to_bytes(8, "little") + text)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, or the next flat piece of one."""
        if self._left == 0:
            while self._next < len(self._specs) and self._specs[self._next].nbytes == 0 != tensor.numel():
                self._next += 1
            self._left = self._specs[self._next].nbytes if self._next < len(self._specs) else 0
            self._next += 1
        spec = self._specs[self._next - 1]
        size = tensor.numel() * tensor.element_size()
        if spec.name != name or spec.dtype != tensor.dtype or size > self._left:
            raise ValueError(f"{name} ({tensor.dtype}, {size} bytes) does not follow in {self.path}: {spec} is due")
        self._put(buffer_of(tensor))
        self._left -= size

    def _put(self, data: Any) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]

    def close(self, sync: bool = True) -> None:
        """Ends the file; one that lacks a tensor is an error."""
        if self._left or any(spec.nbytes for spec in self._specs[self._next :]):
            raise ValueError(f"{self.path} ends before its last tensor")
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Closes without a check."""
        self._file.close()


class ShardedFile:
    """The weights of a checkpoint folder: one file, or several with an index, each of at most `shard` bytes."""

    def __init__(self, folder: Path, specs: Sequence[Spec], shard: int = SHARD, sync: bool = True) -> None:
        self.folder, self.sync = folder, sync
        groups: list[list[Spec]] = [[]]
        size = 0
        for spec in in_file_order(specs):
            if groups[-1] and size + spec.nbytes > shard:
                groups.append([])
                size = 0
            groups[-1].append(spec)
            size += spec.nbytes
        total = len(groups)
        self.files = {
            "model.safetensors" if total == 1 else f"model-{i + 1:05d}-of-{total:05d}.safetensors": group
            for i, group in enumerate(groups)
        }
        self._home = {spec.name: file for file, group in self.files.items() for spec in group}
        self._open: TensorFile | None = None
        if total > 1:
            table = {
                "metadata": {"total_size": sum(s.nbytes for s in specs)},
                "weight_map": dict(sorted(self._home.items())),
            }
            (folder / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")

    @property
    def order(self) -> list[str]:
        """Names in the order in which they must be written."""
        return [spec.name for group in self.files.values() for spec in group]

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor or piece; shards are opened and closed on the way."""
        file = self._home[name]
        if self._open is None or self._open.path.name != file:
            if self._open is not None:
                self._open.close(self.sync)
            self._open = TensorFile(self.folder / file, self.files[file])
        self._open.write(name, tensor)

    def close(self) -> None:
        """Ends the last shard."""
        if self._open is not None:
            self._open.close(self.sync)

    def abandon(self) -> None:
        """Closes what is open, whatever is missing."""
        if self._open is not None:
            self._open.abandon()


def bytes_of(text: str) -> int:
    """'5GB' -> bytes."""
    digits = text.strip().upper()
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if digits.endswith(u)), "")
    try:
        size = int(float(digits.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError) as e:
        raise LuthierError(f"shard: '{text}' is no size: write it as 5GB or 500MB") from e
    if size < 1:
        raise LuthierError(f"shard: '{text}' is less than a byte: write it as 5GB or 500MB")
    return size
