"""luthier gate: a release verdict for continuous integration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

REFUSED = 3
"""Exit code of a gate that does not let the new model through."""


def gate(
    old: Annotated[
        str, typer.Argument(help="'base', a delta or PEFT folder, a base's name, a checkpoint.", show_default=False)
    ],
    new: Annotated[str, typer.Argument(help="What is to replace it; the same kinds.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="Override any value of the plan: gate.min_gain=0.1", show_default=False
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="What is measured (audit) and what is allowed (gate).", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for gate.json and gate.html; default NEW/gate.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """May NEW replace OLD? Gain, negative flips, drift, refusals and calibration against limits.

    Exit code 0 where all limits are kept, 3 where one is broken or cannot be told, 2 for bad input.
    """
    from luthier.cli.console import plain, say
    from luthier.errors import LuthierError
    from luthier.verbs.gate import gate as verb

    if plan is None:
        raise LuthierError("luthier gate: --plan is missing: give the plan whose audit says what to measure")
    found = verb(old, new, plan, overrides=overrides or (), out=out, progress=(lambda _: None) if quiet else say)
    plain("")
    lines(found.report["lines"])
    plain("")
    plain(f"{found.verdict}: {found.report['why']}")
    if found.report["unmeasured"]:
        plain(f"not measured: {', '.join(found.report['unmeasured'])}")
    plain(f"report  {found.out / 'gate.html'}")
    if not found.passed:
        raise typer.Exit(REFUSED)


def lines(found: list[dict[str, Any]]) -> None:
    """The table of a gate, one line each; changes of shares are in points. Below it, what would settle a line that cannot be told."""
    from luthier.cli.console import columns, plain
    from luthier.measuring.gate_page import rows

    shown = [
        (f"{r['mark']} {r['what']}", r["check"], f"{r['n']:,}", r["sides"], r["moved"], r["allowed"], f"±{r['shows']}")
        for r in rows(found)
    ]
    columns(("", "check", "items", "old → new", "change [95 %]", "allowed", "can show"), shown)
    for r in rows(found):
        if r["verdict"] == "underpowered":
            plain(f"{r['mark']} {r['what']}, {r['check']}: {r['told']}")
