"""The README of a delta's folder: what the Hub shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.delta.registry import FORMS

if TYPE_CHECKING:
    from luthier.delta.artefact import Delta


def card_of(delta: Delta) -> str:
    """Its base, its pieces, and how it is loaded and checked, in Markdown."""
    rows = "\n".join(
        f"| {q.name} | {FORMS.name_of(type(q.form))} | {len(q.sites)} | {q.count():,} |" for q in delta.pieces
    )
    base: Mapping[str, Any] = delta.base
    name = base.get("name", "unknown")
    return (
        f"---\nlibrary_name: luthier\nbase_model: {name}\n---\n\n# A delta on {name}\n\n"
        f"Base fingerprint `{base.get('fingerprint', 'unknown')}`.\n\n"
        f"| piece | form | sites | numbers trained |\n|---|---|---|---|\n{rows}\n\n"
        f'Load it: `luthier.load("{base.get("name", "BASE")}", deltas=["FOLDER"])`. Check it: `luthier verify FOLDER`.\n'
    )
