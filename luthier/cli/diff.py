"""luthier diff: two checkpoints in, a delta out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diff(
    base: Annotated[
        str, typer.Argument(help="The checkpoint before: a folder, a hub name, or practice.", show_default=False)
    ],
    tuned: Annotated[str, typer.Argument(help="The checkpoint after, of the same architecture.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta folder to write.", show_default=False)],
    exact: Annotated[bool, typer.Option("--exact", help="Every changed parameter, bit for bit (the default).")] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Extract a LoRA of at most this rank.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", help="… of the rank that holds this share of each change's squared norm.", show_default=False
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", help="… without singular values below this share of the largest.", show_default=False),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            help="Role or name of weights to decompose; may be repeated. Default: all linear maps.",
            show_default=False,
        ),
    ] = None,
    rest: Annotated[
        str, typer.Option("--rest", help="What else changed (embeddings, norms, biases): exact or drop.")
    ] = "exact",
    probes: Annotated[
        bool, typer.Option("--probes/--no-probes", help="Record probes where the base fits in memory.")
    ] = True,
) -> None:
    """The delta between a base and a model tuned from it: exact, or as the nearest LoRA."""
    from luthier.cli.console import plain, say, table
    from luthier.errors import LuthierError
    from luthier.measuring import words
    from luthier.verbs.diff import diff as verb

    if exact and any(v is not None for v in (rank, energy, ratio)):
        raise LuthierError("--exact and --rank, --energy, --ratio exclude each other: leave one out")
    found = verb(
        base, tuned, out=out, rank=rank, energy=energy, ratio=ratio, sites=site or (), rest=rest, probes=probes
    )  # pyright: ignore
    rows = []
    for row in (r.to_dict() for r in found.rows):
        low, high = row["ranks"] or (None, None)
        ranks = "" if low is None else str(low) if low == high else f"{low} to {high}"
        size = "" if row["size"] is None else words.percent(row["size"], 2)
        rows.append(
            (
                row["role"],
                row["tensors"],
                row["changed"],
                row["numbers"],
                row["kept"],
                ranks,
                size,
                words.percent(row["error"], 1),
            )
        )
    table(("role", "tensors", "changed", "numbers", "kept", "rank", "change / weight", "error"), rows)
    for note in found.notes:
        say(f"note: {note}")
    plain(f"delta   {out}  {words.size(found.bytes)}")
