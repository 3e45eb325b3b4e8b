"""A checkpoint on disk as named tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bases.fingerprint import fingerprint_of
from luthier.bases.load import RECOMPUTED
from luthier.bases.locate import read_json
from luthier.bridge.tensors import Files, places_of


class Source:
    """Named tensors on disk and the folder of files they belong to. Reading is safe from one thread at a time."""

    name: str
    """As the plan calls it."""
    folder: Path
    """Of the checkpoint: its config, tokenizer and generation config."""
    config: dict[str, Any]

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the checkpoint stores it."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """Type that `read` gives."""
        raise NotImplementedError

    def read(self, name: str, out: Tensor | None = None, first: int = 0) -> Tensor:
        """The tensor in memory of its own. With `out` (contiguous, of its type, any shape) its entries from number
        `first` on are written there instead."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the files."""

    def __contains__(self, name: str) -> bool:
        raise NotImplementedError

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that speaks of the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        stated = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(stated) if stated is not None else False


class Checkpoint(Source):
    """A Hugging Face folder: one safetensors file or shards with an index. Pickled weights are refused, unread."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder, self.name = folder, name or str(folder)
        self.config = read_json(folder / "config.json")
        self.places = places_of(folder)
        self._files = Files()

    def names(self) -> list[str]:
        files = {f: i for i, f in enumerate(sorted({p.file for p in self.places.values()}))}
        return sorted(self.places, key=lambda n: (files[self.places[n].file], self.places[n].start))

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.places[name].dtype

    def read(self, name: str, out: Tensor | None = None, first: int = 0) -> Tensor:
        place = self.places[name]
        out = torch.empty(place.shape, dtype=place.dtype) if out is None else out
        self._files.read(place, out, first)
        return out

    def close(self) -> None:
        self._files.close()


def mark_of(source: Checkpoint, held: str) -> str:
    """The fingerprint that `bases.fingerprint` gives of the loaded model held in type `held`, where names in memory are
    those on disk; one tensor at a time, without building the model."""
    dtype = getattr(torch, held, None)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(source.places):
            if RECOMPUTED.search(name):
                continue
            value = source.read(name)
            yield name, value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return fingerprint_of(tensors())
