"""luthier papers: what of the field is here."""

from __future__ import annotations

from typing import Annotated

import typer


def papers(
    id: Annotated[str | None, typer.Argument(help="One paper, such as P110.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="The table for other programs.")] = False,
    status: Annotated[str | None, typer.Option(help="Only rows of this status.", show_default=False)] = None,
) -> None:
    """List the papers and where each stands: works, partly, not yet, or bound to another modality."""
    import json as writer

    from luthier.cli.console import plain, table
    from luthier.errors import LuthierError, nearest
    from luthier.papers.table import STATUSES, as_json, paper
    from luthier.papers.table import papers as rows

    if status is not None and status not in STATUSES:
        raise LuthierError(f"--status: '{status}' is no status: {nearest(status, STATUSES, 'status')}")
    chosen = [paper(id)] if id is not None else [p for p in rows() if status in (None, p.status)]
    if json:
        wanted = {p.id for p in chosen}
        plain(writer.dumps([row for row in as_json() if row["id"] in wanted], indent=1, ensure_ascii=False))
    elif id is not None:
        row = chosen[0]
        facts = {"room": row.room, "kind": row.kind, "status": row.status, "in the code": ", ".join(row.names)}
        facts |= {"recipe": row.recipe, "evidence": row.evidence, "reason": row.reason, "becomes": row.becomes}
        plain(f"{row.id}  {row.title}")
        table(("", ""), [(k, v) for k, v in facts.items() if v])
    else:
        table(("id", "status", "room", "title"), [(p.id, p.status, p.room, p.title) for p in chosen])
        counts = {s: sum(p.status == s for p in chosen) for s in STATUSES}
        plain(f"{len(chosen)} papers: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n))
