"""A training run from its plan: base, data, deltas, machine, proof, loop. Measuring before and after stands above this room."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.attach import Attached, attached
from luthier.bases.hardware import choose_device, has_bf16, peak_memory, reset_peak, set_malloc
from luthier.bases.load import Base, load_base
from luthier.data.prepare import prepare
from luthier.delta import OBJECTIVES
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.plan.schema import Plan
from luthier.training import certificate, checkpoint, proof
from luthier.training.events import Events
from luthier.training.fast import Pruner, speed_up
from luthier.training.feed import Feed
from luthier.training.groups import make_optimiser
from luthier.training.loop import Loop, Progress, train
from luthier.training.machine import Machine, make_accelerator
from luthier.training.pieces import Pieces, score_gradients
from luthier.training.precision import choose_precision
from luthier.training.view import HeadSelector, View

OBJECTIVE_OF = {("sft", "classify"): "classification"}
"""sft on a base of another kind means that base's own loss."""
SCORED = 8
"""Micro-batches over which choices that score by gradients collect them."""


@dataclass
class Training:
    """A run made ready: everything exists, nothing has moved. `train` moves it."""

    plan: Plan
    base: Base
    data: Any
    handle: Attached
    pieces: Pieces
    machine: Machine
    loop: Loop
    out: Path
    events: Events
    record: dict[str, Any] = field(default_factory=dict)
    """What happened, for the report: rehearsal, known answers, certificate, peak memory."""

    def train(self) -> Progress:
        """Trains, then leaves the model with the deltas it ends with."""
        self.base.model.train()
        progress = train(self.loop)
        self.base.model.eval()
        self.events.close(self.loop)
        self.record["peak_memory"] = peak_memory(self.machine.device)
        return progress

    def delta(self) -> Delta:
        """The delta as it stands, with its base and lineage."""
        delta = self.handle.delta(self.pieces.sites)
        spec, base = self.plan.base, self.base
        delta.base = {
            "name": base.name,
            "kind": base.kind,
            "fingerprint": base.fingerprint,
            "tokenizer": self.data.ledger.fingerprints.get("tokenizer"),
            "template": self.data.ledger.fingerprints.get("template"),
            "new_tokens": spec.new_tokens,
            "labels": spec.labels,
            "dtype": self.machine.precision.base,
            "seed": self.plan.train.seed,
        }
        delta.lineage = {
            "plan": self.plan.model_dump(mode="json", by_alias=True),
            "data": self.data.fingerprint,
            "steps": self.loop.progress.step,
            "versions": certificate.versions(),
            "parents": list(spec.deltas),
        }
        return delta


