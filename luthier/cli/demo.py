"""luthier demo: the shortest way to see a model learn something, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.tune import Overrides


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the delta and the report.")] = Path(
        "demo-report"
    ),
) -> None:
    """Tune the built-in practice base on a task it was never taught, audit it, and write a report. Minutes on two cores."""
    from importlib.resources import as_file, files

    from luthier.cli.console import say
    from luthier.cli.show import run as show_run
    from luthier.verbs.tune import tune

    say("Tuning the built-in practice base on a language it was never taught; then measuring what it gained and lost.")
    with as_file(files("luthier.assets").joinpath("demo.yaml")) as plan:
        show_run(tune(plan, overrides=overrides or (), out=out))
