"""luthier port and luthier assemble: a delta on another base, by its weights or by what it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Settings of the move, or any value of the plan.", show_default=False),
]


def port(
    delta: Annotated[
        Path, typer.Argument(metavar="DELTA", help="A delta or PEFT folder, or a plan (YAML).", show_default=False)
    ],
    settings: Settings = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto", help="The new base by name or folder, or a delta folder: the model it makes.", show_default=False
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="portllm (default), fine-tuning-transfer, instruction-residual.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The old base; default as the delta names it.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write; new or empty.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Carry a delta onto another version of its base, without training: the same change of the weights."""
    from luthier.cli.console import plain, say, table
    from luthier.cli.show import facts
    from luthier.errors import LuthierError
    from luthier.verbs.port import port as verb

    if out is None:
        raise LuthierError("luthier port: state --out DIR, the folder that the ported delta goes to")
    done = verb(delta, onto, method=method, out=out, base=base, overrides=settings or (), progress=say)
    if json:
        facts({"out": str(out), **done.report}, json=True)
        return
    table(
        ("piece", "form", "on the new base", "preserved"), [(p.piece, p.form, p.now, p.preserved) for p in done.pieces]
    )
    if found := done.connectivity:
        plain("")
        rows = zip(found["places"], found["losses"], strict=True)
        table(
            ("from the old base to the new", "loss in nats a token"), [(f"{t:.0%}", f"{loss:.4f}") for t, loss in rows]
        )
        told = (
            "no barrier to speak of: the bases are linearly connected"
            if found["connected"]
            else f"the bases are not linearly connected: expect little of the transfer (tolerance {found['tolerance']:g})"
        )
        plain(f"barrier {found['barrier']:.4f} nats on {found['text']} ({found['tokens']:,} tokens): {told}")
    for note in done.notes:
        say(f"note: {note}")
    plain(f"delta   {out}")


def assemble(
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A plan (YAML), instead of the options.", show_default=False)
    ] = None,
    settings: Settings = None,
    large: Annotated[
        str | None, typer.Option("--large", help="The model to steer: a base, or a delta on one.", show_default=False)
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            help="A small tuned model: a delta, or a checkpoint; may be given several times.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            "--base", help="The same untuned, one for each expert; default the base of its delta.", show_default=False
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="proxy (default), emulated-fine-tuning, dynamic-fusion.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write; new or empty.", show_default=False)
    ] = None,
) -> None:
    """Wire small models, tuned and untuned, to steer a large one while it writes; the folder answers like a delta."""
    from luthier.cli.console import plain, say, table
    from luthier.errors import LuthierError
    from luthier.verbs.assemble import assemble as verb

    given = list(settings or ())
    if plan is not None and "=" in plan.name and not plan.exists():  # a setting in the plan's place
        given.insert(0, str(plan))
        plan = None
    if out is None:
        raise LuthierError("luthier assemble: state --out DIR, the folder that the assembly goes to")
    if plan is not None and (large or expert or base or method):
        raise LuthierError("luthier assemble: give a plan or the options --large, --expert, --base, --method; not both")
    if plan is None and not (large and expert):
        raise LuthierError("luthier assemble: give a plan, or --large MODEL and --expert DELTA")
    if base and len(base) != len(expert or ()):
        raise LuthierError(
            f"luthier assemble: {len(base)} --base for {len(expert or ())} --expert: give one for each, or none"
        )
    pairs = [{"expert": e, **({"base": base[n]} if base else {})} for n, e in enumerate(expert or ())]
    stated = plan if plan is not None else {"large": large, "pairs": pairs, **({"method": method} if method else {})}
    done = verb(stated, out=out, overrides=given, progress=say)
    rows = [(role, m.base.get("name"), sum(d.count() for d in m.deltas)) for role, m in done.wiring.members()]
    table(("part", "base", "numbers of its deltas"), rows)
    held = len(done.model.models)
    plain(
        f"{len(done.model.voices)} voices of {held} model{'s' if held > 1 else ''} in memory, {done.model.vocabulary:,} tokens"
    )
    plain(f"fingerprint {done.wiring.fingerprint}")
    plain(f"assembly {out}")
