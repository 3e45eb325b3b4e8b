"""The resume certificate: same settings, same next records, same next loss as the run that was interrupted."""

from __future__ import annotations

import platform
from typing import Any

import accelerate
import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object

from luthier.bases.hardware import describe
from luthier.errors import LuthierError
from luthier.plan.schema import Plan
from luthier.training.checkpoint import random_states, set_random_states
from luthier.training.loop import Loop
from luthier.training.machine import Machine, flat

HARMLESS = (
    "audit.",
    "checkpoint.",
    "push_to",
    "train.log_every",
    "train.report_to",
    "train.callbacks",
    "train.rehearse",
    "train.eval_batch_size",
    "data.cache",
)
"""Settings that may differ on resuming: they do not touch the numbers. Of callbacks only those without a state may: what the
others hold is in the checkpoint, and `Events.restore` compares them."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Share of the loss by which two passes of the same numbers may differ on a GPU, where some sums have no fixed order; by
the type of the activations."""


def versions() -> dict[str, str | int]:
    """What the run's numbers may depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "threads": torch.get_num_threads(),
        "device": describe().name,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by path that are not the same in two plans: path -> (old, new)."""
    a, b = flat(old), flat(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a | b) if a.get(k) != b.get(k)}


def same_settings(plan: Plan, state: dict[str, Any], data: Any, machine: Machine) -> None:
    """Refuses to resume where a setting, the data or the number of processes would change the numbers."""
    found = differences(state["plan"], plan.model_dump(mode="json", by_alias=True))
    harmful = {k: v for k, v in found.items() if not k.startswith(HARMLESS)}
    if harmful:
        shown = "; ".join(f"{k}: {a!r} → {b!r}" for k, (a, b) in list(harmful.items())[:5])
        raise LuthierError(
            f"resuming with other settings would not be the same run ({shown}): put them back, or start anew in another --out"
        )
    if state["data_fingerprint"] != data.fingerprint:
        raise LuthierError(
            "the data, tokenizer or template changed since the checkpoint: put them back, or start anew in another --out"
        )
    if state["certificate"]["world"] != machine.world:
        raise LuthierError(
            f"the run had {state['certificate']['world']} processes, now there are {machine.world}: resume with the same number"
        )


def _peek(loop: Loop, batches: Any) -> tuple[list[str], float]:
    """The next batch's records and its loss, leaving data position, step, random state and gradients as they were."""
    position, states, step = batches.state_dict(), random_states(), loop.handle.ctx.step
    batch = next(batches)
    loop.handle.ctx.step = loop.progress.step  # of the step that is next; some forms compute by it
    with torch.no_grad(), loop.machine.precision.context(loop.machine.device):
        total, count = loop.objective(loop.view(loop.machine.to_device(batch)))
    loop.machine.reshard()
    loop.handle.ctx.step = step
    batches.load_state_dict(position)
    set_random_states(states)
    return list(batch["where"]), float(total) / max(float(count), 1e-30)


def make(loop: Loop, batches: Any) -> dict[str, Any]:
    """What a resumed run must show at its first step, per process."""
    where, loss = _peek(loop, batches)
    return {
        "world": loop.machine.world,
        "versions": versions(),
        "next": gather_object([{"where": where, "loss": loss}]),
    }


def check(loop: Loop, batches: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The certificate of a resumed run; other records or another loss are an error, other versions are told."""
    loop.machine.model.train()
    where, loss = _peek(loop, batches)
    wanted = state["certificate"]["next"][loop.machine.rank]
    if where != wanted["where"]:
        raise LuthierError(
            f"resumed at step {loop.progress.step}, the next records are {where[:2]}…, not {wanted['where'][:2]}…: the data order changed"
        )
    drift = {k: (v, versions()[k]) for k, v in state["certificate"]["versions"].items() if versions()[k] != v}
    if not (drift or same_loss(loss, wanted["loss"], loop.machine)):
        raise LuthierError(
            f"resumed at step {loop.progress.step}, the next loss is {loss!r}, not {wanted['loss']!r}: something that matters changed"
        )
    return {
        "step": loop.progress.step,
        "settings": "same",
        "next_records": "same",
        "next_loss": loss,
        "loss_equal": loss == wanted["loss"],
        "changed": {k: list(v) for k, v in drift.items()},
    }


def same_loss(loss: float, wanted: float, machine: Machine) -> bool:
    """Whether two losses are of the same numbers: on a CPU equal, on a GPU within rounding."""
    allowed = 0.0 if machine.device.type == "cpu" else ROUNDING.get(machine.compute, 0.0)
    return loss == wanted or abs(loss - wanted) <= allowed * abs(wanted)


def gather_random(machine: Machine) -> list[dict[str, Any]]:
    """The random states of all processes, by rank."""
    return gather_object([random_states()]) if machine.world > 1 else [random_states()]


def same_on_all(machine: Machine, value: Any) -> None:
    """Compares something (names of what trains) over processes: a redraw that differs would train different models."""
    if machine.world == 1:
        return
    first = [value]
    broadcast_object_list(first)
    if machine.any(first[0] != value):
        raise LuthierError(
            "the processes drew different parameters to train: the seed or the data is not the same on all"
        )
