"""Memory and time of a step before there are weights: the step is run on fake tensors, and every storage is followed.

Operations compute shapes only, so a model of any size is traced in seconds and in no memory. What an operation
allocates inside itself is not seen: a few per cent.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from luthier.bases.load import Base
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.plan.schema import Plan
from luthier.training.fast import speed_up
from luthier.training.goal import objective_of
from luthier.training.groups import make_optimiser
from luthier.training.loop import backward, update
from luthier.training.pieces import Pieces
from luthier.training.precision import Precision
from luthier.training.run import attach_deltas, fit, viewer
from luthier.training.view import Batch, HeadSelector, View, block_of

FILLER = 1 << 20
"""Numbers drawn for a weight that a choice wants to look at; a larger one repeats them."""
COLLECT = 16
"""Storages made between collections: recomputed layers leave cycles behind on fake tensors that a run does not have."""


@dataclass(frozen=True)
class Traced:
    """A traced callable, in bytes and operations."""

    peak: int
    """Most bytes of tensors alive at once, with what was alive before."""
    held: int
    """Bytes alive when it began: weights and what came with them."""
    after: int
    """Bytes alive at the end: with gradients freed, what the optimiser keeps has been added."""
    flops: int
    """Floating-point operations of matrix products and attention, a multiply-add as two."""
    products: int = 0
    """Matrix products and attentions of different shapes among them."""


class Alive(TorchDispatchMode):
    """Within it, bytes of every storage that an operation makes are counted until it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self._made = 0
        self.products: set[Any] = set()
        """Operation and shapes of every matrix product and attention."""
        self._seen = WeakIdKeyDictionary()

    def see(self, value: Any) -> None:
        """Counts a tensor's storage, once however many views it has."""
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self._made += 1
        if self._made % COLLECT == 0:
            gc.collect(1)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.products.add((func, *(tuple(a.shape) for a in args if isinstance(a, Tensor))))
        for value in tree_iter(out):
            self.see(value)
        return out


def predict_peak(step: Callable[[], Any], held: Any = (), mode: AbstractContextManager[Any] | None = None) -> Traced:
    """Runs `step` and gives the peak of what its tensors take, on top of `held` (any nesting of tensors and modules).

    mode: the FakeTensorMode in which the held tensors were made; None traces a real run on real tensors.
    """
    alive, flops = Alive(), FlopCounterMode(display=False)
    for value in tree_iter(held):
        for tensor in [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]:
            alive.see(tensor)
    before = alive.peak = alive.now
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again and again
    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True), flops, alive:
            step()
    finally:
        gc.unfreeze()
    return Traced(alive.peak, before, alive.now, flops.get_total_flops(), len(alive.products))


def without_weights(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Gives a model on the meta device fake tensors on `device`; ties stay ties."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    with mode:
                        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]


@dataclass(frozen=True)
class Prediction:
    """What a step of a plan takes, and what moves in it."""

    step: Traced
    pieces: Pieces
    moving: dict[str, dict[str, int]]
    """Piece -> role -> numbers that train at first."""
    sites: dict[str, dict[str, int]]
    """Piece -> role -> places."""
    kept: int
    """Bytes of optimiser moments and gradients of what moves: part of step.peak."""


