"""Records from files, folders, hub datasets and built-in worlds, one at a time, each with its place and a way back."""

from __future__ import annotations

import glob
import importlib
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from luthier.data.files import READERS, Raw, suffix_of
from luthier.data.splits import of_split
from luthier.errors import LuthierError, nearest
from luthier.plan.schema import SourceSpec

UNLIMITED = 2000
"""Records taken from a scheme without an end of its own when the source states no limit."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where reading goes on: the file's number, its rows already read, and the byte of the next row where known."""

    file: int = 0
    row: int = 0
    byte: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it was found, with our column names. `where` is "file:line" or "file#index"."""

    fields: dict[str, Any]
    where: str
    after: Cursor


def read(source: SourceSpec, start: Cursor | None = None) -> Iterator[Record]:
    """The records of one source in their own order, with `skip`, `limit`, `columns` and `constants` applied.

    `start` is the `after` of the last record already taken: line files go on at that byte, Parquet at its row
    group, others pass over the rows before. Errors: every broken file is a LuthierError with file and line.
    """
    taken = 0
    opened = open_source(source)
    begin = start or Cursor()
    seen = opened.rows_before(begin.file) + begin.row if start else 0
    for raw, cursor in opened.rows(begin):
        seen += 1
        if seen <= source.skip:
            continue
        if source.limit is not None and seen > source.skip + source.limit:
            return
        taken += 1
        yield Record(mapped(raw.fields, source, raw.where), raw.where, cursor)
    if not taken and not start:
        raise LuthierError(f"no record in {source.path} (skip {source.skip}): give a file with records in it")


def mapped(fields: dict[str, Any], source: SourceSpec, where: str) -> dict[str, Any]:
    """The record under our column names: `columns` renames, `constants` adds or overrides."""
    if not source.columns and not source.constants:
        return fields
    for ours, theirs in source.columns.items():
        if theirs not in fields:
            raise LuthierError(f"{where}: no column {theirs!r} for {ours!r}; {nearest(theirs, fields, 'column')}")
    renamed = set(source.columns.values())
    out = {k: v for k, v in fields.items() if k not in renamed and k not in source.columns}
    out.update({ours: fields[theirs] for ours, theirs in source.columns.items()})
    out.update(source.constants)
    return out


class Opened:
    """An opened source: `rows(cursor)` gives (raw, cursor after it), `count()` all rows, `identity()` what it holds."""

    def rows(self, start: Cursor) -> Iterator[tuple[Raw, Cursor]]:
        raise NotImplementedError

    def rows_before(self, file: int) -> int:
        """Rows in the files before this one."""
        return 0

    def count(self) -> int:
        """All rows, before skip and limit."""
        return sum(1 for _ in self.rows(Cursor()))

    def identity(self) -> dict[str, Any]:
        """What the content is, for the cache key."""
        from luthier.data.identity import digest_records

        return {"records": digest_records(raw.fields for raw, _ in self.rows(Cursor()))}


class Files(Opened):
    """Files read one after the other."""

    def __init__(self, paths: list[Path], pattern: str | None, path: str):
        if not paths:
            raise LuthierError(
                f"no file matches {path}: give a file, a glob or a folder of {', '.join(sorted(READERS))}"
            )
        self.paths, self.pattern = paths, compiled(pattern, path)
        self.counts: dict[int, int] = {}

    def _reader(self, path: Path):
        suffix = suffix_of(path)
        if suffix not in READERS:
            raise LuthierError(
                f"{path}: cannot read {suffix or 'a file without suffix'}; {nearest(suffix, READERS, 'suffix')}"
            )
        if self.pattern and suffix != ".txt":
            raise LuthierError(f"{path}: 'pattern' is for text files of one record a line (.txt), this is {suffix}")
        return READERS[suffix]

    def rows(self, start: Cursor) -> Iterator[tuple[Raw, Cursor]]:
        for number in range(start.file, len(self.paths)):
            row, byte = (start.row, start.byte) if number == start.file else (0, 0)
            path = self.paths[number]
            for raw in self._reader(path).rows(path, row, byte, self.pattern):
                row += 1
                yield raw, Cursor(number, row, raw.next_byte)

    def _count(self, number: int) -> int:
        if number not in self.counts:
            path = self.paths[number]
            self.counts[number] = self._reader(path).count(path, self.pattern)
        return self.counts[number]

    def rows_before(self, file: int) -> int:
        return sum(self._count(i) for i in range(file))

    def count(self) -> int:
        return self.rows_before(len(self.paths))

    def identity(self) -> dict[str, Any]:
        from luthier.data.identity import file_identity

        return {"files": [file_identity(p) for p in self.paths]}


class Made(Opened):
    """Records that a function makes anew each time (a hub dataset, a built-in world)."""

    def __init__(self, make: Callable[[], Iterable[Raw]], size: int | None = None, fingerprint: str | None = None):
        self.make, self.size, self.fingerprint = make, size, fingerprint

    def rows(self, start: Cursor) -> Iterator[tuple[Raw, Cursor]]:
        for number, raw in enumerate(self.make(), 1):
            if number > start.row:
                yield raw, Cursor(0, number, 0)

    def count(self) -> int:
        return super().count() if self.size is None else self.size

    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint} if self.fingerprint else super().identity()


def compiled(pattern: str | None, path: str) -> re.Pattern[str] | None:
    """The pattern of a text source, checked: it must compile and name its groups."""
    if pattern is None:
        return None
    try:
        made = re.compile(pattern)
    except re.error as e:
        raise LuthierError(f"data source {path}: pattern {pattern!r} is not a regular expression ({e})") from e
    if not made.groupindex:
        raise LuthierError(f"data source {path}: pattern {pattern!r} names no column; write (?P<prompt>.*) for each")
    return made


def open_source(source: SourceSpec) -> Opened:
    """Find out what a source's path means: a scheme, files, a folder, or the name of a hub dataset."""
    scheme, colon, _ = source.path.partition(":")
    if colon and scheme in SCHEMES:
        return SCHEMES[scheme](source)
    if colon and len(scheme) > 1 and not os.path.exists(source.path):
        raise LuthierError(
            f"data source {source.path}: unknown scheme {scheme!r}; {nearest(scheme, SCHEMES, 'scheme')}"
        )
    path = Path(os.path.expandvars(os.path.expanduser(source.path)))
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        return saved_dataset(source, path)
    if path.is_dir():
        if (path / "config.json").exists():
            raise LuthierError(f"data source {source.path} is a model's folder: give a file or folder of records")
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and suffix_of(p) in READERS and not p.name.startswith(".")
        )
        if (chosen := of_split(path, found, source)) is None:
            _no_parts(source)
        return Files(found if chosen is None else chosen, source.pattern, source.path)
    if path.exists() or glob.has_magic(str(path)):
        _no_parts(source)
    if path.is_file():
        return Files([path], source.pattern, source.path)
    if glob.has_magic(str(path)):
        return Files(
            [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(p)],
            source.pattern,
            source.path,
        )
    if path.exists():
        raise LuthierError(f"data source {source.path} is no regular file: write it to a file first")
    if looks_like_a_file(source.path):
        raise LuthierError(f"data file {source.path} does not exist{beside(path)}")
    return hub_dataset(source)


