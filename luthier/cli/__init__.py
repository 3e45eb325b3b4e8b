"""The command line. `main` is its one door: every mistake leaves as one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 1 a check said no, 2 a mistake told in one line, 130 interrupted.

    LUTHIER_TRACE=1 shows where an error came from.
    """
    from luthier.errors import LuthierError, in_one_line

    if os.environ.get("LUTHIER_TRACE") in (None, "", "0"):
        try:
            code = _run(argv)
        except LuthierError as e:
            code = _fail(str(e))
        except KeyboardInterrupt:
            code = _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of a pipe left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        except OSError as e:
            code = _fail(f"{in_one_line(e)} (LUTHIER_TRACE=1 shows where)")
    else:
        code = _run(argv)
    raise SystemExit(code)


def _run(argv: Sequence[str] | None) -> int:
    from typer import Abort, BadParameter

    from luthier.cli.app import command

    # typer brings its own click or uses the installed one; either way these are the parents of its public error.
    UsageError: Any = BadParameter.__mro__[1]
    ClickException: Any = BadParameter.__mro__[2]

    args = list(sys.argv[1:] if argv is None else argv)
    if blank := _blank(args):
        return _fail(blank)
    try:
        result = command().main(args, prog_name="luthier", standalone_mode=False)
    except Abort as e:
        raise KeyboardInterrupt from e
    except UsageError as e:
        path = e.ctx.command_path if e.ctx else "luthier"
        said = " ".join(e.format_message().split()).rstrip(".")
        return _fail(f"{path}: {said}: see '{path} --help'") if said else 2
    except ClickException as e:
        return _fail(" ".join(e.format_message().split()))
    if result == INTERRUPTED:  # typer answers Ctrl-C with the code alone
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _blank(args: Sequence[str]) -> str | None:
    """What to say about an argument that is empty, as one from an unset variable of a shell is; else None.

    An empty path would mean the folder one stands in.
    """
    for n, argument in enumerate(args):
        before = args[n - 1] if n else ""
        if argument.startswith("--") and argument.endswith("="):
            return f"{argument[:-1]} is empty: give it a value, or leave it out"
        if not argument.strip():
            what = before if before.startswith("-") else f"argument {n + 1}"
            return f"{what} is empty: give it a value, or leave it out"
    return None


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code
