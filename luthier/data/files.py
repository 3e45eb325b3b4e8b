"""One reader per kind of file: rows from a given row or byte on, and how many there are."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from luthier.errors import LuthierError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape in JSON that may be half of a character; looked for first, because the look is cheap."""


@dataclass(frozen=True, slots=True)
class Raw:
    """One row of a file as it stands, its place, and the byte where the next one begins (line files only)."""

    fields: dict[str, Any]
    where: str
    next_byte: int = 0


@dataclass(frozen=True)
class Reader:
    """`rows(path, row, byte, pattern)`: the rows from number `row` on (which begins at `byte`); `count(path, pattern)`."""

    rows: Callable[[Path, int, int, re.Pattern[str] | None], Iterator[Raw]]
    count: Callable[[Path, re.Pattern[str] | None], int]


def suffix_of(path: Path) -> str:
    """The suffix that says what a file is, without a trailing .gz, in lower case."""
    suffixes = [s.lower() for s in path.suffixes]
    suffixes = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    return suffixes[-1] if suffixes else ""


def opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked when its name ends in .gz. Missing, unreadable and empty files are errors."""
    try:
        if path.stat().st_size == 0:
            raise LuthierError(f"{path} is empty: give a file with records in it")
        return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]
    except OSError as e:
        raise LuthierError(f"{path} cannot be opened: {e.strerror or e}") from e


def decoded(data: bytes, path: Path, line: int, byte: int) -> str:
    """Text of one line (or a whole file); bad UTF-8 is an error with its byte offset in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        at, bad = line + data.count(b"\n", 0, e.start), data[e.start]
        raise LuthierError(
            f"{path}:{at}: not UTF-8 at byte {byte + e.start} of the file (0x{bad:02x}); convert the file to UTF-8"
        ) from e


def lines(path: Path, byte: int = 0) -> Iterator[tuple[bytes, int]]:
    """(line with its end, byte where the next one begins), from a byte on; a byte order mark is passed over."""
    with opened(path) as f:
        try:
            f.seek(byte)
            for line in f:
                byte += len(line)
                yield (line[3:] if byte == len(line) and line.startswith(b"\xef\xbb\xbf") else line), byte
        except (EOFError, zlib.error, OSError) as e:
            raise LuthierError(f"{path}: broken compressed file ({e}); write it again") from e


def decoded_lines(path: Path) -> Iterator[str]:
    """Lines as text with their ends, one at a time; a lone carriage return ends a line too."""
    for number, (line, after) in enumerate(lines(path), 1):
        text = decoded(line, path, number, after - len(line))
        yield from io.StringIO(text, newline="") if "\r" in text[:-2] else (text,)


def whole(path: Path) -> str:
    """A whole file as text: for .json arrays, which are held in memory while they are read."""
    data = b"".join(line for line, _ in lines(path))
    if not data.strip():
        raise LuthierError(f"{path} is empty: give a file with records in it")
    return decoded(data, path, 1, 0)


def an_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LuthierError(f"{where}: a record must be an object with named columns, this is {type(value).__name__}")
    return value


# The row number of a line file counts lines, blank ones too, so that "file:line" is right after a resume: a cursor
# therefore holds rows that were yielded, and the line number is found again from the byte only when an error needs it.
def line_at(path: Path, byte: int) -> int:
    """The number (from 1) of the line that begins at this byte."""
    with opened(path) as f:
        number, left = 1, byte
        while left > 0 and (block := f.read(min(left, 1 << 20))):
            number += block.count(b"\n")
            left -= len(block)
    return number


def jsonl_rows(path: Path, row: int, byte: int, pattern: re.Pattern[str] | None) -> Iterator[Raw]:
    first = line_at(path, byte) if byte else 1
    start, any_row = byte, bool(row)
    for number, (line, after) in enumerate(lines(path, byte), first):
        if line.strip():
            any_row, where = True, f"{path}:{number}"
            text = decoded(line, path, number, start).rstrip()  # so that a line cut short breaks in its last column
            try:
                value = from_json(text, where)
            except json.JSONDecodeError as e:
                raise LuthierError(
                    f"{where}: broken JSON, {e.msg.removesuffix(' at')} at column {e.colno}; mend or remove the line"
                ) from e
            yield Raw(an_object(value, where), where, after)
        start = after
    if not any_row:
        raise LuthierError(f"{path} holds blank lines only: give a file with records in it")


