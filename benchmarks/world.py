"""How many records a second each family of the practice world gives, on one core, and how many different ones there are.

    python benchmarks/world.py [--family NAME …] [--records N] [--tries K] [--json FILE]
    python benchmarks/world.py --spaces [--family NAME …]

The best of K tries, in the process's own CPU time, so that other work on the machine counts as little as it can. With
--spaces: how many meanings of the test and the shifted split are found in 80,000 draws, up to 2,000, by difficulty and in
all, and in brackets how many records, where the meanings are fewer.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

from luthier.practice import world
from luthier.practice.draw import Draw

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
ENOUGH, DRAWS = 2000, 80_000


def speed(family: str, records: int, tries: int) -> float:
    """Train records a second, the best of some tries, each with its own seed."""
    best = 0.0
    for seed in range(tries):
        began = time.process_time()
        for _ in world.records(family, n=records, seed=seed):
            pass
        best = max(best, records / (time.process_time() - began))
    return best


def found(family: str, split: str, level: int) -> tuple[set[str], set[tuple[str, str, int]]]:
    """Meanings, and records, that a split owns among ``DRAWS`` draws of a level, or among those that gave ``ENOUGH`` meanings."""
    make, draw = world.family_named(family).make, Draw(f"spaces/{family}/{split}/{level}")
    keys, records = set[str](), set[tuple[str, str, int]]()
    for _ in range(DRAWS):
        item = make(draw, level, split == "shifted")
        if world.split_of(family, item.key) == split:
            keys.add(item.key)
            records.add((item.key, item.prompt, len(item.after)))
            if len(keys) >= ENOUGH:
                break
    return keys, records


def spaces(names: list[str]) -> None:
    """Print the table of meanings and records."""

    def cell(keys: set[str], records: set[tuple[str, str, int]]) -> str:
        told = [f"{len(s):,}" if len(s) < ENOUGH else f"{ENOUGH:,}+" for s in (keys, records)]
        return told[0] if told[0] == told[1] else f"{told[0]} ({told[1]})"

    print("| family | test 1 | 2 | 3 | all | shifted 1 | 2 | 3 | all |")
    for name in names:
        row = []
        for split in ("test", "shifted"):
            levels = [found(name, split, level) for level in (1, 2, 3)]
            row += [*levels, (set().union(*(k for k, _ in levels)), set().union(*(r for _, r in levels)))]
        print(f"| `{name}` | {' | '.join(cell(*part) for part in row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=world.families())
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--tries", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spaces", action="store_true")
    told = parser.parse_args()
    if told.spaces:
        return spaces(list(told.family))
    rates = {name: speed(name, told.records, told.tries) for name in told.family}
    print(f"| family | records a second | simple | Python {platform.python_version()}")
    for name, value in sorted(rates.items(), key=lambda pair: -pair[1]):
        print(f"| `{name}` | {value:,.0f} | {'yes' if name in SIMPLE else ''} |")
    slow = [name for name in SIMPLE if rates.get(name, FLOOR) < FLOOR]
    print(f"simple families below {FLOOR:,}: {', '.join(slow) or 'none'}")
    if told.json:
        told.json.write_text(json.dumps(rates, indent=1) + "\n")


if __name__ == "__main__":
    main()
