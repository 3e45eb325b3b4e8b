"""What a plan would do, before any weight is read: the resolved plan, what moves, memory and time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.bases.hardware import choose_device, has_bf16, peak_flops, resident_memory, total_memory
from luthier.bases.load import load_base
from luthier.data.prepare import prepare
from luthier.plan import Plan
from luthier.plan.load import load_plan
from luthier.training.feed import micro_batches, positions_at_once
from luthier.training.goal import objective_of, rows_of
from luthier.training.precision import precision_of
from luthier.training.predict import predict_step
from luthier.training.run import steps_of
from luthier.training.starts import inherited
from luthier.training.view import BLOCK, Batch

EFFICIENCY = {"fp32": 0.72, "bf16": 0.53}
"""Share of a bare matrix product's speed that a training step reaches, measured at 29 M parameters on two cores."""
RUNTIME = 48 << 20
"""Bytes a process takes on a CPU once it trains: thread stacks, kernels' scratch space, the autograd engine."""
HEAP = 0.5
"""What the C library's heap takes on a CPU beside what a step makes and frees, as a share of it: gaps between tensors."""
KERNEL = 650 << 10
"""Bytes that a compiled bfloat16 product of one shape takes on a CPU, on average over those of a step."""


@dataclass(frozen=True)
class DryRun:
    """What would happen. Memory in bytes, time in seconds."""

    plan: Plan
    base_parameters: int
    moving: dict[str, dict[str, int]]
    """Piece -> role -> numbers that train."""
    sites: dict[str, dict[str, int]]
    """Piece -> role -> places where they are."""
    precision: dict[str, str | None]
    device: str
    batch: tuple[int, int, int]
    """Rows, tokens a row and supervised tokens of the longest batch."""
    rows: int
    steps: int
    peak_memory: int
    """What `cost.peak_memory_bytes` of the run's report will say: of the process on a CPU, of the allocator on a GPU."""
    tensors: int
    """The part of it that is weights, gradients, moments and activations."""
    weights: int
    memory: int
    """What the device has."""
    seconds: float
    """Rough: by the speed of a bare matrix product, without the audit."""
    ledger: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def moved(self) -> int:
        """Numbers that train, over all pieces."""
        return sum(n for roles in self.moving.values() for n in roles.values())


def dry_run(plan: Plan | dict[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()) -> DryRun:
    """Resolves a plan and predicts its run. No weights are needed: configuration, tokenizer and records are read.

    Errors: everything about plan, base, records and deltas that would stop the run before step one.
    """
    plan, _ = inherited(load_plan(plan, overrides))
    device = choose_device(None)
    precision, spec = precision_of(plan, has_bf16(device))
    base = load_base(spec, weights=False)
    of_record = rows_of(objective_of(plan, base.kind), base.kind)
    data = prepare(plan.data, base.tokenizer, kind=of_record, labels=plan.base.labels, seed=plan.train.seed)
    parameters = sum(p.numel() for p in {id(p): p for p in base.model.parameters()}.values())
    sharded = plan.train.fsdp and int(os.environ.get("WORLD_SIZE", "1")) > 1
    batch = data.longest_batch(plan.train.batch_size)
    at_once = positions_at_once(plan.train.tokens_at_once, device, sharded)
    parts = micro_batches(batch, base, precision.compute, at_once)
    largest = sorted(parts, key=_positions, reverse=True)[:2]  # the second finds gradients there, as all later ones do
    process = resident_memory() + RUNTIME if device.type == "cpu" else 0
    found = predict_step(plan, base, largest, precision, device)
    steps = steps_of(plan, data, int(os.environ.get("WORLD_SIZE", "1")))
    rows, length = batch["input_ids"].shape
    supervised = int((batch["weights"] > 0).sum()) if "weights" in batch else rows
    tokens = int(batch["attention_mask"].sum())
    rate = peak_flops(device, precision.compute)
    share = _mean_tokens(data, batch.get("pairs", rows)) / tokens if tokens else 1.0
    flops = found.step.flops * sum(map(_positions, parts)) / sum(map(_positions, largest))
    seconds = steps * plan.train.accumulate * flops * share / (rate * EFFICIENCY[precision.name])
    memory, peak = total_memory(device), process + found.step.peak
    if device.type == "cpu":
        peak += int(HEAP * (found.step.peak - max(found.step.held, found.step.after)))
    if device.type == "cpu" and precision.compute == torch.bfloat16:
        peak += int(KERNEL * found.step.products * _widths(data, largest, steps, plan, at_once))
    warnings = [*base.notes, *([precision.note] if precision.note else [])]
    if peak > memory:
        warnings.append(
            f"the step needs {peak / 2**30:.1f} GiB and {device} has {memory / 2**30:.1f} GiB: lower train.batch_size or "
            "data.max_length, or set train.checkpointing: true"
        )
    return DryRun(
        plan, parameters, found.moving, found.sites, precision.report(), str(device), (rows, length, supervised),
        data.size, steps, peak, found.step.peak, found.step.held, memory, seconds, data.ledger.to_dict(), warnings,
    )  # fmt: skip


def _positions(part: Batch) -> int:
    return part["input_ids"].numel()


def _widths(data: Any, parts: list[Batch], steps: int, plan: Plan, at_once: int | None) -> float:
    """How many numbers of positions the run's forward passes have, for each that those of the longest batch have."""

    def blocks(rows: int, width: int) -> int:
        return -(-rows * width // BLOCK)

    here = {blocks(*part["input_ids"].shape) for part in parts}
    if data.train is None or data.spec.packing:
        return 1.0
    size, sides = plan.train.batch_size, 2 if "pairs" in parts[0] else 1
    lengths = sorted((-(-int(n) // sides) for n in data.train.lengths), reverse=True)
    met: set[int] = set()
    for at in range(0, len(lengths), size):
        rows, width = len(lengths[at : at + size]), lengths[at]
        height = rows if at_once is None else min(rows, max(1, at_once // (sides * width)))
        met |= {blocks(sides * height, width), blocks(sides * (rows % height or height), width)}
    return max(1.0, min(len(met), steps * plan.train.accumulate * len(here)) / len(here))


def _mean_tokens(data: Any, rows: int) -> float:
    """Tokens of a batch of so many records on average; of the longest where lengths are not known yet."""
    if data.train is None or data.spec.packing:
        return float(rows * data.longest)
    return rows * float(data.train.lengths.mean())
