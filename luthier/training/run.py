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
from luthier.attach.prompts import stack_of
from luthier.bases.fingerprint import fingerprint_template, fingerprint_tokenizer, full_fingerprint
from luthier.bases.hardware import choose_device, has_bf16, limit_kernels, peak_memory, reset_peak, set_malloc
from luthier.bases.load import Base, load_base
from luthier.data.prepare import prepare
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.plan.schema import Plan
from luthier.training import certificate, checkpoint, proof
from luthier.training.events import Events
from luthier.training.fast import Pruner, slow_down, speed_up
from luthier.training.feed import Feed, micro_batches, positions_at_once
from luthier.training.goal import objective_of, reference_of, rows_of
from luthier.training.groups import make_optimiser
from luthier.training.loop import Loop, Progress, train
from luthier.training.machine import Machine, make_accelerator
from luthier.training.pieces import Pieces, score_gradients
from luthier.training.precision import precision_of
from luthier.training.starts import inherited, same_base
from luthier.training.view import HeadSelector, View, block_of

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
    fitted: Fitted
    record: dict[str, Any] = field(default_factory=dict)
    """What happened, for the report: rehearsal, known answers, certificate, peak memory."""

    def train(self) -> Progress:
        """Trains, then leaves the model with the deltas it ends with."""
        self.base.model.train()
        try:
            progress = train(self.loop)
            self.base.model.eval()
            self.events.finish(self.loop)
        finally:
            self.fitted.remove()
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
            "full_fingerprint": self.record.get("full_fingerprint"),
            "tokenizer": fingerprint_tokenizer(base.tokenizer),
            "template": fingerprint_template(self.data.template or base.tokenizer),
            "new_tokens": spec.new_tokens,
            "labels": spec.labels,
            "dtype": str(base.dtype)[6:],
            "seed": base.seed,
        }
        delta.lineage = {
            "plan": self.plan.model_dump(mode="json", by_alias=True),
            "data": self.data.fingerprint,
            "steps": self.loop.progress.step,
            "versions": certificate.versions(),
            "parents": list(spec.deltas),
            "started_from": [d.start_from for d in self.plan.delta if d.start_from],
        }
        if self.plan.data.template and self.data.template:
            delta.files["chat_template.jinja"] = self.data.template.encode()
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


class Interrupted(Exception):
    """A signal that asked to leave what `interruptible` encloses; its text is the signal's name."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM raise Interrupted: for work that has nothing to save."""

    def leave(name: str) -> None:
        raise Interrupted(name)

    with signals(leave):
        yield


def build(plan: Plan, out: Path, *, resume: bool = False, progress: bool = True) -> Training:
    """Loads the base and the data, attaches the deltas, proves what can be proven, and resumes if asked."""
    plan, seed = inherited(plan)
    torch.manual_seed(plan.train.seed)
    set_malloc()
    limit_kernels()
    accelerator = make_accelerator(
        plan.train.fsdp, choose_device(None), plan.train.report_to, out, plan.model_dump(mode="json", by_alias=True)
    )
    device = accelerator.device
    precision, spec = precision_of(plan, has_bf16(device))
    base = load_base(spec, device=device, seed=seed)
    base.notes += [precision.note] if precision.note else []
    whole = None if base.new_rows else full_fingerprint(base.model, base.new_parameters)
    objective = objective_of(plan, base.kind)
    data = prepare(
        plan.data, base.tokenizer, kind=rows_of(objective, base.kind), labels=spec.labels, seed=plan.train.seed
    )
    _check(plan, data)
    pieces = attach_deltas(plan, base)
    fitted = fit(plan, base, block_of(precision.compute, device))
    machine = Machine(accelerator, precision, base.model, plan.train.fsdp)
    view = viewer(lambda: machine.model, pieces, fitted, objective)
    batches = data.batches(plan.train.batch_size, machine.rank, machine.world)
    at_once = positions_at_once(plan.train.tokens_at_once, device, machine.sharded)
    feed = Feed(base, batches, plan.train.accumulate, machine.compute, at_once)
    pieces.score = _scorer(plan, pieces, data, feed, machine, objective, view) if pieces.needs_gradients else None
    tensors, state = _found(plan, out, data, machine) if resume else ({}, {})
    if state:
        pieces.load_state(state["choices"], checkpoint.selections_in(tensors))
        checkpoint.put_back(pieces.handle, tensors)
    else:
        pieces.draw(0)
    if machine.world > 1:
        if machine.sharded:
            pieces.hold_as_trained()
        torch.manual_seed(
            plan.train.seed + machine.rank
        )  # dropout differs between processes; draws have their own seeds
    machine.wrap()
    optimiser = make_optimiser(pieces.handle, plan.train, pieces.rates)
    events = Events(plan, pieces, data, out, feed, progress)
    loop = Loop(
        plan.train, steps_of(plan, data, machine.world), machine, pieces.handle, optimiser, objective, view, feed.step,
        Progress(), events.on_step, events.on_non_finite,
    )  # fmt: skip
    if plan.train.warmup > loop.steps:
        base.notes.append(
            f"train.warmup: {plan.train.warmup:g} steps in a run of {loop.steps}: the rate never reaches train.lr"
        )
    training = Training(plan, base, data, pieces.handle, pieces, machine, loop, out, events, fitted)
    training.record |= {
        "precision": precision.report(),
        "full_fingerprint": whole,
        "world": machine.world,
        "fused": fitted.fused,
        "wrapper": type(machine.model).__name__,
    }
    _prove(training, tensors, state)
    events.begin(loop)
    return training


