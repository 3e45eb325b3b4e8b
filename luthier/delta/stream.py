"""A safetensors file written tensor by tensor, for what is larger than memory: only one tensor is held at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from luthier.errors import LuthierError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch's types -> the format's."""
ENTRY = 160
"""Bytes of header set aside for a tensor besides its name."""


class TensorStream:
    """Writes `path`. Which tensors come, of which shape, need not be known before; only which names may come.

    The header stands first in the file, so room for all possible names is set aside and filled with spaces. Tensors of
    different element size go to neighbouring files, joined at the end with the widest first, so that all are aligned.
    A file that was not closed has no valid header: no reader takes it for whole.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        room = 8 + sum(len(json.dumps(name)) + ENTRY for name in names) + ENTRY
        self._room = -(-room // 64) * 64
        self._parts: dict[int, tuple[BinaryIO, dict[str, dict[str, Any]]]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor; the memory is free afterwards."""
        width = tensor.element_size()
        if width not in self._parts:
            file = self.path.with_name(f".{self.path.name}.{width}").open("wb")
            file.seek(self._room)
            self._parts[width] = (file, {})
        file, table = self._parts[width]
        start = file.tell()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            raw: Any = flat.view(torch.uint8).numpy()
            file.write(memoryview(raw))
        table[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start - self._room, file.tell() - self._room],
        }

    def close(self, metadata: dict[str, str] | None = None) -> Path:
        """Joins the parts and writes the header; the file is whole and synced afterwards."""
        header: dict[str, Any] = {"__metadata__": metadata or {"format": "luthier"}}
        widths = sorted(self._parts, reverse=True) or [1]
        if not self._parts:
            self._parts[1] = (self.path.with_name(f".{self.path.name}.1").open("wb"), {})
        first, _ = self._parts[widths[0]]
        shift = 0
        for width in widths:
            file, table = self._parts[width]
            for name, entry in table.items():
                header[name] = entry | {"data_offsets": [at + shift for at in entry["data_offsets"]]}
            shift += max(file.tell() - self._room, 0)
            if file is not first:
                file.close()
                with Path(file.name).open("rb") as part:
                    part.seek(self._room)
                    shutil.copyfileobj(part, first, 1 << 24)
                Path(file.name).unlink()
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self._room - 8:
            raise LuthierError(f"{self.path}: a tensor was written under a name that was not announced")
        first.seek(0)
        first.write((self._room - 8).to_bytes(8, "little") + text.ljust(self._room - 8))
        first.flush()
        os.fsync(first.fileno())
        first.close()
        os.replace(first.name, self.path)
        self._parts.clear()
        return self.path

    def drop(self) -> None:
        """Removes what was written so far; nothing happens after `close`."""
        for file, _ in self._parts.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)
        self._parts.clear()


def fsync(path: Path) -> None:
    """Returns when the disk holds the file, or the folder's entries."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
