"""luthier compress: a tuned model's change in a few bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compress(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="DELTA|BASE TUNED|PLAN [KEY=VALUE]…",
            help="A delta or PEFT folder; or a base and a tuned checkpoint; or a YAML plan. Then settings: density=0.1",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The delta folder to write.", show_default=False)],
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Compression by name; default bitdelta.", show_default=False)
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration", "-c", help="Text to calibrate on: a file, or practice:FAMILY.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base of a delta; default the one it names.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on the way.")] = False,
) -> None:
    """Put a tuned model's change into a few bits a weight, and say what that loses."""
    from luthier.cli.console import plain, say, table
    from luthier.errors import LuthierError
    from luthier.verbs.compress import compress as verb

    places = [s for s in sources if "=" not in s or Path(s).exists()]
    overrides = [s for s in sources if s not in places]
    if not 1 <= len(places) <= 2:
        raise LuthierError("compress takes a delta, or a base and a tuned checkpoint: name one or two folders")
    stated = {k: v for k, v in (("calibration", calibration), ("base", base)) if v}
    found = verb(
        *places, method=method, out=out, overrides=overrides, progress=(lambda _: None) if quiet else say, **stated
    )
    report = found.report
    table(
        ("role", "kept", "matrices", "weights", "bits/weight", "error"),
        [
            (r["role"], r["kept"], r["matrices"], r["weights"], f"{r['bits']:.3f}", f"{r['error']:.1%}")
            for r in report["roles"]
        ],
    )
    total, far = report["total"], report["logits"]
    plain("")
    plain(f"matrices  {total['matrices_bits']:.3f} bits/weight, error {total['matrices_error']:.1%}")
    plain(
        f"file      {total['file_bytes']:,} bytes, {total['file_bits']:.2f} bits/weight: {total['file_ratio_16']:.1f}× "
        "smaller than the model in 16 bits"
    )
    for key, words in (("compressed", "compressed"), ("tuned", "tuned on the text"), ("base", "base")):
        if key in far:
            plain(f"logits    {far[key]:.4g} from the tuned model's (root mean square), {words}")
    for note in report["notes"]:
        say(f"note: {note}")
    plain(f"written to {out}")
