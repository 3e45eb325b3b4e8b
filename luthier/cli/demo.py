"""luthier demo: the shortest way to see a model learn something, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.tune import Overrides
from luthier.errors import LuthierError

OURS = {
    *("delta.json", "delta.safetensors", "probes.safetensors", "README.md", "report.json", "report.html"),
    *("checkpoints", "logs", "audit", "log.jsonl", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
"""What a run leaves in its folder."""
MARK = ".luthier-demo"
"""The file that says that a folder is a demo's, and may be made anew."""


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
    from luthier.plan.load import load_plan
    from luthier.verbs.tune import tune

    with as_file(files("luthier.assets").joinpath("demo.yaml")) as path:
        plan = load_plan(path, overrides or ())
    _clear(out)
    say("Tuning the built-in practice base on a language it was never taught; then measuring what it gained and lost.")
    show_run(tune(plan, out=out))


def _clear(out: Path) -> None:
    """Takes away what an earlier demo left, so that the demo can be run any number of times; nothing else is touched."""
    import shutil

    from luthier.training.lock import locked

    if out.exists() and (not out.is_dir() or (not (out / MARK).exists() and any(out.iterdir()))):
        raise LuthierError(f"{out} is not the report of an earlier demo: move it away, or choose another --out")
    with locked(out):
        for name in OURS:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
        (out / MARK).write_text("luthier demo replaces what lies here\n", encoding="utf-8")
