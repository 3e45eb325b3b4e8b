"""What every recipe costs beside LoRA and full fine-tuning: time, memory, numbers trained, bytes on disk.

    python benchmarks/methods.py [--steps 12] [--recipes lora dora …] [--out docs/evidence/methods.json]

The practice base, the recipe's own batch size, no audit; each recipe in a process of its own. Time is the median step,
memory the peak of the resident set while training less what the imports took. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent.parent / "luthier" / "recipes"
BASELINES = {"(lora, all linear, r 16)": [{"form": "lora", "rank": 16}], "(full)": [{"choice": "full"}]}


def run_of(path: Path) -> Any:
    """What is timed of a recipe: itself, or the first of a chain of nothing but tunes; None for other chains."""
    stages = yaml.safe_load(path.read_text(encoding="utf-8")).get("stages")
    if stages is None:
        return path
    return stages[0]["tune"] if all("tune" in s for s in stages) else None


def measure(name: str, steps: int) -> dict[str, Any]:
    """One recipe, trained for a few steps in this process."""
    from luthier.bases.hardware import peak_memory, reset_peak, resident_memory
    from luthier.plan.load import load_plan
    from luthier.training.run import build

    imported = resident_memory()
    plan = load_plan(run_of(RECIPES / ("lora.yaml" if name in BASELINES else f"{name}.yaml")))
    if name in BASELINES:
        plan = load_plan(plan.model_dump(by_alias=True) | {"delta": BASELINES[name]})
    overrides = [
        f"train.steps={steps}",
        "train.rehearse=false",
        "checkpoint.every=0",
        "data.cache=false",
        "train.eval_every=0",
    ]
    plan = load_plan(plan, overrides)
    with tempfile.TemporaryDirectory() as folder:
        training = build(plan, Path(folder), progress=False)
        numbers = sum(p.numel() for rows in training.handle.trained().values() for _, p in rows)
        reset_peak()
        curve = training.train().curve
        peak = peak_memory() - imported
        size = sum(f.stat().st_size for f in training.delta().save(Path(folder) / "delta").iterdir())
    times = [b["seconds"] - a["seconds"] for a, b in zip(curve[2:], curve[3:], strict=False)]
    tokens = (curve[-1]["tokens"] - curve[2]["tokens"]) / (curve[-1]["seconds"] - curve[2]["seconds"])
    first, last = curve[0]["loss"], curve[-1]["loss"]
    return {
        "seconds_per_step": statistics.median(times), "tokens_per_second": tokens, "peak_bytes": peak,
        "numbers_trained": numbers, "bytes_on_disk": size, "first_loss": first, "last_loss": last,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recipes", nargs="*", default=sorted(p.stem for p in RECIPES.glob("*.yaml") if run_of(p)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.steps)))
        return
    table: dict[str, Any] = {}
    for name in [*BASELINES, *args.recipes]:
        command = [sys.executable, __file__, "--one", name, "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        table[name] = row = json.loads(done.stdout.splitlines()[-1])
        lora = table["(lora, all linear, r 16)"]
        print(
            f"{name:26s} {row['numbers_trained']:>10,} numbers {row['seconds_per_step'] * 1000:8.0f} ms a step "
            f"({row['seconds_per_step'] / lora['seconds_per_step']:.2f}× LoRA) {row['peak_bytes'] / 2**20:7.0f} MiB "
            f"{row['bytes_on_disk'] / 2**10:9,.0f} KiB on disk"
        )
    from luthier.training.certificate import versions

    result = {
        "command": f"python benchmarks/methods.py --steps {args.steps}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": versions(),
        "methods": table,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
