"""Small plots as inline SVG that the page's own style sheet colours, so that they follow light, dark and width.

Positions are per cent of the drawing, so a plot stretches without distorting its dots. Only numbers and escaped text
enter the markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

_INSET = 2.0  # per cent left free at both ends, so that dots are not cut


@dataclass(frozen=True)
class Scale:
    """A linear scale from numbers to per cent of the width."""

    low: float
    high: float

    def at(self, number: float) -> str:
        reach = (self.high - self.low) or 1.0
        inside = min(max((number - self.low) / reach, 0.0), 1.0)
        return f"{_INSET + (100 - 2 * _INSET) * inside:.2f}%"


def check_scale(check: Mapping[str, Any]) -> Scale:
    """0 to 1 for shares, else round numbers around both intervals."""
    if check.get("unit") == "share":
        return Scale(0.0, 1.0)
    ends = [check[m].get(k) for m in ("before", "after") for k in ("value", "low", "high")]
    known = [e for e in ends if e is not None and math.isfinite(e)] or [0.0, 1.0]
    pad = 0.12 * (max(known) - min(known)) or 0.05 * abs(known[0]) or 1.0
    return Scale(min(known) - pad, max(known) + pad)


def dots(check: Mapping[str, Any]) -> Markup:
    """Before (open) and after (filled) on one line, each with its interval, and the way between them."""
    scale = check_scale(check)
    parts = [
        Markup('<line class="axis" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(
            scale.at(scale.low), scale.at(scale.high)
        )
    ]
    values = [check[m].get("value") for m in ("before", "after")]
    if None not in values:
        parts.append(Markup('<line class="way" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(*map(scale.at, values)))
    for moment, level in (("before", "32%"), ("after", "68%")):
        low, high = check[moment].get("low"), check[moment].get("high")
        if low is not None and high is not None:
            ends = (moment, scale.at(low), scale.at(high), level, level)
            parts.append(Markup('<line class="span {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(*ends))
    for moment, level, value in zip(("before", "after"), ("32%", "68%"), values, strict=True):
        if value is not None:
            parts.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="5"/>').format(moment, scale.at(value), level)
            )
    told = f"{check['name']}: before {values[0]}, after {values[1]}"
    return Markup('<svg class="dots" role="img" aria-label="{}">{}</svg>').format(told, Markup("").join(parts))


@dataclass(frozen=True)
class Line:
    """A named series of a curve: (x, y) in order; `marks` draws dots at the points too."""

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def curve(lines: Sequence[Line], title: str) -> Markup:
    """Lines over a common x, stretched to the box; the axis labels are HTML around it (see `ends`)."""
    box = limits(lines)
    if box is None:
        return Markup("")
    (x0, x1), (y0, y1) = box
    wide, high = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    paths, marks = [], []
    for line in lines:
        xy = [(100 * (x - x0) / wide, 100 - 100 * (y - y0) / high) for x, y in line.points if math.isfinite(y)]
        if not xy:
            continue
        path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in xy)
        paths.append(Markup('<path class="line {}" d="{}"/>').format(line.name, path))
        if line.marks:
            circle = Markup('<circle class="mark {}" cx="{}%" cy="{}%" r="3.5"/>')
            marks += [circle.format(line.name, f"{x:.2f}", f"{y:.2f}") for x, y in xy]
    grid = Markup("").join(Markup('<path class="grid" d="M0 {0}L100 {0}"/>').format(y) for y in (0, 25, 50, 75, 100))
    return Markup(
        '<svg class="curve" role="img" aria-label="{}"><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        'width="100%" height="100%">{}{}</svg>{}</svg>'
    ).format(title, grid, Markup("").join(paths), Markup("").join(marks))


def limits(lines: Sequence[Line]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """((x least, x most), (y least, y most)) over all finite points."""
    points = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not points:
        return None
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return (min(xs), max(xs)), (min(ys), max(ys))


def smooth(points: Sequence[tuple[float, float]], share: float = 0.04) -> list[tuple[float, float]]:
    """A centred running mean over a share of the points; what is not finite is left out."""
    known = [(x, y) for x, y in points if math.isfinite(y)]
    half = max(1, round(share * len(known)))
    out = []
    for i, (x, _) in enumerate(known):
        near = known[max(0, i - half) : i + half + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def thin(points: Sequence[tuple[float, float]], most: int = 600) -> list[tuple[float, float]]:
    """At most this many points, evenly taken, the last one included: a page need not carry a million steps."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(i * step)] for i in range(most)]
