"""luthier doctor: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False) -> None:
    """Look at versions, hardware, memory, disk and network settings. Exit code 1 where something keeps luthier from running."""
    import json as writer

    from luthier.cli.console import plain
    from luthier.verbs.doctor import doctor as verb

    findings = verb()
    if json:
        plain(writer.dumps([f.__dict__ for f in findings], indent=1, ensure_ascii=False))
    else:
        for f in findings:
            plain(f"{ {'ok': '✓', 'note': '·', 'bad': '✗'}[f.state] } {f.what:<14} {f.found}")
            if f.remedy:
                plain(f"  {'':<14} → {f.remedy}")
    if any(f.state == "bad" for f in findings):
        raise typer.Exit(1)
