"""The one loop: micro-batches to sums, sums to a step. Everything around it (data, wrappers, checkpoints) is handed in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.attach import Attached
from luthier.errors import LuthierError
from luthier.plan.schema import TrainSpec
from luthier.training.groups import Optimiser
from luthier.training.machine import Machine
from luthier.training.schedule import factor
from luthier.training.view import Batch, View


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    supervised: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    stale: int = 0
    stopped: str | None = None


@dataclass
class Loop:
    """What `train` needs; `view` turns a batch into what the objective reads, `events` are told what happened."""

    spec: TrainSpec
    steps: int
    machine: Machine
    handle: Attached
    optimiser: Optimiser
    objective: Callable[[View], tuple[Any, Any]]
    view: Callable[[Batch], View]
    next_step: Callable[[], list[Batch]]
    """The micro-batches of the next step: spec.accumulate of them, fewer at the end of an epoch."""
    progress: Progress
    on_step: Callable[[Loop], bool]
    """Called after every step: redraws, evaluates, logs, saves; True ends the run."""
    on_non_finite: Callable[[Loop, list[Batch], float], None]


def backward(view: View, objective: Any, handle: Attached, context: AbstractContextManager[Any]) -> tuple[Any, Any]:
    """Sum of losses and weight of one micro-batch; the gradients of that sum, with the forms' own penalties, are added to
    those that are there. context: of the run's precision."""
    with context:
        loss, count = objective(view)
    full = loss + handle.penalty() * count
    if full.requires_grad:
        full.backward()
    return loss.detach(), count


def update(optimiser: Optimiser, handle: Attached) -> None:
    """One step along the gradients that are there."""
    optimiser.torch.step()
    handle.after_step()


def gradients(loop: Loop, batches: list[Batch]) -> tuple[float, float]:
    """Sum of losses and weights over `batches`, with gradients of (sum / weight) left in the parameters.

    Losses are summed, not averaged, and divided by the weight of the whole step over all processes: k small batches
    give the gradient of one large batch, whatever their lengths.
    """
    total, weight = 0.0, 0.0
    for k, batch in enumerate(batches):
        with loop.machine.accumulating(k < len(batches) - 1):
            view = loop.view(loop.machine.to_device(batch))
            context = loop.machine.precision.context(loop.machine.device)
            loss, count = backward(view, loop.objective, loop.handle, context)
        total, weight = total + float(loss), weight + float(count)
    total, weight = loop.machine.sum(total, weight)
    scale = loop.machine.world / weight if weight else 0.0
    grads = [p.grad for p in loop.optimiser.names.values() if p.grad is not None]
    torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
    return total, weight


def tokens_in(batch: Batch) -> int:
    """Tokens of text in a batch: no padding; none in a batch that only keeps processes in step."""
    return int(batch["attention_mask"].sum()) if batch["where"] else 0


def train(loop: Loop) -> Progress:
    """Runs until the steps are done, the data ends or an event stops it."""
    spec, state = loop.spec, loop.progress
    started = time.perf_counter() - state.seconds
    while state.step < loop.steps and state.stopped is None:
        batches = loop.next_step()
        rate = factor(state.step, loop.steps, spec.schedule, spec.warmup, spec.min_lr)
        loop.optimiser.set_rate(rate)
        loop.handle.ctx.step = state.step
        total, weight = gradients(loop, batches)
        loss = total / weight if weight else math.nan
        norm = loop.machine.clip(list(loop.optimiser.names.values()), spec.clip)
        if math.isfinite(loss) and math.isfinite(norm):
            update(loop.optimiser, loop.handle)
        else:
            state.skipped += 1
            loop.on_non_finite(loop, batches, loss)
        loop.optimiser.torch.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += loop.machine.count(sum(tokens_in(b) for b in batches))
        state.supervised += weight
        state.seconds = time.perf_counter() - started
        lr = loop.optimiser.torch.param_groups[0]["lr"]
        row = {
            "step": state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": state.tokens,
            "seconds": state.seconds,
        }
        state.curve.append(row)
        if loop.on_step(loop):
            break
    return state


@torch.no_grad()
def evaluate(loop: Loop, batches: Any) -> float:
    """Loss per unit of weight over held-out batches, over all processes, in evaluation mode."""
    model = loop.machine.model
    was, total, weight = model.training, 0.0, 0.0
    model.eval()
    try:
        for batch in batches:
            with loop.machine.precision.context(loop.machine.device):
                loss, count = loop.objective(loop.view(loop.machine.to_device(batch)))
            total, weight = total + float(loss), weight + float(count)
    finally:
        model.train(was)
    total, weight = loop.machine.sum(total, weight)
    if not weight:
        raise LuthierError("the evaluation records carry no supervised token: check data.eval")
    return total / weight