def _no_parts(source: SourceSpec) -> None:
    """Files that name no split are read whole: a split or subset that is stated of them would silently mean nothing.

    'train' and 'test' stand for nothing stated: they are what sources of data and of audits have by default.
    """
    named = ("subset", source.subset) if source.subset else ("split", source.split)
    if named[1] not in ("train", "test"):
        raise LuthierError(
            f"data source {source.path}: files have no {named[0]} {named[1]!r}: name the file that holds it, or leave it out"
        )


def looks_like_a_file(path: str) -> bool:
    return bool(suffix_of(Path(path)) in READERS or path.startswith((".", "/", "~")) or path.count("/") > 1)


def beside(path: Path) -> str:
    """The nearest name in the same folder, for the error about a missing file."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    return f": {nearest(path.name, (p.name for p in path.parent.iterdir()), 'file', most=30)}"


def practice(source: SourceSpec) -> Opened:
    """`practice:FAMILY[,FAMILY…]` or `practice:all`, the built-in world; the families take turns. One of the user's own is
    `package:family`. With `subset: preferences` two answers to every record, as an honest annotator prefers them."""
    world = importlib.import_module("luthier.practice.world")
    names = [n.strip() for n in source.path.partition(":")[2].split(",") if n.strip()]
    names = list(world.families()) if names == ["all"] else names
    if not names:
        raise LuthierError(f"data source {source.path}: name a family; families: {', '.join(world.families())}")
    for name in names:
        try:
            world.family_named(name)
        except LuthierError as e:
            raise LuthierError(f"data source {source.path}: {str(e).removeprefix('practice world: ')}") from e
    if source.subset not in (None, PREFERENCES):
        raise LuthierError(
            f"data source {source.path} has no subset {source.subset!r}; {nearest(source.subset, [PREFERENCES], 'subset')}"
        )
    total = source.skip + (source.limit or UNLIMITED)

    def of(name: str, n: int) -> Iterator[dict[str, Any]]:
        if source.subset is None:
            return world.records(name, split=source.split, n=n)
        return world.preferences(name, split=source.split, n=n)

    def make() -> Iterator[Raw]:
        share = -(-total // len(names))
        running = [of(name, share) for name in names]
        for number in range(total):
            fields = next(running[number % len(names)], None)
            if fields is None:
                return
            yield Raw(fields, f"practice:{fields.get('id', number)}")

    return Made(make, total)


def saved_dataset(source: SourceSpec, path: Path) -> Opened:
    """A folder written by datasets' save_to_disk."""
    datasets = library("datasets", source.path)
    try:
        held = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as e:
        raise LuthierError(f"dataset folder {source.path} cannot be read: {first_line(e)}") from e
    return from_dataset(held, source)


