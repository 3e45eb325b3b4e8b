"""What can be merged, compared or moved: a checkpoint, or a base with a delta on it, by its name."""

from __future__ import annotations

import os
from pathlib import Path

from luthier.algebra.checkpoints import Checkpoint, Source, mark_of
from luthier.algebra.tuned import ADAPTER, Tuned
from luthier.bases.fingerprint import compare
from luthier.bases.locate import locate, read_json
from luthier.delta.header import read_header
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec

__all__ = ["ADAPTER", "Checkpoint", "Source", "Tuned", "is_delta", "mark_of", "open_source"]


def open_source(name: str, lora: str | None = None, base: str | None = None, revision: str | None = None) -> Source:
    """The source called `name`: a checkpoint folder or hub name, 'practice', a delta folder or an adapter folder of PEFT.

    lora: a delta or PEFT folder to put on the checkpoint `name`. base: what a delta folder is put on, default what it
    names itself; another base than it was made on is an error that gives both fingerprints.
    """
    folder = Path(name).expanduser()
    if lora is not None:
        on = Checkpoint(_locate(name, revision), name)
        place = Path(lora).expanduser()
        if not any((place / f).exists() for f in (ADAPTER, "delta.json")):
            place = _locate(lora, None)
        source = Tuned(on, place, f"{name}+{lora}", rounded=not (place / "delta.json").exists())
    elif is_delta(folder):
        named = base or _base_of(folder)
        if not named:
            raise LuthierError(f"{name} names no base: state it (--base)")
        source = Tuned(Checkpoint(_locate(named, None), named), folder, name)
    else:
        return Checkpoint(_locate(name, revision), name)
    if (source.path / "delta.json").exists():
        _same_base(source)
    return source


def is_delta(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a delta or an adapter of PEFT, and no checkpoint."""
    folder = Path(folder).expanduser()
    return (folder / "delta.json").exists() or (folder / ADAPTER).exists() and not (folder / "config.json").exists()


def _base_of(folder: Path) -> str | None:
    if (folder / "delta.json").exists():
        return read_header(folder)["base"].get("name")
    return read_json(folder / ADAPTER).get("base_model_name_or_path")


def _locate(name: str, revision: str | None) -> Path:
    return locate(BaseSpec.model_validate({"name": name, "revision": revision}))


def _same_base(source: Tuned) -> None:
    """The delta's base is this checkpoint: by the sample on disk, and where names on disk differ, by loading it."""
    stated = source.card.get("fingerprint")
    if not stated:
        raise LuthierError(f"{source.path} states no fingerprint of its base: import it again, or train it here")
    here = mark_of(source.base, stated.split(":")[-1])
    if compare(stated, here) == "different":
        from luthier.bases.load import load_base

        here = str(load_base(BaseSpec.model_validate({"name": str(source.base.folder)}), tokenizer=False).fingerprint)
    if compare(stated, here) == "different":
        raise LuthierError(
            f"{source.path} was made on another base ({stated}, {source.card.get('name')}) than {source.base.name} ({here}): "
            "name its own base, or 'luthier port' it"
        )
