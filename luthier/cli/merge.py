"""luthier merge: models, or deltas on one base, to one of their kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def merge(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PLAN.yaml | MODEL… [KEY=VALUE]…",
            help="A plan (mergekit's files too), or the models: folders, hub names, delta folders, NAME+ADAPTER. "
            "KEY=VALUE sets a parameter of the method or a key of the plan: weight=0.5",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default=False)] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="linear, ties, slerp …", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="What the models were tuned from.", show_default=False)
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="One for each model, in their order.", show_default=False),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the methods and their parameters.")] = False,
    sync: Annotated[bool, typer.Option("--sync", help="Return only when the disk holds what was written.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Merge models, or deltas on one base, tensor by tensor in little memory. Reads mergekit's files as they are."""
    from luthier.errors import LuthierError

    if listed:
        _list()
        return
    if not models:
        raise LuthierError("nothing to merge: name a plan, or models and --method ('luthier merge --list' shows them)")
    if out is None:
        raise LuthierError("where to? state the folder to write (--out DIR)")
    names = [m for m in models if "=" not in m or Path(m).exists()]
    overrides = [m for m in models if m not in names]
    plan: Any = {"models": [{"model": m} for m in names]}
    if len(names) == 1 and names[0].endswith((".yaml", ".yml")) and not Path(names[0]).is_dir():
        plan = Path(names[0])
        if method or base or weight:
            raise LuthierError("--method, --base and --weight go with models: with a plan write method=…, base=…")
    elif method is None:
        raise LuthierError("which merge? state --method ('luthier merge --list' shows them)")
    else:
        plan |= {"method": method} | ({"base": base} if base else {}) | ({"weights": weight} if weight else {})
    _run(plan, out, overrides, sync, quiet)


def _run(plan: Any, out: Path, overrides: list[str], sync: bool, quiet: bool) -> None:
    from luthier.cli.console import err, plain
    from luthier.errors import LuthierError
    from luthier.plan.load import read_plan

    if isinstance(plan, Path) and "experts" in read_plan(plan)[1]:
        from luthier.verbs.moe import moe

        if overrides:
            raise LuthierError(f"a plan with experts takes no {overrides[0]}: write it into {plan}")
        mixture = moe(plan, out=out, sync=sync)
        for note in mixture.notes:
            err().print(f"note: {note}", markup=False, highlight=False)
        plain(f"{mixture.family} of {mixture.experts} experts, {mixture.numbers / 1e6:,.1f} M numbers")
        plain(f"written to {mixture.out}")
        return
    from luthier.verbs.merge import merge as verb

    def show(done: int, of: int) -> None:
        if not quiet and err().is_terminal:
            err().print(f"\r{done} of {of} tensors", end="", markup=False, highlight=False)

    try:
        made = verb(plan, out=out, overrides=overrides, sync=sync, progress=show)
    except MemoryError as e:
        raise LuthierError("out of memory: close other programs, or merge with fewer models at once") from e
    for note in made.notes:
        err().print(f"note: {note}", markup=False, highlight=False)
    for key, values in made.each.items():
        plain(f"{key}  {', '.join(f'{v:.4g}' for v in values)}")
    plain(
        f"{made.kind} of {made.tensors} tensors, {made.numbers / 1e6:,.1f} M numbers, by {made.method} in {made.seconds:.1f} s"
    )
    plain(f"written to {made.out}")


def _list() -> None:
    from luthier.cli.console import table
    from luthier.delta import MERGES

    rows = []
    for name, cls in MERGES.items():
        least, most = cls.models
        count = f"{least}" if least == most else f"{least}+" if most is None else f"{least}-{most}"
        own = [k if d is None else f"{k}={d:g}" for k, d in cls.each.items()]
        rows.append((name, cls.base, count, ", ".join([*own, *_settings(cls)]), cls.paper))
    table(["method", "base", "models", "parameters", "paper"], rows)


def _settings(cls: Any) -> list[str]:
    import dataclasses

    rows = []
    for f in dataclasses.fields(cls):
        name = f.name.rstrip("_")
        given = f.default if f.default is not dataclasses.MISSING else None
        rows.append(name if given is None else f"{name}={given}")
    return rows