def predict_step(plan: Plan, base: Base, parts: list[Batch], precision: Precision, device: torch.device) -> Prediction:
    """Traces forward, backward and optimiser step of `plan` on the parts of a batch (real token ids) with a base without
    weights.

    The base's model is given fake tensors and the plan's deltas; it cannot be used for anything else afterwards.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = base.model
    if not plan.train.compile:
        _as_fast(base)
    without_weights(model, mode, device)
    with mode:
        pieces = attach_deltas(plan, base, _read)
    handle = pieces.handle
    fitted = fit(plan, base, block_of(precision.compute, device), traced=True)
    objective = objective_of(plan, base.kind)
    see = viewer(lambda: model, pieces, fitted, objective)
    _draw(pieces, mode)
    faked = [_faked(part, base, fitted.selector, mode, device) for part in parts]
    with mode:
        optimiser = make_optimiser(handle, plan.train, pieces.rates)
    model.train()
    numbers = list(optimiser.names.values())

    def step(parts: Sequence[tuple[Any, Any]]) -> None:
        for inputs, supervised in parts:
            view = see(inputs)
            view.__dict__.update(supervised)
            backward(view, objective, handle, precision.context(device))
            view.__dict__.clear()
        joint = device.type != "mps"  # as Machine.clip
        norm = torch.nn.utils.get_total_norm([p.grad for p in numbers if p.grad is not None], foreach=joint)
        if plan.train.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(numbers, plan.train.clip, norm, foreach=joint)
        update(optimiser, handle)
        optimiser.torch.zero_grad(set_to_none=True)

    held = [
        model,
        [e.original for t in handle.edits.values() for e in t.values()],
        numbers,
        [list(inputs.values()) for inputs, _ in faked],
    ]
    try:
        first = predict_peak(partial(step, faked[:1]), held, mode)
        moments = [v for state in optimiser.torch.state.values() for v in state.values()]
        traced = predict_peak(partial(step, faked), [*held, moments], mode)  # a run has them from the second step on
    except (DynamicOutputShapeException, DataDependentOutputException) as e:
        raise LuthierError(
            f"memory cannot be predicted: an operation looks at values ({e}); run without --dry-run"
        ) from e
    moving, sites = _moving(pieces)
    kept = first.after - first.held + sum(p.numel() * p.element_size() for p in numbers)
    return Prediction(replace(traced, held=first.held, after=first.after), pieces, moving, sites, kept)


def _read(folder: str) -> Delta:
    """A delta that the plan stands on; its numbers are there, and become fake where they meet the base's."""
    with unset_fake_temporarily():
        return Delta.load(folder)


def _as_fast(base: Base) -> None:
    """The run's faster blocks. They are tried on numbers first, so for that moment every weight is one number, repeated."""
    kept = [(m, k, p) for m in base.model.modules() for k, p in m._parameters.items() if p is not None]
    for module, name, old in kept:
        one = torch.full((1,), 0.01, dtype=old.dtype)
        module._parameters[name] = nn.Parameter(one.expand(old.shape), old.requires_grad)
    speed_up(base.model)
    for module, name, old in kept:
        module._parameters[name] = old


def _faked(
    batch: Batch, base: Base, selector: HeadSelector | None, mode: FakeTensorMode, device: torch.device
) -> tuple[Batch, dict[str, Any]]:
    """The batch and what a view finds out of its supervised positions, as fake tensors: how many there are is read off the
    real ones."""
    real = View(base.model, batch, selector, base.kind)

    def fake(value: Tensor) -> Tensor:
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=device)

    inputs = {k: fake(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if "segments" not in batch:  # counted from 0 without being told; told, their values would be looked at
        inputs.pop("position_ids", None)
    if base.kind == "classify":
        return inputs, {}
    return inputs, {"_supervised": tuple(map(fake, real._supervised)), "_selected": fake(real._selected)}


def _draw(pieces: Pieces, mode: FakeTensorMode) -> None:
    """The first draw of every choice. Which numbers a score picks is arbitrary here; how many is not."""
    shapes = {name: tuple(p.shape) for name, p in pieces.base.model.named_parameters()}

    def filler(name: str) -> Tensor:
        shape = shapes[name]
        size = int(torch.Size(shape).numel())
        drawn = torch.rand(min(size, FILLER), generator=torch.Generator().manual_seed(0))
        return drawn.repeat(-(-size // FILLER))[:size].view(shape)

    for chosen in pieces.chosen:
        context = pieces._context(chosen, 0)
        context.weight = context.grad = context.square = filler
        selection: Mapping[str, Tensor | None] = chosen.choice.select(chosen.items, context)
        with mode:
            pieces.select(chosen, dict(selection), 0)


def _moving(pieces: Pieces) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    numbers: dict[str, dict[str, int]] = {}
    places: dict[str, dict[str, int]] = {}
    handle = pieces.handle
    rows = [(n, q.state.site, q.state.p.values()) for n, placed in handle.placed.items() for q in placed]
    rows += [(n, pieces.sites[k], [e.trained]) for n, table in handle.edits.items() for k, e in table.items()]
    for name, site, tensors in rows:
        if count := sum(t.numel() for t in tensors if t.requires_grad):
            role = site.role or site.kind
            numbers.setdefault(name, {})[role] = numbers.setdefault(name, {}).get(role, 0) + count
            places.setdefault(name, {})[role] = places.setdefault(name, {}).get(role, 0) + 1
    return numbers, places
