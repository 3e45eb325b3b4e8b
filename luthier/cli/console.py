"""Where commands write: results to stdout, remarks to stderr, both through rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@cache
def out() -> Console:
    """The console on stdout."""
    from rich.console import Console

    return Console(soft_wrap=True)


@cache
def err() -> Console:
    """The console on stderr."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints a table; text from files is shown as it is, never read as markup."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        *columns, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for row in rows:
        drawn.add_row(*(Text(_shown(v)) for v in row))
    out().print(drawn, soft_wrap=False)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows of text under each other, one line each however wide: for tables that are read by programs too."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        plain("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def plain(text: str, **options: Any) -> None:
    """Prints text as it is: no markup, no highlighting, no wrapping."""
    out().print(text, markup=False, highlight=False, **options)


def say(text: str, **options: Any) -> None:
    """A remark on stderr."""
    err().print(text, markup=False, highlight=False, **options)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
