"""The commands by name. Nothing heavy is imported here or at the top of a command's file: help starts in a blink."""

from __future__ import annotations

from typing import Any

import typer
from typer.main import get_command

from luthier.cli import (
    compress,
    data,
    deltas,
    demo,
    diff,
    doctor,
    edit,
    gate,
    merge,
    papers,
    port,
    rebase,
    serve,
    talk,
    tune,
)

app = typer.Typer(
    name="luthier",
    help="Adapt language models, and know what each change gained and what it cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and leave.")
) -> None:
    if version:
        from luthier import __version__
        from luthier.cli.console import out

        out().print(f"luthier {__version__}", highlight=False)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("tune")(tune.tune)
app.command("edit")(edit.edit)
app.command("audit")(deltas.audit)
app.command("gate")(gate.gate)
app.command("inspect")(deltas.inspect)
app.command("verify")(deltas.verify)
app.command("export")(deltas.export)
app.command("diff")(diff.diff)
app.command("compress")(compress.compress)
app.command("merge")(merge.merge)
app.command("import")(deltas.import_)
app.command("port")(port.port)
app.command("rebase")(rebase.rebase)
app.command("assemble")(port.assemble)
app.command("generate")(talk.generate)
app.command("chat")(talk.chat)
app.command("serve")(serve.serve)
app.add_typer(data.app, name="data")
app.command("papers")(papers.papers)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def command() -> Any:
    """The click command behind the app."""
    return get_command(app)