def _check(plan: Plan, data: Any) -> None:
    """Settings that would be ignored are errors."""
    train = plan.train
    wants = [k for k in ("eval_every", "early_stop", "keep_best") if getattr(train, k)]
    if wants and data.eval is None:
        raise LuthierError(f"train.{wants[0]} needs held-out records: state data.eval or data.holdout")
    if (train.early_stop or train.keep_best) and not train.eval_every:
        raise LuthierError(f"train.{wants[-1]} needs evaluations on the way: state train.eval_every")


def attach_deltas(plan: Plan, base: Base, read: Callable[[str], Delta] = Delta.load) -> Pieces:
    """The base's earlier deltas, frozen, and the plan's own on top; nothing has been drawn yet. read: loads a delta's folder."""
    handle = attached(base.model)
    for k, folder in enumerate(plan.base.deltas):
        parent = read(folder)
        same_base(parent, base)
        for piece in parent.pieces:
            piece.name = f"parent{k}-{piece.name}"
            handle.add(piece)
    pieces = Pieces(handle, base, plan.train.seed, parents=frozenset(handle.pieces))
    pieces.attach(plan.delta, read)
    return pieces


@dataclass
class Fitted:
    """What was put on the base's forward pass for training's sake, and can be taken off again."""

    model: Any
    selector: HeadSelector | None
    pruner: Pruner | None = None
    fused: dict[str, int] = field(default_factory=dict)

    def remove(self) -> None:
        """Leaves the model with the deltas alone."""
        slow_down(self.model)
        for module in self.model.modules():
            module._compiled_call_impl = None
        if self.pruner:
            self.pruner.remove()
        if self.selector:
            self.selector.hook.remove()


def fit(plan: Plan, base: Base, block: int, *, traced: bool = False) -> Fitted:
    """Makes the base's forward pass what the plan wants: recomputed, compiled, or fused and pruned.

    block: as HeadSelector's. traced: the model has no numbers, by which faster blocks are tried and kernels compiled, and
    neither is done.
    """
    head = base.model.get_output_embeddings() if base.kind != "classify" else None
    selector = HeadSelector(head, block) if head is not None else None
    if plan.train.checkpointing:
        checkpoint_activations(base.model)
    if plan.train.compile:
        # The layers without the head, whose selection of positions differs in every batch and would compile anew.
        if not traced:
            (stack_of(base.model) or base.model).compile(dynamic=True)
        return Fitted(base.model, selector)
    fused = {} if traced else speed_up(base.model)
    if selector is None or base.kind != "causal" or plan.train.checkpointing:
        return Fitted(base.model, selector, None, fused)
    return Fitted(base.model, selector, Pruner(base.roles, base.model, selector), fused)


