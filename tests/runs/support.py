"""What the tests of whole runs share: a tiny base on disk, records of unequal length, plans, and what a run ended with."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.attach.weights import gathered
from luthier.plan.load import load_plan
from luthier.plan.schema import Plan
from luthier.training.run import Training, build
from tests.tiny import tiny, tiny_tokenizer


@dataclass(frozen=True)
class World:
    """A folder with a base of each family asked for and one file of records."""

    folder: Path

    def base(self, family: str = "llama", **settings: Any) -> Path:
        """Folder of a tiny base with its tokenizer, made at first use."""
        path = self.folder / "-".join([family, *(f"{k}={v}" for k, v in sorted(settings.items()))])
        if not path.exists():
            tiny(family, **settings).save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
        return path

    @property
    def records(self) -> Path:
        """64 sums of one-digit numbers, in rows of unequal length, the longest of 19 tokens."""
        path = self.folder / "records.jsonl"
        if not path.exists():
            write_records(path, 64)
        return path

    def plan(self, delta: Any, **sections: Any) -> Plan:
        """A plan of 12 steps of 4 rows with a checkpoint every 5; sections are laid over it."""
        base = sections.pop("base", str(self.base()))
        if sections.get("train", {}).get("precision") == "bf16" and isinstance(base, str):
            base = {"name": base, "dtype": "bfloat16"}  # stated, so that it is met on processors without it too
        plain = {
            "base": base,
            "data": {"train": str(self.records), "max_length": 64, "cache": False, **sections.pop("data", {})},
            "delta": delta,
            "train": {"steps": 12, "batch_size": 4, "lr": 1e-2, "precision": "fp32", **sections.pop("train", {})},
            "checkpoint": {"every": 5, "keep": 9, **sections.pop("checkpoint", {})},
            "audit": {"enabled": False},
            **sections,
        }
        return load_plan(plain)


def write_records(path: Path, count: int, seed: int = 0) -> None:
    """Prompt and completion: sums, padded with blanks to unequal lengths."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as f:
        for _ in range(count):
            a, b = draw.randint(0, 9), draw.randint(0, 9)
            f.write(json.dumps({"prompt": f"{a}+{b}=" + " " * draw.randint(0, 9), "completion": str(a + b)}) + "\n")


@dataclass
class End:
    """What a run ended with: everything that must be the same in two runs that are called equal."""

    delta: dict[str, Tensor]
    moments: dict[str, Tensor]
    curve: list[dict[str, float]]
    evals: list[dict[str, float]]
    record: dict[str, Any]
    stopped: str | None

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.curve]


def end_of(training: Training) -> End:
    """Copies of what a finished run holds."""
    state = training.loop.progress
    return End(
        {k: v.clone() for k, v in training.delta()._flat()},
        {k: gathered(v.detach()).clone() for k, v in training.loop.optimiser.state().items()},
        [{k: v for k, v in row.items() if k != "seconds"} for row in state.curve],
        list(state.evals),
        training.record,
        state.stopped,
    )


def run(plan: Plan, out: Path, *, resume: bool = False) -> End:
    """Builds and trains; without the verb around it, so that a run costs tenths of a second."""
    training = build(plan, out, resume=resume, progress=False)
    training.train()
    return end_of(training)


def interrupted(plan: Plan, out: Path, back_to: int) -> End:
    """The rest of a run whose checkpoints after step `back_to` are lost."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > back_to:
            shutil.rmtree(path)
    return run(plan, out, resume=True)


def assert_same(a: End, b: End) -> None:
    """Bit for bit: the delta, the optimiser's moments, every step's loss, rate and gradient norm, the evaluations."""
    assert a.delta and a.moments
    for one, other in ((a.delta, b.delta), (a.moments, b.moments)):
        assert set(one) == set(other)
        different = [k for k in one if not torch.equal(one[k], other[k])]
        assert not different, different
    assert a.curve == b.curve
    assert a.evals == b.evals
    assert a.stopped == b.stopped
