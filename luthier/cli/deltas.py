"""Commands on finished deltas: audit, inspect, verify, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="DELTA", help="A delta folder.", show_default=False)]
BaseName = Annotated[
    str | None,
    typer.Option("--base", help="Base by name or folder; default the one the delta names.", show_default=False),
]


def audit(
    delta: Folder,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="Plan whose audit section says what to measure; default the delta's own.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Override any value of the plan.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report; default DELTA/audit.", show_default=False)
    ] = None,
) -> None:
    """Measure a delta on its base: what it gained on its target and what it cost elsewhere."""
    from luthier.cli.console import plain, say
    from luthier.cli.show import checks, verdict
    from luthier.verbs.audit import audit as verb

    found = verb(delta, plan=plan, overrides=overrides or (), out=out, progress=say)
    checks(found.report["audit"])
    plain("")
    plain(verdict(found.report["audit"]))
    plain(f"report  {found.out / 'report.html'}")


def inspect(delta: Folder, json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False) -> None:
    """Show what a delta holds: pieces, sites, numbers, norms, base and lineage."""
    from luthier.cli.show import facts
    from luthier.verbs.inspect import inspect as verb

    facts(verb(delta), json)


def verify(
    path: Annotated[
        Path, typer.Argument(help="A delta or PEFT folder, or a merged checkpoint with --base.", show_default=False)
    ],
    base: BaseName = None,
    merged: Annotated[
        str | None, typer.Option("--merged", help="A merged checkpoint that should contain PATH.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Hash every value of the base, not a sample of them.")] = False,
) -> None:
    """Prove that a delta is whole and is there: digests, fingerprints, seals and probes. Exit code 1 where it is not."""
    from luthier.cli.show import proof
    from luthier.verbs.verify import verify as verb

    if not proof(verb(path, base=base, merged=merged, full=full)):
        raise typer.Exit(1)


def export(
    delta: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="hf: a checkpoint with the delta folded in; peft: an adapter folder.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    base: BaseName = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type the base is held and written in: float32, bfloat16 …", show_default=False)
    ] = None,
) -> None:
    """Write a delta in a format of other tools."""
    from luthier.cli.console import plain
    from luthier.verbs.export import export as verb

    verb(delta, to=to, out=out, base=base, **({"dtype": dtype} if dtype else {}))
    plain(f"written to {out}")


def import_(
    peft: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="An adapter folder of PEFT.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta folder to write.", show_default=False)],
    base: BaseName = None,
) -> None:
    """Turn an adapter folder of PEFT into a delta."""
    from luthier.cli.console import plain
    from luthier.verbs.import_ import import_ as verb

    verb(peft, out=out, base=base)
    plain(f"written to {out}")
