"""What one tensor costs to merge, beside mergekit's own function where it can be imported.

    python benchmarks/merge_tensor.py [--rows 5632] [--columns 2048] [--dtype bfloat16] [--only ties,slerp]
    PYTHONPATH=MERGEKIT python benchmarks/merge_tensor.py

A base and three models (as many as the method takes) are drawn; each method merges them with weights 0.4, density 0.5.
Processor seconds on one thread, the better of two, which other processes disturb less than the clock. The last line is
one JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from luthier.delta import MERGES, Stack

METHODS = (
    *("linear", "slerp", "task_arithmetic", "dare_ties", "ties", "breadcrumbs", "della", "model_stock", "sce"),
    *("nuslerp", "multislerp", "karcher", "ram", "ramplus_tl", "nearswap", "arcee_fusion"),
)
SETTINGS: dict[str, dict[str, Any]] = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.001}}
EACH = {"weight": 0.4, "density": 0.5, "gamma": 0.01, "epsilon": 0.15}


def seconds(f: Callable[[], Any], times: int = 2) -> float:
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        f()
        best = min(best, time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5632)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default=",".join(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        from mergekit.merge_methods import merge_tensors  # pyright: ignore[reportMissingImports]
    except ImportError:
        merge_tensors = None
    dtype, shape = getattr(torch, args.dtype), (args.rows, args.columns)
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(shape, generator=g) * 0.02
    models = [(drawn + torch.randn(shape, generator=g) * 0.002).to(dtype) for _ in range(3)]
    base, found = drawn.to(dtype), {}
    for name in args.only.split(","):
        cls = MERGES[name]
        count = cls.models[1] or 3
        settings, each = SETTINGS.get(name, {}), {k: [EACH[k]] * count for k in cls.each}
        merge, origin = MERGES.make(name, settings), None if cls.base == "unused" else base

        stack = Stack("w", models[:count], origin, each, generator=torch.Generator().manual_seed(0))
        row = {"luthier": round(seconds(partial(merge.merge, stack)), 3)}
        if merge_tensors is not None:
            tensors = models[:count] if origin is None else [base, *models[:count]]
            place = {} if origin is None else {"base_index": 0}
            put = {"parameters": {**settings, **each}, "dtype": dtype, **place}
            row["mergekit"] = round(seconds(partial(merge_tensors, tensors, name, **put), 1), 3)
            row["ratio"] = round(row["mergekit"] / row["luthier"], 1)
        found[name] = row
        sys.stdout.write(f"{name:16}" + "".join(f"{k} {v:<9}" for k, v in row.items()) + "\n")
        sys.stdout.flush()
    what = {"shape": shape, "dtype": args.dtype, "torch": torch.__version__, "cpu_seconds": found}
    sys.stdout.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
