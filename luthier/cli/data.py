"""luthier data: the records of a plan as the model will see them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.tune import Overrides

app = typer.Typer(help="Look at a plan's records.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """Look at a plan's records."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("show")
def show(
    plan: Annotated[Path, typer.Argument(help="The plan.", show_default=False)],
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many records.")] = 3,
) -> None:
    """Print the first rendered records with the supervised tokens coloured."""
    from luthier.bases.load import load_base
    from luthier.cli.console import out
    from luthier.data.show import show as render
    from luthier.plan.load import load_plan
    from luthier.training.goal import objective_of, rows_of
    from luthier.training.starts import inherited

    read, _ = inherited(load_plan(plan, overrides or (), methods=False))
    base = load_base(read.base, weights=False)
    rows = rows_of(objective_of(read, base.kind), base.kind)
    for part in render(read.data, base.tokenizer, n, kind=rows, labels=read.base.labels):
        out().print(part)
