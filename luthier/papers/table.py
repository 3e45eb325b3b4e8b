"""The table itself: one typed line for every paper, read from `table.jsonl` once."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from luthier.errors import LuthierError, nearest

STATUSES = ("works", "partly", "not yet", "other modality")
"""works: code, recipe and evidence are there; partly: some of it, `reason` says what is missing; not yet: nothing is
claimed; other modality: bound to images, sound, tables … and left out, `reason` says to what."""


@dataclass(frozen=True)
class Paper:
    """One row: facts of the paper, then what luthier claims about it."""

    id: str
    """P001 … P489."""
    title: str
    room: str
    """Part of the field: objectives, deltas, applied, judging, data, algebra or serving."""
    kind: str
    """method, system, study, theory, benchmark, survey, dataset or model."""
    fits: str
    """core, adjacent (the mechanism carries over to language models) or out (bound to another modality)."""
    status: str
    """One of STATUSES."""
    names: tuple[str, ...] = ()
    """Where it is in the code, as dotted paths below luthier: `forms.lora` is the form entered as 'lora'."""
    recipe: str | None = None
    """File below luthier/recipes/ that is this paper's method as a plan."""
    evidence: str | None = None
    """Test that would fail without the method: `tests/…/test_x.py::test_y`."""
    reason: str | None = None
    """What is missing (partly), or what it is bound to (other modality)."""
    becomes: str | None = None
    """For rows that are not methods: recipe, experiment or page."""


def papers() -> list[Paper]:
    """Every row in the order of its id. Errors: LuthierError naming the line of the table that cannot be read."""
    return list(_read())


@cache
def _read() -> tuple[Paper, ...]:
    known = {f.name for f in fields(Paper)}
    rows = []
    text = resources.files("luthier.papers").joinpath("table.jsonl").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        where = f"papers table, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise LuthierError(f"{where}: not JSON ({e.msg}); run tools/papers_table.py to write it anew") from e
        for key in row:
            if key not in known:
                raise LuthierError(f"{where}: unknown key '{key}': {nearest(key, known, 'key')}")
        try:
            rows.append(Paper(**{**row, "names": tuple(row.get("names", ()))}))
        except TypeError as e:
            raise LuthierError(f"{where}: {e}; a row states id, title, room, kind, fits and status") from e
    return tuple(rows)


def paper(id: str) -> Paper:
    """The row called `id`; 'P007', 'p7' and '7' are the same. Errors: LuthierError naming the nearest rows."""
    rows = {p.id: p for p in papers()}
    digits = id.strip().upper().removeprefix("P")
    wanted = f"P{int(digits):03d}" if digits.isdecimal() else id.strip()
    if wanted in rows:
        return rows[wanted]
    titled = [f"{p.id} {p.title}" for p in rows.values() if wanted.casefold() in p.title.casefold()]
    close = difflib.get_close_matches(wanted, rows, 3, 0.7)
    hint = f"in a title: {'; '.join(titled[:3])}" if wanted and titled else f"nearest: {', '.join(close) or 'none'}"
    raise LuthierError(f"papers table: no paper is called '{id}' ({hint}); ids go from {min(rows)} to {max(rows)}")


def as_json() -> list[dict[str, Any]]:
    """The table for other programs: a list of {id, title, room, status, names, recipe, evidence}."""
    keys = ("id", "title", "room", "status", "names", "recipe", "evidence")
    return [{k: list(v) if isinstance(v := getattr(p, k), tuple) else v for k in keys} for p in papers()]
