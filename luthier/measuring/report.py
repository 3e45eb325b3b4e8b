"""The report: `report.json` for programs and `report.html` for people, one file without any outside resource."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.measuring.page import page

KEYS = ("plan", "base", "delta", "ledger", "curve", "evals", "audit", "norms", "cost", "proof", "versions", "warnings")
"""The report's keys; docs/report.md says what each holds. All may be missing, none may be another."""


def write_report(folder: str | Path, data: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write both files into a folder and return their paths. Numbers that are not finite become null."""
    unknown = sorted(set(data) - set(KEYS))
    if unknown:
        raise LuthierError(f"the report has no key {', '.join(unknown)}: it has {', '.join(KEYS)}")
    clean = plain(data)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / "report.json", folder / "report.html"
    shown = render(clean)
    replace_text(json_path, json.dumps(clean, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    replace_text(html_path, shown)
    return json_path, html_path


def render(data: Mapping[str, Any]) -> str:
    """The page as text. Everything that comes from records, plans or models is escaped."""
    return fill("report.html", page(plain(data)))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A page of this room with its values, all of them escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("luthier.measuring", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template(template).render(values)


def plain(value: Any) -> Any:
    """Only what JSON has: tables with text keys, lists, text, numbers; what is not finite is null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    as_dict, as_number = (getattr(value, name, None) for name in ("to_dict", "item"))
    if callable(as_dict):
        return plain(as_dict())
    if callable(as_number):  # a number of numpy or torch
        return plain(as_number())
    return str(value)


def replace_text(path: Path, text: str) -> None:
    """All or nothing: a full disk leaves the file that was there."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LuthierError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error
