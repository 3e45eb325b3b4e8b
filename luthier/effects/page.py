"""The effects table as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.effects.contract import effects

HEAD = """# Effects in the practice world

What the papers claim, looked for where the truth is known. Every row is a paired comparison over the same items and seeds,
five unless it says otherwise, every tuned arm at the smallest of equally many learning rates that is not shown to be worse than the best, the power stated from a pilot before the runs
that count ([practice.md](practice.md) tells the protocol). A verdict holds in this world; it does not say that a claim is
right or wrong elsewhere. Differences are method minus baseline; the interval is of 95 %; s.e. are standard errors. A base
that is built anew, on another processor or by another version, differs by rounding and by the end in scores of some points; a key tells the build.

    make practice-base NAME=s                     first: most of them are tuned on practice/s
    make effects                                  all of them, two processes; what was run before is not run again
    python -m luthier.effects forgetting          one of them
    python -m luthier.effects --list

"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of docs/effects.md from the results by effect."""
    lines = [HEAD]
    lines += [
        "| effect | claim | baseline | method | difference | s.e. | power | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, told in results.items():
        for claim in told["claims"]:
            lines.append(_row(name, told, claim))
    missing = [name for name in effects() if name not in results]
    lines += ["", f"Written and not run yet: {', '.join(missing)}.", ""] if missing else [""]
    for name, told in results.items():
        lines += _part(name, told)
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, told: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    sides = " | ".join(f"{side} {_number(told, side)}".strip() for side in claim["of"])
    if told.get("waiting"):
        return f"| {name} | {claim['says']} | {sides} | | | | *waiting for* {told['waiting']} |"
    low, high = claim["interval"]
    return (
        f"| {name} | {claim['says']} | {sides} | {claim['effect']:+.3f} [{low:+.3f}, {high:+.3f}] | "
        f"{abs(claim['errors']):.1f} | {claim['power']:.2f} | {claim['verdict']} |"
    )


def _number(told: Mapping[str, Any], side: str) -> str:
    means = told.get("means", {})
    return f"{means[side]:.3f}" if side in means else ""


def _part(name: str, told: Mapping[str, Any]) -> list[str]:
    lines = [f"## {name}", "", f"{told['about'][0].upper()}{told['about'][1:]}."]
    if told.get("waiting"):
        return [*lines, "", f"Waiting for {told['waiting']}.", ""]
    rates = "; ".join(
        f"{arm}: {', '.join(f'{r} ({s:.2f})' for r, s in a['tried'].items())}, best {a['rate']:g}"
        for arm, a in told["arms"].items()
        if a["tried"]
    )
    if told.get("stale"):
        lines += [
            "",
            "Measured by another protocol or with other settings than the effect has today; to be run again.",
        ]
    lines += ["", f"Base {told['base']}, {told['seeds']} seeds. Rates tried (score on the tuning items): {rates}."]
    lines += [f"{told['processor_seconds']} seconds of one core in all; key {told['key']}.", ""]
    lines += [f"* {claim['says']}: {claim['reason']}." for claim in told["claims"]]
    return [*lines, *([f"* {told['note']}"] if told.get("note") else []), ""]
