"""The base's own responses, kept between audits: the base does not change, so it need not be asked again.

Only what a model made is kept, never what a verifier said of it, and the key holds everything that decides it: the
base's fingerprint and dtype, the token ids asked, what was asked, and the versions. A base of which the fingerprint
does not say all (earlier deltas, new tokens, a fresh head) is asked each time.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.measuring.items import Item, Response

_FORMAT = 1
LOG = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """`$LUTHIER_CACHE/audit`; without that variable nothing is kept."""
    root = os.environ.get("LUTHIER_CACHE")
    return Path(root) / "audit" if root else None


def remembered(
    folder: Path | None, base: str, asked: dict[str, Any], items: Sequence[Item], run: Callable[[], list[Response]]
) -> tuple[list[Response], bool]:
    """The responses, and whether they were read instead of made. A file that cannot be read as such is made anew; one
    that cannot be written is told of, and costs only the next audit its time."""
    if folder is None or not base:
        return run(), False
    path = folder / f"{_key(base, asked, items)}.json"
    kept = _load(path, len(items))
    if kept is not None:
        return kept, True
    made = run()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps([r.to_dict() for r in made]), encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        LOG.warning("LUTHIER_CACHE: %s cannot be written (%s): the base is asked anew each time", folder, e.strerror)
    return made, False


def _key(base: str, asked: dict[str, Any], items: Sequence[Item]) -> str:
    versions = {name: version(name) for name in ("torch", "transformers")}
    rows = [[i.source, i.ids, i.weights, i.label] for i in items]
    return sha256(json.dumps([_FORMAT, base, asked, versions, rows], sort_keys=True).encode()).hexdigest()


def _load(path: Path, count: int) -> list[Response] | None:
    if not path.exists():
        return None
    try:
        rows = [Response(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    return rows if len(rows) == count else None
