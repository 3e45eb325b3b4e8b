"""How much memory the process may still have."""

from __future__ import annotations

import resource
from pathlib import Path

MOST_AHEAD, LEAST_AHEAD = 300 << 20, 8 << 20
"""Bytes read and not yet merged; one tensor of every model at least."""
SHARE = 6
"""The part of what the process may still have that reading ahead takes is one in this many."""


def room() -> int:
    """Bytes to read ahead: a share of what memory, limits of the process and its control group leave, within bounds."""
    left = [_available(), *within_limits()]
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            stated = Path("/sys/fs/cgroup", most).read_text().strip()
            if stated.isdigit():
                left.append(int(stated) - int(Path("/sys/fs/cgroup", now).read_text()))
        except (OSError, ValueError):
            continue
    return max(LEAST_AHEAD, min(MOST_AHEAD, min(left) // SHARE))


def within_limits() -> list[int]:
    """Bytes that each limit set on the process leaves it; none where there is no limit."""
    used = _status()
    pairs = ((resource.RLIMIT_AS, used.get("VmSize", 0)), (resource.RLIMIT_DATA, used.get("VmData", 0)))
    rows = [(resource.getrlimit(limit)[0], now) for limit, now in pairs]
    return [max(0, soft - now) for soft, now in rows if soft != resource.RLIM_INFINITY]


def _available() -> int:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return MOST_AHEAD * SHARE


def _status() -> dict[str, int]:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {k: int(v.split()[0]) * 1024 for k, _, v in (x.partition(":") for x in lines) if k.startswith("Vm")}