def hub_dataset(source: SourceSpec) -> Opened:
    """A dataset of the Hugging Face hub by its name."""
    return from_dataset(loaded(source.path, source.subset, source.split), source)


@lru_cache(maxsize=16)
def loaded(path: str, subset: str | None, split: str) -> Any:
    """A hub dataset, opened once in a process."""
    datasets = library("datasets", path)
    if not reachable():
        raise LuthierError(
            f"{path} is no file or folder here, and the hub ({hub_host()}) cannot be reached: "
            "give a local path, or HF_HUB_OFFLINE=1 to use what is in the local cache"
        )
    try:
        return datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise LuthierError(
            f"{path} is no file or folder here, and as a hub dataset it does not load: {first_line(e)}"
        ) from e


def from_dataset(held: Any, source: SourceSpec) -> Opened:
    """Rows of a datasets.Dataset, or of one split of a DatasetDict."""
    if isinstance(held, dict):
        if source.split not in held:
            raise LuthierError(
                f"dataset {source.path} has no split {source.split!r}; {nearest(source.split, held, 'split')}"
            )
        held = held[source.split]

    def make() -> Iterator[Raw]:
        return (Raw(dict(fields), f"{source.path}#{i}") for i, fields in enumerate(held))

    return Made(make, len(held), f"{held._fingerprint}:{len(held)}")


def library(name: str, path: str) -> Any:
    """An optional library, or the line that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise LuthierError(f"reading {path} needs {name}: install luthier[data]") from e


def hub_host() -> str:
    return urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"


def reachable() -> bool:
    """Whether the hub's name resolves; with a proxy or HF_HUB_OFFLINE the hub library decides itself."""
    if any(
        os.environ.get(k) for k in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy")
    ):
        return True
    try:
        socket.getaddrinfo(hub_host(), 443)
    except OSError:
        return False
    return True


def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


PREFERENCES = "preferences"
"""The subset of practice records that are pairs of answers."""
SCHEMES: dict[str, Callable[[SourceSpec], Opened]] = {"practice": practice}
"""What stands before the colon of a source's path -> how to open it."""
