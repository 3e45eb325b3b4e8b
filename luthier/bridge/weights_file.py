"""Reading safetensors with one clear line for each way in which that fails; pickles are never opened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import LuthierError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file."""
    if not path.exists():
        pickles = [p.name for q in PICKLES for p in path.parent.glob(q) if p.name != "training_args.bin"]
        if pickles:
            raise LuthierError(
                f"{path.parent} holds pickled weights only ({pickles[0]}), which can run code when read and are refused: "
                "load them where you trust them and save with safe_serialization=True"
            )
        raise LuthierError(f"{path} is missing: the folder is incomplete; copy it again")
    try:
        with safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, OSError) as e:
        raise LuthierError(f"{path} is truncated or altered ({e}): copy it again") from e


def dtype_of(places: dict[str, Path]) -> torch.dtype:
    """The type most matrices of a checkpoint are stored in, whatever they are loaded as; float32 where none is floating."""
    counts: Counter[str] = Counter()
    for file in sorted(set(places.values())):
        with safe_open(file, "pt") as f:
            for key in f.keys():
                part = f.get_slice(key)
                if len(part.get_shape()) == 2:
                    counts[part.get_dtype()] += 1
    common = next((name for name, _ in counts.most_common() if name in DTYPES), "F32")
    return DTYPES[common]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says."""
    try:
        table: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if isinstance(table, dict) and all(isinstance(name, str) for name in table.values()):
            return table
        why = "its weight_map is no table of file names"
    except (ValueError, KeyError, TypeError) as e:
        why = f"no weight_map can be read from it ({type(e).__name__}: {e})"
    raise LuthierError(f"{index} is altered: {why}: copy it again")


def shards(folder: Path) -> tuple[list[Path], set[str]]:
    """The weight files of a checkpoint folder, and the tensors that its index names, if it has one; a shard that the index
    names must be there."""
    index = folder / "model.safetensors.index.json"
    files, named = sorted(folder.glob("*.safetensors")), set()
    if index.exists():
        table = _weight_map(index)
        lost = sorted({f for f in table.values() if not (folder / f).exists()})
        if lost:
            raise LuthierError(f"{folder} lacks {lost[0]} ({len(lost)} shards missing): copy it again")
        files, named = sorted({folder / f for f in table.values()}), set(table)
    if not files:
        read_safetensors(folder / "model.safetensors")  # raises with the reason
    return files, named


def index_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, over the shards of a checkpoint folder. Errors as of `shards`."""
    places: dict[str, Path] = {}
    for file in shards(folder)[0]:
        try:
            with safe_open(file, "pt") as f:
                places |= dict.fromkeys(f.keys(), file)
        except (SafetensorError, OSError) as e:
            raise LuthierError(f"{file} is truncated or altered ({e}): copy it again") from e
    return places
