"""The command: ``python -m luthier.effects [NAME …]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.effects.contract import effect_named, effects, waiting
from luthier.effects.page import page
from luthier.effects.run import PROTOCOL, SEEDS, run, text_digest
from luthier.errors import LuthierError, in_one_line
from luthier.measuring.report import replace_text
from luthier.training.lock import locked

OUT = Path("effects-build")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the effects named, or all, and writes results.json and effects.md into --out, or where --record says."""
    parser = argparse.ArgumentParser(prog="python -m luthier.effects", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="effects to run (default: all)")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder of the cells that were run (default effects-build)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds of the runs that count (default {SEEDS})")
    parser.add_argument(
        "--record", type=Path, help="docs folder: results go to evidence/effects.json and effects.md there"
    )
    parser.add_argument("--list", action="store_true", help="say what there is and leave")
    told = parser.parse_args(arguments)
    try:
        if told.list:
            for name in effects():
                effect = effect_named(name)
                why = waiting(effect)
                sys.stdout.write(f"{name}: {effect.ABOUT}{f' (waiting for {why})' if why else ''}\n")
            return 0
        if told.workers < 1 or told.seeds < 2:
            raise LuthierError(f"effects: {told.workers} workers and {told.seeds} seeds; choose 1 and 2 at least")
        names = list(told.names)
        for name in names:
            effect_named(name)
        _run(names or list(effects()), told)
    except (LuthierError, OSError) as error:
        sys.stderr.write(f"{in_one_line(error)}\n")
        return 2
    return 0


def _run(names: list[str], told: argparse.Namespace) -> None:
    told.out.mkdir(parents=True, exist_ok=True)
    table = told.record / "evidence" / "effects.json" if told.record else told.out / "results.json"
    words = told.record / "effects.md" if told.record else told.out / "effects.md"
    results: dict[str, Any] = json.loads(table.read_text()) if table.is_file() else {}
    results = {name: results[name] for name in results if name in effects()}
    for name in names:
        with locked(told.out / name):
            results[name] = run(name, told.out, told.workers, told.seeds, _say)
        for claim in results[name]["claims"]:
            sys.stdout.write(f"{name}: {claim['says']}: {claim.get('reason', results[name].get('waiting'))}\n")
        results = {n: r | {"stale": n not in names and _stale(n, r)} for n, r in sorted(results.items())}
        replace_text(table, json.dumps(results, indent=1) + "\n")
        replace_text(words, page(results))


def _stale(name: str, told: Mapping[str, Any]) -> bool:
    """Whether the protocol, the effect or its bench is another than the one that these results are of. Another build of
    their base is none: it differs by rounding, which no two processors have in common."""
    return "key" in told and (told.get("protocol") != PROTOCOL or told.get("text") != text_digest(name))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