def viewer(model: Callable[[], Any], pieces: Pieces, fitted: Fitted, objective: Any) -> Callable[[Any], View]:
    """What turns a batch into what the objective reads. model: gives the model to run, which is wrapped later. To be made
    before anything moves: the reference is the model of now."""
    handle, base, off = pieces.handle, pieces.base, reference_of(objective, pieces)

    def view(batch: Any) -> View:
        handle.ctx.columns, handle.ctx.segments = batch, batch.get("segments")
        return View(model(), batch, fitted.selector, base.kind, off)

    return view


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """The model as it is, for a few passes of odd shapes that are not worth a compilation each."""
    kept = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in kept:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in kept.items():
            module._compiled_call_impl = call


def _found(plan: Plan, out: Path, data: Any, machine: Machine) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The newest checkpoint, after it has been found to be of this very run."""
    path = checkpoint.latest(out / "checkpoints")
    if path is None:
        raise LuthierError(f"nothing to resume in {out / 'checkpoints'}: run without --resume, or set checkpoint.every")
    tensors, state = checkpoint.load(path)
    certificate.same_settings(plan, state, data, machine)
    return tensors, state


def _prove(training: Training, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Known answers and rehearsal before step one; then the run is put where its checkpoint had it, with a certificate."""
    record, loop, events = training.record, training.loop, training.events
    with uncompiled(training.base.model):
        record["known_answers"] = state["known_answers"] if state else proof.known_answers(training)
    events.known_answers = record["known_answers"]
    reset_peak(training.machine.device)
    if training.plan.train.rehearse:
        record["rehearsal"] = proof.rehearse(training)
    if not state:
        return
    loop.optimiser.load({k.removeprefix("optimiser|"): v for k, v in tensors.items() if k.startswith("optimiser|")})
    loop.progress = Progress(**state["progress"])
    events.restore(tensors, state)
    events.batches.load_state_dict(state["data"])
    checkpoint.set_random_states(state["random"][training.machine.rank])
    record["resume_certificate"] = certificate.check(loop, events.batches, state)


def checkpoint_activations(model: Any) -> None:
    """By the name that transformers gives it from 5.20 on, or the older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as e:
        raise LuthierError(f"train.checkpointing: {e}: set it to false for this architecture") from e


def steps_of(plan: Plan, data: Any, world: int) -> int:
    if plan.train.steps:
        return plan.train.steps
    epoch = data.steps_per_epoch(plan.train.batch_size, plan.train.accumulate, world)
    if epoch is None:
        raise LuthierError("a streamed and packed run has no known length: state train.steps")
    return max(1, math.ceil(plan.train.epochs * epoch))


def _scorer(
    plan: Plan, pieces: Pieces, data: Any, feed: Feed, machine: Machine, objective: Any, view: Any
) -> Callable[[], None]:
    """Collects gradients over the coming micro-batches; the data and the random numbers then go on as if it had not."""
    if machine.world > 1 and any(c.choice.every and c.choice.looks for c in pieces.chosen):
        raise LuthierError("a choice that scores by gradients and draws again needs one process: set its every to 0")

    def micro(batch: Any) -> torch.Tensor:
        with machine.precision.context(machine.device):
            total, count = objective(view(machine.to_device(batch)))
        return total / count

    def score() -> None:
        source = (
            feed if machine.world == 1 else Feed(pieces.base, data.batches(plan.train.batch_size), 1, machine.compute)
        )
        position, states = source.state_dict(), checkpoint.random_states()
        if any(c.choice.needs_grad for c in pieces.chosen):
            score_gradients(pieces, (next(source) for _ in range(SCORED)), micro)
            source.load_state_dict(position)
        if any(c.choice.needs_squares for c in pieces.chosen):
            rows = (
                r for _ in range(SCORED) for r in micro_batches(next(source.batches), pieces.base, machine.compute, 1)
            )
            score_gradients(pieces, rows, micro, squared=True)
            source.load_state_dict(position)
        checkpoint.set_random_states(states)

    return score


def plain(progress: Progress) -> dict[str, Any]:
    """A Progress as JSON."""
    return asdict(progress)
