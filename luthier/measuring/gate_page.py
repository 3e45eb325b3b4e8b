"""A gate's lines in words, and its files: `gate.json` for programs, `gate.html` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from luthier.measuring import words
from luthier.measuring.plots import Scale
from luthier.measuring.report import fill, plain, replace_text

_MEANING = {
    "gain": "the target's score must have gained at least this",
    "loss": "the guard's score may not have lost more",
    "negative flips": "right before and wrong now, as a share of the check's items",
    "refused": "share refused of what must be refused",
    "over-refused": "share refused of what need not be",
    "calibration": "growth of the expected calibration error",
    "drift": "KL(old ‖ new) a token on the old model's own text",
}
_MARK = {"pass": "✓", "fail": "✗", "underpowered": "?"}


def rows(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A display row for every line of a gate's dictionary."""
    return [_row(plain(line)) for line in lines]


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    share = line["unit"] == "share"
    change = line["change"]
    return {
        **line,
        "mark": _MARK[line["verdict"]],
        "meaning": _MEANING.get(line["what"], ""),
        "sides": "" if line["old"] is None else f"{_score(line['old'], share)} → {_score(line['new'], share)}",
        "moved": f"{_number(change['value'], share)} [{_number(change['low'], share)}, {_number(change['high'], share)}]",
        "allowed": f"{'≥' if line['bound'] == 'least' else '≤'} {_number(line['limit'], share)}",
        "shows": _number(line["detectable"], share).lstrip("+"),
        "told": told(line),
    }


def told(line: Mapping[str, Any]) -> str:
    """Why a line did not pass and what would settle it; nothing where it passed."""
    if line["verdict"] == "pass":
        return ""
    if line["verdict"] == "fail":
        return "the estimate is beyond the limit"
    what = "texts (audit.drift_tokens)" if line["what"] == "drift" else "items"
    if line["needed"] is None:
        return "no number of items can tell: the estimate is the limit; state a tolerance"
    return f"cannot exclude it with {line['n']:,} {what}; about {line['needed']:,} would do"


def _score(value: float | None, share: bool) -> str:
    return "–" if value is None else words.percent(value, 1) if share else f"{value:.3g}"


def _number(value: float | None, share: bool) -> str:
    """A change or a limit with its sign: in points for shares, else in the metric's unit."""
    if value is None:
        return "?"
    return words.signed(100 * value + 0.0, 1) if share else words.signed(value + 0.0, 3)


def plot(line: Mapping[str, Any]) -> Markup:
    """The change with its interval, and the side of the limit that is forbidden."""
    known = [v for v in (*line["change"].values(), line["limit"], 0.0) if v is not None]
    pad = 0.15 * (max(known) - min(known)) or 0.01
    scale = Scale(min(known) - pad, max(known) + pad)
    limit, ends = scale.at(line["limit"]), [line["change"][k] for k in ("low", "high")]
    low, high = (scale.at(e if e is not None else (scale.low, scale.high)[i]) for i, e in enumerate(ends))
    edge = ("0%", limit) if line["bound"] == "least" else (limit, "100%")
    far = Markup('<line class="forbidden" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(*edge)
    bar = Markup('<line class="limit" x1="{0}" x2="{0}" y1="12%" y2="88%"/>').format(limit)
    span = Markup('<line class="span {}" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(line["verdict"], low, high)
    value = line["change"]["value"]
    dot = Markup("") if value is None else Markup('<circle class="dot {}" cx="{}" cy="50%" r="5"/>').format(
        line["verdict"], scale.at(value)
    )  # fmt: skip
    told_as = f"{line['what']} of {line['check']}: {line['verdict']}"
    return Markup('<svg class="dots" role="img" aria-label="{}">{}{}{}{}</svg>').format(told_as, far, bar, span, dot)


def write_gate(folder: Path, data: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes gate.json and gate.html into a folder and returns their paths."""
    clean = plain(data)
    page = render(clean)
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / "gate.json", folder / "gate.html"
    replace_text(json_path, json.dumps(clean, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    replace_text(html_path, page)
    return json_path, html_path


def render(data: Mapping[str, Any]) -> str:
    """The page as text."""
    data = plain(data)
    groups: dict[str, list[dict[str, Any]]] = {
        what: [] for what in _MEANING if any(x["what"] == what for x in data["lines"])
    }
    for row, line in zip(rows(data["lines"]), data["lines"], strict=True):
        groups.setdefault(row["what"], []).append(row | {"plot": plot(line)})
    counts = {v: sum(line["verdict"] == v for line in data["lines"]) for v in _MARK}
    facts = [
        ("old", data["old"]["name"]), ("new", data["new"]["name"]),
        ("limits kept", f"{counts['pass']} of {len(data['lines'])}"), ("broken", str(counts["fail"])),
        ("too few items", str(counts["underpowered"])), ("not measured", ", ".join(data.get("unmeasured") or ["–"])),
        ("time", words.duration(data.get("seconds") or 0.0)),
    ]  # fmt: skip
    measured = data.get("calibration")
    return fill(
        "gate.html",
        {
            "verdict": data["verdict"], "why": data["why"], "facts": facts, "groups": groups, "meaning": _MEANING,
            "flipped": data["flipped"], "limits": words.flat(data["limits"]),
            "calibration": _measured(measured) if measured else [],
            "plan": json.dumps(data.get("plan") or {}, indent=2, ensure_ascii=False),
        },
    )  # fmt: skip


def _measured(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = [("answers", words.quantity(found["n"]))]
    for key, name in (("ece", "expected calibration error"), ("brier", "Brier score")):
        for side in ("old", "new", "change"):
            value, low, high = (_places(found[key][side][k], side == "change") for k in ("value", "low", "high"))
            out.append((f"{name}, {side}", f"{value} [{low}, {high}]"))
    return out


def _places(value: float | None, signed: bool) -> str:
    """Three places; '?' for what is not known, as the ends of an interval over one item."""
    return "?" if value is None else words.signed(value, 3) if signed else f"{value:.3f}"
