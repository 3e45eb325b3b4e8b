"""delta.json: what it must hold, of which types; read and checked without a tensor being touched."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from luthier.delta.form import Site
from luthier.errors import LuthierError, nearest

FORMAT = 1
"""Version of the folder's layout; readers refuse a newer one."""

OWN = {"delta.json", "delta.safetensors", "probes.safetensors"}
"""Names that no file that travels along may have."""


class _Piece(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    name: str
    form: str
    settings: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    scale: float = 1.0


class _Lineage(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    plan: dict[str, Any] | None = None
    parents: list[str | None] = []


class _Base(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    name: str | None = None
    kind: str = "causal"
    fingerprint: str | None = None
    full_fingerprint: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    new_tokens: list[str] | None = None
    labels: list[str] | None = None
    dtype: str | None = None
    revision: str | None = None


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)
    format: int
    base: _Base
    pieces: list[_Piece]
    lineage: _Lineage
    audit: dict[str, Any] = {}
    seals: dict[str, list[float]] = {}
    digest: str = ""
    probes_digest: str | None = None
    files: dict[str, str] = {}


def read_header(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """delta.json of a folder, checked for format and types. No tensor is read."""
    path = Path(folder) / "delta.json"
    if not path.exists():
        hint = (
            "it is a PEFT folder: use 'luthier import'"
            if (Path(folder) / "adapter_config.json").exists()
            else "give a delta folder"
        )
        raise LuthierError(f"{folder} holds no delta.json: {hint}")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise LuthierError(f"{path} is not JSON ({e}): copy the folder again") from e
    except OSError as e:
        raise LuthierError(f"{path} cannot be read ({e.strerror}): check its permissions") from e
    if not isinstance(header, dict):
        raise LuthierError(
            f"{path} holds a {type(header).__name__}, not a table: not a delta of this project, or altered"
        )
    missing = {"format", "base", "pieces", "lineage"} - set(header)
    if missing:
        raise LuthierError(f"{path} lacks {sorted(missing)}: not a delta of this project, or altered")
    version = header["format"]
    if isinstance(version, int) and version > FORMAT:
        raise LuthierError(f"{path} has format {version}, this version reads up to {FORMAT}: upgrade luthier")
    try:
        _Header.model_validate(header)
    except ValidationError as e:
        raise _altered(path, e) from e
    for name in header.get("files", {}):
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or "\\" in name or not plain.parts or name in OWN:
            raise LuthierError(f"{path}: files: '{name}' is no name inside the folder: copy the delta again")
    return header


def site_of(entry: dict[str, Any], path: Path, piece: str, key: str) -> Site:
    """A site as written in delta.json (`path`); unknown, missing and mistyped facts are errors that name it."""
    known = [f.name for f in dataclasses.fields(Site)]
    where = f"{path}: piece '{piece}', site {key!r}"
    for name in entry:
        if name not in known:
            raise LuthierError(f"{where}: unknown key '{name}': {nearest(name, known, 'key')}")
    try:
        return TypeAdapter(Site).validate_python(entry)
    except ValidationError as e:
        raise _altered(path, e, f"piece '{piece}', site {key!r}, ") from e


def _altered(path: Path, error: ValidationError, where: str = "") -> LuthierError:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    said = problem["msg"].partition(" or instance of ")[0]  # a class of ours says nothing to the reader of a file
    return LuthierError(f"{path}: {where}{place}: {said}: altered or not a delta of this project; copy it again")
