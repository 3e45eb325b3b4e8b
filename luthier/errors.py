"""The one error type of the project: a user's mistake or bad luck, told in one line with its remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MANY, FEW = 24, 5
"""More names than `MANY` are not listed behind a close one; the closest `FEW` are."""


class LuthierError(Exception):
    """What went wrong, where, and what to do about it, in one line. The command line prints it and exits with code 2."""


def in_one_line(error: LuthierError | OSError) -> str:
    """What a command ends with: our own line, or what the system refused (a disk, a permission, a network) and of which file."""
    if isinstance(error, LuthierError):
        return str(error)
    of = f"{error.filename}: " if error.filename else ""
    return f"{of}{error.strerror or error}: mend that, then run the command again"


def nearest(word: str, known: Iterable[str], what: str = "name", most: int | None = None) -> str:
    """The tail of an error about an unknown word: the closest known one if any is close, and all of them, or the closest
    few where there are more than `MANY`. `most`: how many are listed where none is close, if not all.

    >>> nearest("loar", ["lora", "dora"], "form")
    "did you mean 'lora'? (forms: dora, lora)"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, FEW, 0.5)
    plural = what + ("es" if what.endswith(("s", "x", "ch")) else "s")
    left = len(names[most:]) if most else 0
    listed = f"{plural}: {', '.join(names[:most]) or 'none'}" + (f" and {left} more" if left else "")
    if close and len(names) > MANY:
        listed = f"nearest of {len(names)} {plural}: {', '.join(close)}"
    return f"did you mean '{close[0]}'? ({listed})" if close else listed