def from_json(text: str, where: str) -> Any:
    """The value of a JSON text, which must be text that can be written again: half of a surrogate pair is an error, and
    so is a key given twice and what nests or counts beyond measure. Broken JSON is a JSONDecodeError."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except _Twice as e:
        raise LuthierError(f"{where}: the key {e.args[0]!r} is given twice; keep one of them") from e
    except RecursionError as e:
        raise LuthierError(f"{where}: nested too deeply to be read; mend or remove the record") from e
    except ValueError as e:
        raise LuthierError(f"{where}: a number too long to be read; write it as a string") from e
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            half = ascii(e.object[e.start])[1:-1]
            raise LuthierError(f"{where}: {half} is half of a character; mend or remove the record") from e
    return value


class _Twice(ValueError):
    """An object of a JSON text names a key more than once."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [k for k, _ in pairs]
        raise _Twice(next(k for k in keys if keys.count(k) > 1))
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_once)
"""JSON as the json module reads it, but a key given twice is no object: which of the two is meant, nobody knows."""


def filled_lines(path: Path, pattern: re.Pattern[str] | None) -> int:
    return sum(1 for line, _ in lines(path) if not line.isspace())


def json_rows(path: Path, row: int, byte: int, pattern: re.Pattern[str] | None) -> Iterator[Raw]:
    """A .json file: an array of objects, or one object a line (JSON Lines under another name).

    An array is read whole: its memory grows with the file. Large data belongs in .jsonl, which is read by the line.
    """
    if one_object_a_line(path):
        yield from jsonl_rows(path, row, byte, pattern)
        return
    for index, value in enumerate(json_array(path)):
        if index >= row:
            yield Raw(an_object(value, f"{path}#{index}"), f"{path}#{index}")


def one_object_a_line(path: Path) -> bool:
    """Whether the first two filled lines are each a complete object."""
    seen = 0
    for line, _ in lines(path):
        if line.strip():
            if not (line.lstrip().startswith(b"{") and line.rstrip().endswith(b"}")):
                return False
            seen += 1
            if seen == 2:
                return True
    return False


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")


def columnar(value: dict[str, Any]) -> bool:
    """Whether an object is a table by columns: lists of one length, or objects with the same keys, as pandas writes it."""
    held = list(value.values())
    if all(isinstance(v, list) for v in held):
        return len({len(v) for v in held}) == 1 and bool(held[0]) and not any(isinstance(v[0], dict) for v in held)
    return len(held) > 1 and all(isinstance(v, dict) for v in held) and len({tuple(v) for v in held}) == 1


def json_array(path: Path) -> list[Any]:
    text = whole(path).rstrip()
    try:
        value = from_json(text, str(path))
    except json.JSONDecodeError as e:
        raise LuthierError(f"{path}:{e.lineno}: broken JSON, {e.msg.removesuffix(' at')} at column {e.colno}") from e
    if isinstance(value, dict) and columnar(value):
        first = ", ".join(f'"{k}": …' for k in list(value)[:3])
        raise LuthierError(
            f"{path} holds the columns {_few(sorted(value))}, not records: write one record a line, {{{first}}} (with pandas "
            'to_json(orient="records", lines=True))'
        )
    if isinstance(value, dict):
        lists = [k for k, v in value.items() if isinstance(v, list)]
        hint = f"write the array under {lists[0]!r} alone" if lists else "wrap the record in [ ]"
        raise LuthierError(
            f"{path} holds one object with the keys {_few(sorted(value))}, not an array of records: {hint}"
        )
    if not isinstance(value, list):
        raise LuthierError(f"{path} holds a {type(value).__name__}, not an array of records")
    if not value:
        raise LuthierError(f"{path} holds an empty array: give a file with records in it")
    return value


def json_count(path: Path, pattern: re.Pattern[str] | None) -> int:
    return filled_lines(path, pattern) if one_object_a_line(path) else len(json_array(path))


