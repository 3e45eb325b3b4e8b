"""luthier rebase: a delta onto an upgraded base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NOTHING = 3
"""Exit code where no way is fit to be shipped."""


def rebase(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A delta folder.", show_default=False)],
    onto: Annotated[str, typer.Option("--onto", help="The new base, by name or folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the delta to ship, rebase.json and rebase.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="Override any value of the plan: rebase.steps=0", show_default=False
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="What is measured, allowed and tried; default the delta's own plan.", show_default=False
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Put a delta on another base: ported, repaired the cheap ways, measured, and the one to ship chosen by rule.

    Exit code 0 where one is shipped, 3 where every way breaks a guard, 2 for bad input.
    """
    from luthier.cli.console import columns, plain, say
    from luthier.verbs.rebase import rebase as verb
    from luthier.verbs.rebase import table

    found = verb(delta, onto, plan, out=out, overrides=overrides or (), progress=(lambda _: None) if quiet else say)
    report = found.report
    plain("")
    columns(("way", "target", "over the new base", "worst guard", "flips", "seconds"), table(report))
    for name, why in report["not_tried"].items():
        plain(f"not tried: {name}: {why}")
    plain("")
    plain(f"{'ship ' + found.shipped if found.shipped else 'ship nothing'}: {report['why']}")
    plain(f"written to {found.out}")
    if not found.shipped:
        raise typer.Exit(NOTHING)
