"""Numbers and findings in plain words: for the report, the command line and the delta's card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
_SHARES = ("share", "agreement", "rate")


def signed(number: float, digits: int = 0) -> str:
    """A number with its sign, + or a true minus."""
    return f"{number:+.{digits}f}".replace("-", MINUS)


def percent(share: float, digits: int = 0) -> str:
    """A share of one as per cent."""
    return f"{100 * share:.{digits}f} %"


def quantity(number: float) -> str:
    """A plain number: grouped when whole, three significant digits when not."""
    if isinstance(number, bool):
        return "yes" if number else "no"
    if not math.isfinite(number):
        return str(number)
    if float(number).is_integer() and abs(number) < 1e15:
        return f"{int(number):,}"
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) >= 1e-3 else f"{number:.2e}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever a person would say."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def by_key(key: str, value: Any) -> str:
    """A value as its key's words suggest: bytes, …seconds, …share; lists are joined, None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        parts = key.replace(" ", "_").split("_")
        last = parts[-1]
        if isinstance(value, bool) or not math.isfinite(value):
            return quantity(value)
        if "bytes" in parts:
            return size(value)
        if last == "seconds":
            return duration(value)
        return percent(value, 1 if value >= 0.01 or value == 0 else 3) if last in _SHARES else quantity(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(str(k))} {by_key(str(k), v)}" for k, v in value.items())
    if isinstance(value, Sequence):
        return ", ".join(by_key(key, v) for v in value) or "none"
    return str(value)


def label(key: str) -> str:
    """A key as words, without the unit that its value will show."""
    told = key.replace("_", " ")
    told = told[: -len("seconds")] + "time" if told.endswith("seconds") else told
    return told.removesuffix(" bytes").removeprefix("bytes ")


def flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows (label, text) of a nested table, in its order; inner tables become 'outer: inner'."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        name = f"{prefix}{label(str(key))}"
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{name}: ")
        else:
            rows.append((name, by_key(str(key), value)))
    return rows


def score(check: Mapping[str, Any], number: float | None) -> str:
    """One score of a check in its unit."""
    if number is None or not math.isfinite(number):
        return "–"
    return percent(number) if check.get("unit") == "share" else f"{number:.3g}"


def change(check: Mapping[str, Any]) -> str:
    """The difference of a check with its interval: '+88 [82, 93]' in points for shares, else in the metric's unit."""
    gap = check["difference"]
    scale, digits = (100.0, 0) if check.get("unit") == "share" else (1.0, 2)
    ends = [gap.get(k) for k in ("value", "low", "high")]
    if ends[0] is None:
        return "–"
    low, high = (
        "?" if e is None or not math.isfinite(e) else f"{scale * e:.{digits}f}".replace("-", MINUS) for e in ends[1:]
    )
    return f"{signed(scale * ends[0], digits)} [{low}, {high}]"


def direction(check: Mapping[str, Any]) -> str:
    """'better', 'worse' or 'unclear': what the interval of the difference allows to say."""
    gap = check["difference"]
    low, high = gap.get("low"), gap.get("high")
    if low is None or high is None:
        return "unclear"
    if check.get("better") == "lower":
        low, high = -high, -low
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def verdict(audit: Mapping[str, Any]) -> dict[str, str]:
    """What the audit found: `status` (learned, learned at a cost, learned nothing clear, got worse, not measured) and a
    `line` in plain words, with before, after, difference and interval."""
    target, guards, shifted = (list(audit.get(k) or ()) for k in ("target", "guards", "shifted"))
    parts = [part for part in (_targets(target), _guards(guards), _shifted(shifted)) if part]
    drift = audit.get("drift")
    if drift and drift.get("kl", {}).get("value") is not None:
        parts.append(f"drift from the base: {drift['kl']['value']:.2g} nats per token")
    said = [direction(c) for c in target]
    harmed = any(direction(c) == "worse" for c in guards)
    if not target:
        status = "got worse" if harmed else "not measured"
    elif "worse" in said:
        status = "got worse"
    elif "better" in said:
        status = "learned at a cost" if harmed else "learned"
    else:
        status = "learned nothing clear"
    return {"status": status, "line": "; ".join(parts) + "." if parts else "Nothing was measured."}


def _told(check: Mapping[str, Any]) -> str:
    before, after = (score(check, check[k].get("value")) for k in ("before", "after"))
    return f"{check['name']} {before} → {after} ({change(check)})"


def _targets(checks: Sequence[Mapping[str, Any]]) -> str:
    heads = {"better": "learned", "worse": "got worse", "unclear": "no clear change"}
    groups = {head: [c for c in checks if direction(c) == way] for way, head in heads.items()}
    return "; ".join(f"{head}: {', '.join(map(_told, found))}" for head, found in groups.items() if found)


def _guards(checks: Sequence[Mapping[str, Any]]) -> str:
    lost = [c for c in checks if direction(c) == "worse"]
    kept = len(checks) - len(lost)
    parts = [f"lost: {', '.join(map(_told, lost))}"] if lost else []
    if kept:
        parts.append(f"no clear loss on {kept} of {len(checks)} guard{'s' if len(checks) > 1 else ''}")
    return "; ".join(parts)


def _shifted(checks: Sequence[Mapping[str, Any]]) -> str:
    return f"under shift: {', '.join(map(_told, checks))}" if checks else ""
