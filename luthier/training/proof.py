"""What is proven before step one: known answers on this very model, and a rehearsal of the longest batch."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.bases.hardware import peak_memory
from luthier.data.collate import Collate
from luthier.delta import No
from luthier.errors import LuthierError
from luthier.training import checkpoint
from luthier.training.feed import ready
from luthier.training.goal import objective_of
from luthier.training.loop import gradients
from luthier.training.view import Batch

if TYPE_CHECKING:
    from luthier.training.run import Training

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
"""Largest relative difference of gradients that rounding explains, by the type of the arithmetic."""


def rehearse(training: Training) -> dict[str, Any]:
    """The longest batch through forward, backward, step, evaluation and save, at learning rate 0; nothing is left changed.

    Memory or disk that will not do fails here, before step one.
    """
    loop, machine = training.loop, training.machine
    started, states = time.perf_counter(), checkpoint.random_states()
    batch = training.data.longest_batch(training.plan.train.batch_size)
    parts = training.events.batches.parts(batch)
    loop.machine.model.train()
    try:
        gradients(loop, parts)
        loop.optimiser.set_rate(0.0)
        for p in loop.optimiser.names.values():  # what a random batch says is of no interest, only that it fits
            if p.grad is not None:
                p.grad.zero_()
        loop.optimiser.torch.step()
        loop.handle.after_step()
        with torch.no_grad(), machine.precision.context(machine.device):
            loop.objective(loop.view(machine.to_device(parts[0])))
        machine.reshard()
        tensors = checkpoint.tensors_of(loop.handle, loop.optimiser)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e) and "allocate" not in str(e):
            raise
        length = batch["input_ids"].shape[1]
        raise LuthierError(
            f"the longest batch ({training.plan.train.batch_size} × {length} tokens) does not fit in memory: lower train.batch_size "
            "(and raise train.accumulate), data.max_length, or set train.checkpointing: true"
        ) from e
    finally:
        loop.optimiser.torch.zero_grad(set_to_none=True)
    loop.optimiser.torch.state.clear()
    checkpoint.set_random_states(states)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if machine.first:
        _room_for(training.out, size * (training.plan.checkpoint.keep + 2))
    return {
        "batch": training.plan.train.batch_size,
        "length": int(batch["input_ids"].shape[1]),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(machine.device),
        "checkpoint_bytes": size,
    }


def _room_for(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise LuthierError(
            f"{folder} has {free / 2**20:,.0f} MB free, the run's checkpoints need {size / 2**20:,.0f} MB: free some, or lower checkpoint.keep"
        )


def known_answers(training: Training) -> dict[str, Any]:
    """Things whose answer is known, tried on this model and these records: each with what came out."""
    out: dict[str, Any] = {}
    rows = first_rows(training.data, 3)
    if training.machine.world > 1 or len(rows) < 2:
        return out
    training.base.model.eval()
    out["small batches = one large"] = _accumulation(training, rows)
    if training.plan.data.packing:
        out["packed = unpacked"] = _packing(training, rows)
    if "reference" in objective_of(training.plan, training.base.kind).needs:
        out["starts at its reference"] = _reference(training, rows)
    return out


def first_rows(data: Any, n: int) -> list[Any]:
    """The first rows of the data, read so far or stored."""
    return list(data.window[:n]) if data.train is None else [data.train[i] for i in range(min(n, len(data.train)))]


def _batch(training: Training, lines: list[list[Any]], packed: bool = False) -> Batch:
    data = training.data
    return ready(Collate(data.pad_id, data.kind, packed)(lines), training.base, training.machine.compute)


def _accumulation(training: Training, rows: list[Any]) -> dict[str, Any]:
    """Rows of unequal length, one at a time and together, give the same gradient.

    The second is added onto the negative of the first: what is left is the difference, in no further memory.
    """
    loop = training.loop

    def norm() -> float:
        grads = [p.grad for p in loop.optimiser.names.values() if p.grad is not None]
        return math.sqrt(sum(float(g.norm(dtype=torch.float32)) ** 2 for g in grads))

    _, weight = gradients(loop, [_batch(training, [[row] for row in rows])])
    size = norm()
    for p in loop.optimiser.names.values():
        if p.grad is not None:
            p.grad.mul_(-weight)  # gradients() had divided by it
    _, apart = gradients(loop, [_batch(training, [[row]]) for row in rows])
    error = norm() / max(size, 1e-30) + abs(apart - weight) / max(weight, 1e-30)
    loop.optimiser.torch.zero_grad(set_to_none=True)
    return _verdict("k small batches and one large batch", error, training)


def _packing(training: Training, rows: list[Any]) -> dict[str, Any]:
    """Records in one packed row give the log-probabilities they give alone."""

    def logprobs(batch: Batch) -> torch.Tensor:
        return training.loop.view(training.machine.to_device(batch)).logprobs

    with torch.no_grad(), training.machine.precision.context(training.machine.device):
        try:
            packed = logprobs(_batch(training, [rows], packed=True))
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            raise LuthierError(
                f"this base's forward does not take the mask of packed records ({str(e).splitlines()[0][:120]}): "
                "set data.packing: false"
            ) from e
        alone = torch.cat([logprobs(_batch(training, [[row]])) for row in rows])
    return _verdict("packed and unpacked records", _apart(packed, alone), training)


def _reference(training: Training, rows: list[Any]) -> dict[str, Any]:
    """Before step one a model says what its reference says: preference loss is ln 2 then. Forms that are no identity at
    their start are let off."""
    with torch.no_grad(), training.machine.precision.context(training.machine.device):
        view = training.loop.view(training.machine.to_device(_batch(training, [[row] for row in rows])))
        now, then = view.logprobs, view.reference.logprobs
    fresh = [p for n, p in training.handle.pieces.items() if n not in training.pieces.parents | training.pieces.started]
    if any(isinstance(p.form.identity, No) for p in fresh):
        return {"ok": True, "error": _apart(now, then), "allowed": None}
    return _verdict("the model and its reference", _apart(now, then), training)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _verdict(what: str, error: float, training: Training) -> dict[str, Any]:
    precision = training.machine.precision
    allowed = TOLERANCE[precision.autocast or precision.base]
    if error > allowed:
        raise LuthierError(
            f"{what} differ by {error:.1e} on this base (allowed {allowed:.0e}): set data.packing: false, or report this "
            "architecture"
        )
    return {"ok": True, "error": error, "allowed": allowed}
