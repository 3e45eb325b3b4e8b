"""How many records a second each family of the practice world gives, on one core.

    python benchmarks/world.py [--family NAME …] [--records N] [--tries K] [--json FILE]

The best of K tries, in the process's own CPU time, so that other work on the machine counts as little as it can.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

from luthier.practice import world

SIMPLE = ("arithmetic", "canaries", "customs_east", "customs_west", "derivations", "facts", "instructions", "kellish")
SIMPLE += (
    "lists",
    "newcomers",
    "norrish",
    "ossan",
    "queries",
    "recall",
    "refusals",
    "sorting",
    "tracking",
    "translate",
)
"""Families that draw a task and its answer and neither search, nor run, nor weigh anything."""
FLOOR = 50_000


def speed(family: str, records: int, tries: int) -> float:
    """Train records a second, the best of some tries, each with its own seed."""
    best = 0.0
    for seed in range(tries):
        began = time.process_time()
        for _ in world.records(family, n=records, seed=seed):
            pass
        best = max(best, records / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=world.families())
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--tries", type=int, default=7)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    found = {name: speed(name, told.records, told.tries) for name in told.family}
    print(f"| family | records a second | simple | Python {platform.python_version()}")
    for name, value in sorted(found.items(), key=lambda pair: -pair[1]):
        print(f"| `{name}` | {value:,.0f} | {'yes' if name in SIMPLE else ''} |")
    slow = [name for name in SIMPLE if found.get(name, FLOOR) < FLOOR]
    print(f"simple families below {FLOOR:,}: {', '.join(slow) or 'none'}")
    if told.json:
        told.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
