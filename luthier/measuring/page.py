"""From the report's dict to what the page shows: rows, plots and words. No markup but what `plots` draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.measuring import plots, words

_GROUPS = {
    "target": ("Target", "what the tuning is for"),
    "guards": ("Guards", "what must not be lost"),
    "shifted": ("Shifted", "the target under shift"),
}


def page(data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template reads, from the report's dict (docs/report.md)."""
    audit = data.get("audit") or {}
    return {
        "verdict": words.verdict(audit),
        "groups": [_group(kind, audit.get(kind) or []) for kind in _GROUPS if audit.get(kind)],
        "drift": _drift(audit.get("drift")),
        "curves": _curves(data),
        "heat": _heat(data.get("norms") or []),
        "facts": _facts(data),
        "pieces": _pieces(data.get("delta") or {}),
        "ledger": words.flat(data.get("ledger") or {}),
        "cost": words.flat(data.get("cost") or {}),
        "versions": words.flat(data.get("versions") or {}),
        "proof": _proof(data.get("proof") or {}),
        "warnings": [str(w) for w in data.get("warnings") or []],
        "plan": json.dumps(data.get("plan") or {}, indent=2, ensure_ascii=False),
        "base": data.get("base") or {},
    }


def _group(kind: str, checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    title, told = _GROUPS[kind]
    return {"kind": kind, "title": title, "told": told, "checks": [_check(c, kind) for c in checks]}


def _check(check: Mapping[str, Any], kind: str) -> dict[str, Any]:
    scale = plots.check_scale(check)
    return {
        "name": check["name"],
        "metric": check["metric"],
        "n": words.quantity(check["n"]),
        "before": words.score(check, check["before"].get("value")),
        "after": words.score(check, check["after"].get("value")),
        "change": words.change(check),
        "way": words.direction(check),
        "plot": plots.dots(check),
        "ends": (words.score(check, scale.low), words.score(check, scale.high)),
        "counts": _counts(check),
        "detectable": _detectable(check),
        "lower": check.get("better") == "lower",
        "samples": [_sample(s, check) for s in check.get("samples") or []],
        "kind": kind,
    }


def _counts(check: Mapping[str, Any]) -> str:
    """What turned, what could not be decided, what was left out: in words, only where there is any."""
    turned, undecided, dropped = (check.get(k) or {} for k in ("flips", "undecided", "dropped"))
    told = [f"{turned['positive']} newly right, {turned['negative']} newly wrong"] if turned else []
    unclear = max(undecided.values(), default=0)
    told += [f"{unclear} undecided, counted as wrong"] if unclear else []
    told += [f"{count} left out: {reason}" for reason, count in dropped.items()]
    return " · ".join(told)


def _detectable(check: Mapping[str, Any]) -> str:
    least = check.get("detectable")
    if least is None:
        return "–"
    return f"{100 * least:.0f} points" if check.get("unit") == "share" else f"{least:.2g}"


def _sample(sample: Mapping[str, Any], check: Mapping[str, Any]) -> dict[str, Any]:
    return {**sample, "sides": [_side(sample[moment], moment, check) for moment in ("before", "after")]}


def _side(answer: Mapping[str, Any], moment: str, check: Mapping[str, Any]) -> dict[str, Any]:
    value = answer.get("value")
    graded = check.get("unit") == "share" and value is not None
    mark = ("right" if value >= 1 else "wrong" if value <= 0 else "partly") if graded and value is not None else "plain"
    return {**answer, "moment": moment, "mark": mark, "score": words.score(check, value)}


def _drift(drift: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not drift:
        return []
    kl, same = drift["kl"], drift["agreement"]
    return [
        ("KL(base ‖ tuned) per token", f"{kl['value']:.3g}{_between(kl, lambda x: f'{x:.3g}')} nats"),
        ("same most likely token", words.percent(same["value"], 1) + _between(same, lambda x: f"{100 * x:.1f}")),
        ("measured on", f"{words.quantity(drift['tokens'])} tokens in {drift['sequences']} texts of {drift['source']}"),
    ]


def _between(interval: Mapping[str, Any], said: Callable[[float], str]) -> str:
    """' [low, high]', or nothing where one text gave no interval."""
    low, high = interval.get("low"), interval.get("high")
    return "" if low is None or high is None else f" [{said(low)}, {said(high)}]"


def _series(rows: list[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(r["step"]), float(r[key])) for r in rows if r.get(key) is not None]


def _curves(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    curve, evals = list(data.get("curve") or []), list(data.get("evals") or [])
    loss = _series(curve, "loss")
    held = _series(evals, "loss")
    drawn = [
        ("Loss", "tall", [plots.Line("raw", plots.thin(loss)), plots.Line("train", plots.thin(plots.smooth(loss))),
                          plots.Line("eval", held, marks=True)], "{:.3g}"),
        ("Learning rate", "small", [plots.Line("rate", plots.thin(_series(curve, "lr")))], "{:.2g}"),
        ("Gradient norm", "small", [plots.Line("norm", plots.thin(_series(curve, "grad_norm")))], "{:.2g}"),
    ]  # fmt: skip
    out = []
    for title, size, lines, form in drawn:
        box = plots.limits(lines)
        if box is None:
            continue
        (x0, x1), (y0, y1) = box
        out.append({
            "title": title, "size": size, "note": _loss_unit(data) if title == "Loss" else "", "plot": plots.curve(lines, f"{title} by step"),
            "x": (words.quantity(x0), words.quantity(x1)), "y": (form.format(y0), form.format(y1)),
            "legend": [n for n, have in (("train", bool(loss)), ("eval", bool(held))) if have] if title == "Loss" else [],
        })  # fmt: skip
    return out


def _loss_unit(data: Mapping[str, Any]) -> str:
    """What the loss is in; '' for objectives that have a scale of their own."""
    plan = data.get("plan") or {}
    stated = [plan.get(k) for k in ("objective", "base")]
    objective, base = (s if isinstance(s, Mapping) else {"name": s} if s else {} for s in stated)
    if objective.get("name", "sft") != "sft":
        return ""
    return f"loss in nats a {'record' if base.get('kind') == 'classify' else 'token that carries loss'}"


def _heat(norms: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Roles by layers; a cell is the norm of the change relative to the base's (or plain, where that is unknown)."""
    known = [r for r in norms if r.get("norm") is not None]
    notes = sorted({str(r["note"]) for r in norms if r.get("note")})
    if not known:
        return {"rows": [], "layers": [], "notes": notes} if notes else None
    relative = all(r.get("relative") is not None for r in known)
    key = "relative" if relative else "norm"
    layers = sorted({r["layer"] for r in known if r.get("layer") is not None})
    columns = layers + ([None] if any(r.get("layer") is None for r in known) else [])
    cells: dict[tuple[str, Any], float] = {}
    for row in known:
        at = (str(row["role"]), row.get("layer"))
        cells[at] = (cells.get(at, 0.0) ** 2 + row[key] ** 2) ** 0.5
    most = max(cells.values()) or 1.0
    roles = list(dict.fromkeys(str(r["role"]) for r in known))
    rows = [
        {"role": role, "cells": [_cell(cells.get((role, layer)), most, relative) for layer in columns]}
        for role in roles
    ]
    return {
        "rows": rows, "layers": ["–" if c is None else str(c) for c in columns], "notes": notes,
        "unit": "per cent of the base's norm" if relative else "Frobenius norm", "dense": len(columns) > 16,
    }  # fmt: skip


def _cell(value: float | None, most: float, relative: bool) -> dict[str, str] | None:
    if value is None:
        return None
    shown = 100 * value if relative else value
    return {"v": f"{value / most:.3f}", "text": f"{shown:.2f}" if shown < 10 else f"{shown:.0f}"}


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The four or five numbers a reader looks for first."""
    base, delta, cost = (data.get(k) or {} for k in ("base", "delta", "cost"))
    rows = [("base", str(base.get("name", "–")))]
    if base.get("parameters"):
        rows.append(("parameters", words.quantity(base["parameters"])))
    if delta.get("moved") is not None:
        share = f" ({words.by_key('share', delta['share'])})" if delta.get("share") is not None else ""
        rows.append(("moved", words.quantity(delta["moved"]) + share))
    for name, key in (("time", "seconds"), ("tokens", "tokens"), ("peak memory", "peak_memory_bytes")):
        if cost.get(key) is not None:
            rows.append((name, words.by_key(key, cost[key])))
    if delta.get("bytes") is not None:
        rows.append(("delta on disk", words.size(delta["bytes"])))
    return rows


def _pieces(delta: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": str(p.get("name", "")),
            "form": str(p.get("form") or p.get("choice") or ""),
            "sites": words.quantity(p["sites"] if isinstance(p.get("sites"), int) else len(p.get("sites") or ())),
            "parameters": words.quantity(p.get("parameters") or 0),
        }
        for p in delta.get("pieces") or []
    ]


def _proof(proof: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Rows (name, ok, detail). A table with the key `ok` is one row; other tables are groups of rows; a bare truth value
    is a tick, anything else a detail without one."""
    rows: list[dict[str, Any]] = []
    for key, value in proof.items():
        name = f"{prefix}{words.label(str(key))}"
        if isinstance(value, Mapping) and "ok" in value:
            rest = {k: v for k, v in value.items() if k != "ok"}
            told = str(rest.pop("reason", "") or rest.pop("detail", "") or "")
            more = "; ".join(f"{k} {v}" for k, v in words.flat(rest))
            rows.append({"name": name, "ok": value["ok"], "detail": "; ".join(t for t in (told, more) if t)})
        elif isinstance(value, Mapping):
            rows += _proof(value, f"{name}: ")
        elif isinstance(value, bool):
            rows.append({"name": name, "ok": value, "detail": ""})
        else:
            rows.append({"name": name, "ok": None, "detail": words.by_key(str(key), value)})
    return rows