@contextmanager
def signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to save and leave after the step; a second one ends it at once."""
    old: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        stop(signal.Signals(number).name)
        for each, handler in old.items():
            signal.signal(each, handler if callable(handler) else signal.SIG_DFL)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.getsignal(number)
            signal.signal(number, ask)
    except ValueError:  # not the main thread: the caller's own handling stays
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def build(plan: Plan, out: Path, *, resume: bool = False, progress: bool = True) -> Training:
    """Loads the base and the data, attaches the deltas, proves what can be proven, and resumes if asked."""
    torch.manual_seed(plan.train.seed)
    set_malloc()
    device = choose_device(None)
    accelerator = make_accelerator(plan.train.fsdp, device, plan.train.report_to, out)
    device = accelerator.device
    moves_base = any(d.choice for d in plan.delta) or bool(plan.base.new_tokens) or plan.base.kind == "classify"
    precision = choose_precision(plan.train.precision, moves_base, has_bf16(device))
    spec = plan.base.model_copy(update={"dtype": precision.base} if plan.base.dtype == "auto" else {})
    base = load_base(spec, device=device, seed=plan.train.seed)
    data = prepare(plan.data, base.tokenizer, kind=base.kind, labels=plan.base.labels, seed=plan.train.seed)
    handle = attached(base.model)
    for k, folder in enumerate(plan.base.deltas):
        parent = Delta.load(folder)
        proof.same_base(parent, base)
        for piece in parent.pieces:
            piece.name = f"parent{k}-{piece.name}"
            handle.add(piece)
    pieces = Pieces(handle, base, plan.train.seed)
    pieces.attach(plan.delta)
    if plan.train.checkpointing:
        _checkpoint_activations(base.model)
    if plan.train.compile:
        base.model.compile(dynamic=True)
    head = base.model.get_output_embeddings() if base.kind != "classify" else None
    selector = HeadSelector(head) if head is not None else None
    fused: dict[str, int] = {}
    if not plan.train.compile:
        fused = speed_up(base.model, base.roles)
        if selector is not None and base.kind == "causal" and not plan.train.checkpointing:
            Pruner(base.roles, base.model, selector)
    machine = Machine(accelerator, precision, base.model, plan.train.fsdp)
    objective = OBJECTIVES.make(
        OBJECTIVE_OF.get((plan.objective.name, base.kind), plan.objective.name), plan.objective.settings
    )

    def view(batch: Any) -> View:
        handle.ctx.columns, handle.ctx.segments = batch, batch.get("segments")
        return View(machine.model, batch, selector, base.kind)

    found = checkpoint.latest(out / "checkpoints") if resume else None
    if resume and found is None:
        raise LuthierError(f"nothing to resume in {out / 'checkpoints'}: run without --resume, or set checkpoint.every")
    tensors, state = checkpoint.load(found) if found else ({}, {})
    if found:
        certificate.same_settings(plan, state, data, machine)
        pieces.load_state(state["choices"], checkpoint.selections_in(tensors))
        checkpoint.put_back(handle, tensors)
    else:
        if pieces.needs_gradients:
            _score(plan, pieces, data, machine, objective, view)
        pieces.draw(0)
    if machine.world > 1:
        if machine.sharded:
            pieces.hold_as_trained()
        torch.manual_seed(
            plan.train.seed + machine.rank
        )  # dropout differs between processes; draws have their own seeds
    machine.wrap()
    optimiser = make_optimiser(handle, plan.train, pieces.rates)
    feed = Feed(
        base, data.batches(plan.train.batch_size, machine.rank, machine.world), plan.train.accumulate, machine.compute
    )
    steps = _steps(plan, data, machine.world)
    events = Events(plan, pieces, data, out, feed, progress)
    loop = Loop(
        plan.train,
        steps,
        machine,
        handle,
        optimiser,
        objective,
        view,
        feed.step,
        Progress(),
        events.on_step,
        events.on_non_finite,
    )
    training = Training(plan, base, data, handle, pieces, machine, loop, out, events)
    training.record |= {
        "precision": precision.report(),
        "steps": steps,
        "world": machine.world,
        "fused": fused,
        "wrapper": type(machine.model).__name__,
    }
    training.record["known_answers"] = proof.known_answers(training) if not found else state["known_answers"]
    reset_peak(device)
    if plan.train.rehearse:
        training.record["rehearsal"] = proof.rehearse(training)
    events.known_answers = training.record["known_answers"]
    if found:
        optimiser.load({k.removeprefix("optimiser|"): v for k, v in tensors.items() if k.startswith("optimiser|")})
        loop.progress = Progress(**state["progress"])
        events.best_tensors = {k.removeprefix("best|"): v for k, v in tensors.items() if k.startswith("best|")} or None
        feed.load_state_dict(state["data"])
        checkpoint.set_random_states(state["random"][machine.rank])
        training.record["resume_certificate"] = certificate.check(loop, feed, state)
    events.begin(loop)
    return training


def _checkpoint_activations(model: Any) -> None:
    """By the name that transformers gives it from 5.20 on, or the older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as e:
        raise LuthierError(f"train.checkpointing: {e}: set it to false for this architecture") from e


def _steps(plan: Plan, data: Any, world: int) -> int:
    if plan.train.steps:
        return plan.train.steps
    epoch = data.steps_per_epoch(plan.train.batch_size, plan.train.accumulate, world)
    if epoch is None:
        raise LuthierError("a streamed and packed run has no known length: state train.steps")
    return max(1, math.ceil(plan.train.epochs * epoch))


def _score(plan: Plan, pieces: Pieces, data: Any, machine: Machine, objective: Any, view: Any) -> None:
    batches = Feed(pieces.base, data.batches(plan.train.batch_size), 1, machine.compute)
    device = machine.device

    def micro(batch: Any) -> torch.Tensor:
        with machine.precision.context(device):
            total, count = objective(view(machine.to_device(batch)))
        return total / count

    score_gradients(pieces, (next(batches) for _ in range(SCORED)), micro)


def plain(progress: Progress) -> dict[str, Any]:
    """A Progress as JSON."""
    return asdict(progress)