def text_rows(path: Path, row: int, byte: int, pattern: re.Pattern[str] | None) -> Iterator[Raw]:
    """With a pattern one record a line, else one text record for each paragraph between blank lines."""
    if pattern is None:
        yield from paragraphs(path, byte)
        return
    number = line_at(path, byte) - 1 if byte else 0
    start = byte
    for line, after in lines(path, byte):
        number += 1
        text = decoded(line, path, number, start).rstrip("\r\n")
        start = after
        if text.strip():
            match = pattern.fullmatch(text) or pattern.fullmatch(text.strip())
            if match is None:
                raise LuthierError(
                    f"{path}:{number}: the line {text[:60]!r} does not match the pattern {pattern.pattern!r}"
                )
            yield Raw({k: v or "" for k, v in match.groupdict().items()}, f"{path}:{number}", after)


def paragraphs(path: Path, byte: int) -> Iterator[Raw]:
    held: list[str] = []
    number = line_at(path, byte) - 1 if byte else 0
    first, start = number + 1, byte
    for line, after in lines(path, byte):
        number += 1
        text = decoded(line, path, number, start)
        start = after
        if text.strip():
            first = first if held else number
            held.append(text)
        elif held:
            yield Raw({"text": "".join(held).rstrip("\r\n")}, f"{path}:{first}", after)
            held = []
    if held:
        yield Raw({"text": "".join(held).rstrip("\r\n")}, f"{path}:{first}", start)


def text_count(path: Path, pattern: re.Pattern[str] | None) -> int:
    return filled_lines(path, pattern) if pattern else sum(1 for _ in paragraphs(path, 0))


def separated_by(header: Iterable[str]) -> str:
    """What to do where one column's name holds another separator than the table's; empty where that is not so."""
    names = list(header)
    found = next((s for s in ";\t|," if len(names) == 1 and s in names[0]), None)
    return f"its cells seem to be separated by {found!r}: write it with ',' (.csv) or tabs (.tsv)" if found else ""


def separated(delimiter: str) -> Reader:
    """Values with a header line, read a line at a time; a row with another number of cells than the header is an error."""

    def rows(path: Path, row: int, byte: int, pattern: re.Pattern[str] | None) -> Iterator[Raw]:
        csv.field_size_limit(min(sys.maxsize, 1 << 31 - 1))
        reader, last = csv.reader(decoded_lines(path), delimiter=delimiter, strict=True), 0
        try:
            header, index = next((cells for cells in reader if any(map(str.strip, cells))), None), 0
            last = reader.line_num
            if header is None:
                raise LuthierError(f"{path} is empty: give a file with records in it")
            if twice := sorted({c for c in header if c and header.count(c) > 1}):
                raise LuthierError(f"{path}: the header names the column {twice[0]!r} twice; rename one of them")
            for cells in reader:
                where, last = f"{path}:{last + 1}", reader.line_num
                if not cells:
                    continue
                index += 1
                if len(cells) != len(header):
                    hint = separated_by(header)
                    raise LuthierError(
                        f"{where}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)})"
                        f"{hint and f'; {hint}'}"
                    )
                if index > row:
                    yield Raw(dict(zip(header, cells, strict=True)), where)
        except csv.Error as e:
            raise LuthierError(f"{path}:{last + 1}: broken table, {e}; quote the cell or mend the line") from e

    return Reader(rows, lambda path, pattern: sum(1 for _ in rows(path, 0, 0, None)))


def parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise LuthierError(f"reading {path} needs pyarrow: install luthier[data]") from e
    if not path.is_file() or path.stat().st_size == 0:
        raise LuthierError(f"{path} is missing or empty: give a file with records in it")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise LuthierError(f"{path} is no Parquet file or is cut short: {str(e).splitlines()[0]}") from e


def parquet_rows(path: Path, row: int, byte: int, pattern: re.Pattern[str] | None) -> Iterator[Raw]:
    file = parquet(path)
    index = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if index + size <= row:
            index += size
            continue
        for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
            for fields in batch.to_pylist():
                if index >= row:
                    yield Raw(fields, f"{path}#{index}")
                index += 1


READERS: dict[str, Reader] = {
    ".json": Reader(json_rows, json_count),
    ".jsonl": Reader(jsonl_rows, filled_lines),
    ".ndjson": Reader(jsonl_rows, filled_lines),
    ".txt": Reader(text_rows, text_count),
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".parquet": Reader(parquet_rows, lambda path, pattern: parquet(path).metadata.num_rows),
}
"""Suffix -> reader. Pickled files have none, and never will."""
