"""A run on several processes, started by a launcher: what a chain does with each of its runs where one is named."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import LuthierError
from luthier.measuring.report import replace_text
from luthier.training.checkpoint import finished
from luthier.training.run import signals


@dataclass
class Launched:
    """What a launched run left."""

    report: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None


def words_of(launcher: str) -> list[str]:
    """A launcher's command line, split as a shell does. Errors: LuthierError for none, or one that is not installed."""
    try:
        words = shlex.split(launcher)
    except ValueError as e:
        raise LuthierError(f"launcher {launcher!r}: {e}: write it as in a shell") from e
    if not words or shutil.which(words[0]) is None:
        raise LuthierError(
            f"launcher {launcher!r}: no such command: name one that is installed, as in 'torchrun --nproc_per_node 2'"
        )
    return words


def launched(launcher: str, settings: Mapping[str, Any], out: Path, *, resume: bool, progress: bool) -> Launched:
    """Runs `LAUNCHER -m luthier tune OUT.yaml --out OUT` and waits for it.

    The plan is written beside the folder. Ctrl-C and SIGTERM are handed on once, as SIGTERM: the run saves and leaves.
    Errors: LuthierError where the launcher fails; what went wrong is what its processes said.
    """
    plan = out.with_name(f"{out.name}.yaml")
    replace_text(plan, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    command = [*words_of(launcher), "-m", "luthier", "tune", str(plan), "--out", str(out)]
    command += ["--resume"] * resume + ["--quiet"] * (not progress)
    asked: list[str] = []
    children: list[subprocess.Popen[bytes]] = []

    def stop(name: str) -> None:
        asked.append(name)
        for child in children:
            child.send_signal(signal.SIGTERM)

    with signals(stop):
        # In a session of its own a Ctrl-C does not reach it twice, which would end it unsaved.
        children.append(subprocess.Popen(command, start_new_session=True))
        if asked:
            children[0].send_signal(signal.SIGTERM)
        code = children[0].wait()
    if finished(out):
        path = out / "report.json"
        return Launched(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    if asked or not code:
        return Launched(stopped=asked[0] if asked else "a process was asked to stop")
    raise LuthierError(f"{shlex.join(command)} ended with code {code}: mend what it told, and go on with --resume")
