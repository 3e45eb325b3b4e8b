"""luthier edit: facts changed, or text forgotten, and what it did to everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def edit(
    base: Annotated[str, typer.Argument(help="The base by name or folder.", show_default=False)],
    records: Annotated[
        str, typer.Argument(help="Records, a line each; practice:edits or practice:forget.", show_default=False)
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Settings of the method and of the plan.", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="rome, memit, locft, mend …", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The delta folder to write.", show_default=False)
    ] = None,
    score: Annotated[bool, typer.Option("--score", help="Measure efficacy, locality, fluency, general loss.")] = False,
    of: Annotated[
        Path | None,
        typer.Option("--of", help="Edit nothing: score this delta on the records.", show_default=False),
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="With --of: the records are to be forgotten.")] = False,
) -> None:
    """Change facts or forget text by a method, without touching the base; --score says what it did."""
    from luthier.cli.console import plain, say
    from luthier.errors import LuthierError

    if of is not None:
        from luthier.plan.load import override
        from luthier.verbs.edit import score as measure

        if method is not None or out is not None:
            raise LuthierError("--of measures a delta that is there: leave out --method and --out")
        stated: dict[str, Any] = {}
        for text in settings or ():
            override(stated, text)
        known = ("text", "template", "general_tokens", "resamples", "seed")
        if odd := [k for k in stated if k not in known]:
            raise LuthierError(f"--of knows no setting '{odd[0]}': settings: {', '.join(known)}")
        _show(measure(base, of, records, task="forget" if forget else "edit", **stated))
        return
    if method is None or out is None:
        raise LuthierError("state --method and --out, or --of to measure a delta that is there")
    from luthier.verbs.edit import edit as verb

    plan = {"base": base, "records": records, "method": method, "score": score}
    done = verb(plan, out=out, overrides=settings or (), progress=say)
    if done.scorecard is not None:
        _show(done.scorecard)
        plain("")
    plain(f"{method}: {int(done.cost['numbers']):,} numbers, {done.cost['seconds']:.1f} s; written to {done.out}")


def _show(card: Any) -> None:
    """The scorecard as a table."""
    from luthier.cli.console import plain, table

    rows = [
        (
            line.name,
            line.n,
            f"{line.before:.3g}",
            f"{line.after.value:.3g}",
            f"{line.gap.value:+.3g} [{line.gap.low:+.3g}, {line.gap.high:+.3g}]",
            " ".join(filter(None, (line.unit, line.note))),
        )
        for line in card.lines
    ]
    table(("", "n", "before", "after", "difference [95 %]", ""), rows)
    if card.missing:
        plain(f"not measured, the records name nothing for it: {', '.join(card.missing)}")
