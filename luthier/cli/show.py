"""What commands print at their end: a run, a dry run, an audit, facts, checks."""

from __future__ import annotations

import json as writer
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from luthier.cli.console import out, plain, say, table
from luthier.measuring import words


def run(done: Any) -> None:
    """A finished run: what it learned and lost, what it cost, where things lie."""
    if done.stopped and not done.report:
        say(f"stopped ({done.stopped}); {done.remedy}")
        raise SystemExit(130)
    if not done.report:  # a process that writes nothing
        return
    cost = done.report["cost"]
    checks(done.report.get("audit") or {})
    plain("")
    plain(verdict(done.report.get("audit") or {}))
    facts = [f"{cost['steps']:,} steps", f"{cost['tokens']:,} tokens", words.duration(cost["seconds"])]
    facts += [f"{cost['parameters_moved']:,} numbers moved", f"peak memory {words.size(cost['peak_memory_bytes'])}"]
    plain(" · ".join(facts))
    for warning in done.report.get("warnings") or []:
        say(f"note: {warning}")
    plain(f"delta   {done.out}")
    plain(f"report  {Path(done.out) / 'report.html'}")


def chain(done: Any) -> None:
    """A finished chain: what each stage took and found."""
    table(
        ("stage", "verb", "time", "found"),
        [(row["name"], row["verb"], words.duration(row["seconds"]), row["verdict"] or "") for row in done.stages],
    )
    if done.report:
        checks(done.report.get("audit") or {})
    plain(f"stages  {done.out}")
    if done.stopped:
        say(f"stopped ({done.stopped}); go on with --resume --out {done.out}")
        raise SystemExit(130)


def verdict(found: Mapping[str, Any]) -> str:
    """An audit's finding in plain words."""
    told = found.get("verdict") or "not measured"
    return str(told["line"]) if isinstance(told, Mapping) else str(told)


def checks(found: Mapping[str, Any]) -> None:
    """The table of an audit: before, after and the difference with its interval, by check."""
    rows = []
    for kind, label in (("target", "target"), ("guards", "guard"), ("shifted", "shifted")):
        for c in found.get(kind) or []:
            say_it = (lambda x: words.percent(x)) if c["unit"] == "share" else words.quantity
            low, high = c["difference"]["low"], c["difference"]["high"]
            rows.append((label, c["name"], c["metric"], c["n"], say_it(c["before"]["value"]), say_it(c["after"]["value"]),
                         f"{say_it(c['difference']['value'])} [{say_it(low)}, {say_it(high)}]"))  # fmt: skip
    if rows:
        plain("")
        table(("", "check", "metric", "items", "before", "after", "difference [95 %]"), rows)
    if drift := found.get("drift"):
        plain(
            f"drift from the base: {drift['kl']['value']:.3g} nats a token, {words.percent(drift['agreement']['value'])} of next tokens the same"
        )


def dry_run(found: Any) -> None:
    """The resolved plan, what will move, and what it will take."""
    from luthier.plan.load import dump_plan

    plain(dump_plan(found.plan))
    rows = [
        (piece, role, found.sites[piece][role], n) for piece, roles in found.moving.items() for role, n in roles.items()
    ]
    table(("piece", "role", "places", "numbers"), rows, title="what will move")
    plain(
        f"{found.moved:,} of the base's {found.base_parameters:,} numbers, {words.percent(found.moved / found.base_parameters, 2)}"
    )
    rows_, length, supervised = found.batch
    plain("")
    facts = {
        "records": f"{found.rows:,}",
        "longest batch": f"{rows_} rows of {length} tokens, {supervised:,} supervised",
        "steps": f"{found.steps:,}",
        "precision": found.precision["name"],
        "device": found.device,
        "peak memory": f"{words.size(found.peak_memory)}, of it {words.size(found.tensors)} tensors ({words.size(found.weights)} weights); there are {words.size(found.memory)}",
        "time": f"about {words.duration(found.seconds)} of training",
    }
    table(("what it takes", ""), facts.items())
    for warning in found.warnings:
        say(f"note: {warning}")


def facts(found: Mapping[str, Any], json: bool = False) -> None:
    """A table of facts, nested ones indented; or JSON."""
    from luthier.measuring.report import plain as values

    if json:
        plain(writer.dumps(values(found), indent=1, ensure_ascii=False))
        return
    for line in _lines(values(found)):
        plain(line)


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    width = max((len(str(k)) for k in found), default=0)
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}"
            for row in value:
                yield f"{indent}  " + "  ".join(f"{k}: {_short(v)}" for k, v in row.items())
        else:
            yield f"{indent}{key:<{width}}  {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return words.quantity(value)
    text = "–" if value is None or value in ([], {}) else str(value)
    return text if len(text) <= 160 else text[:157] + "…"


def proof(found: Any) -> bool:
    """Checks of a verification, one a line with its remedy; gives whether all hold."""
    for check in found.checks:
        mark, style = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "dim")}[check.ok]
        out().print(mark, style=style, end=" ")
        plain(f"{check.name}: {check.detail}")
    plain("verified" if found.ok else "not verified")
    return bool(found.ok)
