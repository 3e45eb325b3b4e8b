"""luthier tune: a plan, a base and records in; a delta and its report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Override any value of the plan: train.lr=1e-4", show_default=False),
]


def tune(
    plan: Annotated[
        Path, typer.Argument(help="The plan, a YAML file; docs/plan.md lists what it may state.", show_default=False)
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the delta, the report and the checkpoints.")
    ] = Path("out"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved plan, what will move, memory and time; no weights are read."
        ),
    ] = False,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--launcher",
            help="Of a chain: the command that starts each of its runs on several processes.",
            metavar="'torchrun …'",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Tune a base by a plan, and report what was gained and what it cost."""
    from luthier.errors import LuthierError
    from luthier.plan.stages import is_chain

    if is_chain(plan):
        if dry_run:
            raise LuthierError(f"{plan}: --dry-run is for one run; a chain's later stages need what the earlier write")
        from luthier.cli.console import say
        from luthier.cli.show import chain
        from luthier.verbs.stages import run_stages

        done = run_stages(
            plan, overrides=overrides or (), out=out, resume=resume, progress=not quiet, launcher=launcher, say=say
        )
        chain(done)
        return
    if launcher is not None:
        raise LuthierError(f"--launcher is for chains; start one run so: {launcher} -m luthier tune {plan}")
    if dry_run:
        if resume:
            raise LuthierError("--dry-run and --resume exclude each other: leave one out")
        from luthier.cli.show import dry_run as show
        from luthier.verbs.dry_run import dry_run as predict

        show(predict(plan, overrides=overrides or ()))
        return
    from luthier.cli.show import run as show_run
    from luthier.verbs.tune import tune as verb

    show_run(verb(plan, overrides=overrides or (), out=out, resume=resume, progress=not quiet))
