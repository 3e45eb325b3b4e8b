"""From a plan's deltas to pieces on the model: forms are built, choices draw, redraw and release."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.attach import Attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.load import Base
from luthier.choices.engine import ChoiceContext
from luthier.delta import CHOICES, FORMS, Site
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.plan.schema import DeltaSpec
from luthier.training.groups import Rates
from luthier.training.starts import starts_of

Selection = dict[str, Tensor | None]


@dataclass
class Chosen:
    """A choice at work on a model."""

    name: str
    choice: Any
    items: dict[str, Site]
    ever: set[str] = field(default_factory=set)
    drawn_at: int = 0


@dataclass
class Pieces:
    """Everything of the plan's deltas on one model."""

    handle: Attached
    base: Base
    seed: int
    parents: frozenset[str] = frozenset()
    """Frozen pieces of earlier deltas that this run stands on."""
    started: set[str] = field(default_factory=set)
    """Those that go on from an earlier delta."""
    chosen: list[Chosen] = field(default_factory=list)
    rates: dict[str, Rates] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    """Every base parameter by name."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the coming micro-batches, for choices that score by them; kept for the draw only."""
    squares: dict[str, Tensor] = field(default_factory=dict)
    """The mean of their squares, row by row; likewise."""
    score: Callable[[], None] | None = None
    """Fills `gradients` and `squares`; supplied by the run, which has the data."""

    def attach(self, specs: Iterable[DeltaSpec], read: Callable[[str], Delta] = Delta.load) -> None:
        """Builds the forms and makes the first draw of the choices; names are made unique. read: loads a delta's folder."""
        self.sites = parameter_items(self.base.roles, self.base.model)
        specs, fresh = list(specs), self._fresh()
        starts = starts_of(specs, self.base, fresh, read)
        if starts.new:
            self.handle.adopt("new", starts.new)
            self.started.add("new")
        for piece in starts.along:
            piece.name = _unused(piece.name, self.handle.pieces)
            self.handle.add(piece)
            self.started.add(piece.name)
        taken: set[str] = set(self.handle.pieces)
        for n, spec in enumerate(specs):
            name = _unused(spec.name or spec.form or spec.choice or "", taken)
            taken.add(name)
            self.rates[name] = Rates(spec.lr, spec.weight_decay)
            self.started |= {name} if spec.start_from else set()
            if spec.form:
                self._form(name, spec, starts.taken.get(n, []))
            else:
                self._choice(name, spec, starts.taken.get(n, []))
        own = {k for name, table in self.handle.edits.items() if name != "new" for k in table}
        if fresh := {k: v for k, v in fresh.items() if k not in own}:
            self.handle.move("new", fresh)

    def _form(self, name: str, spec: DeltaSpec, start: list[Piece]) -> None:
        form = FORMS.make(spec.form or "", spec.settings)
        if start:
            (piece,) = start
            piece.name = name
        else:
            sites = sites_for(self.base.roles, form, spec.sites, spec.except_, spec.layers)
            piece = self.handle.build(name, form, sites, self.seed)
        self.handle.add(piece, train=True)

    def _choice(self, name: str, spec: DeltaSpec, start: list[Piece]) -> None:
        choice = CHOICES.make(spec.choice or "", spec.settings)
        items = self.sites
        if spec.sites or spec.except_ or spec.layers:
            parts = self.base.roles.select(spec.sites or ["all"], spec.except_, spec.layers)
            wanted = {p for part in parts for p in part.parameters}
            items = {k: v for k, v in items.items() if k in wanted}
        self.chosen.append(Chosen(name, choice, items))
        if start:
            self.handle.adopt(name, start)

    def _fresh(self) -> Selection:
        """Parts the checkpoint lacks (a fresh head, rows of new tokens): they train with whatever else does."""
        fresh: Selection = {name: None for name in self.base.new_parameters}
        if self.base.new_rows:
            rows = torch.tensor(self.base.new_rows)
            for key, site in self.sites.items():
                if site.role in ("embed", "head") and site.parameter == "weight":
                    width = site.shape[-1]
                    fresh[key] = (rows[:, None] * width + torch.arange(width)).flatten()
        return fresh

    @property
    def needs_gradients(self) -> bool:
        return any(c.choice.looks for c in self.chosen)

    def hold_as_trained(self) -> None:
        """Float32 for all that a later redraw may let train: sharded parameters cannot change their type."""
        for chosen in self.chosen:
            if chosen.choice.every:
                for name in chosen.items:
                    parameter = self.base.model.get_parameter(name)
                    parameter.data = parameter.data.float()

    def draw(self, step: int) -> bool:
        """Draws every choice whose time has come; True when what trains has changed."""
        due = [
            c
            for c in self.chosen
            if not c.ever or (c.choice.every and step % c.choice.every == 0 and step != c.drawn_at)
        ]
        if self.score is not None and any(c.choice.looks for c in due):
            self.score()
        for chosen in due:
            self.select(chosen, chosen.choice.select(chosen.items, self._context(chosen, step)), step)
        self.gradients.clear()
        self.squares.clear()
        return bool(due)

    def select(self, chosen: Chosen, selection: Selection, step: int) -> None:
        """Lets exactly `selection` of a choice train; the rest of what it moved stays or returns to the base."""
        if not selection:
            raise LuthierError(
                f"choice '{chosen.name}' chose nothing: nothing would be trained; state other sites or a larger budget"
            )
        selection = self._beside_new(selection)
        table = self.handle.edits.get(chosen.name, {})
        for name, edit in list(table.items()):
            if name not in selection:
                edit.train(False)
                if chosen.choice.released == "return":
                    edit.restore()
        self.handle.move(chosen.name, selection, back=chosen.choice.released == "return")
        chosen.ever |= set(selection)
        chosen.drawn_at = step

    def _beside_new(self, selection: Selection) -> Selection:
        """What a choice takes where new numbers train anyway: a fresh head stays theirs, whole embeddings become its own."""
        new = self.handle.edits.get("new", {})
        for name in [n for n in new if n in selection and selection[n] is None and new[n].values is not None]:
            new.pop(name).restore()
        return {n: i for n, i in selection.items() if n not in new or new[n].values is not None}

    def _context(self, chosen: Chosen, step: int) -> ChoiceContext:
        return ChoiceContext(
            seed=self.seed,
            step=step,
            weight=lambda name: self.base.model.get_parameter(name).detach(),
            grad=lambda name: self.gradients.get(name),
            square=lambda name: self.squares.get(name),
        )

    def state(self) -> dict[str, Any]:
        """Which parameters train now, for checkpoints."""
        return {
            c.name: {
                "drawn_at": c.drawn_at,
                "ever": sorted(c.ever),
                "now": [k for k, e in self.handle.edits.get(c.name, {}).items() if e.trained.requires_grad],
            }
            for c in self.chosen
        }

    def load_state(self, state: dict[str, Any], selections: dict[str, Selection]) -> None:
        """Puts choices where a checkpoint had them."""
        for chosen in self.chosen:
            own, moved = state[chosen.name], self._beside_new(selections.get(chosen.name, {}))
            self.handle.move(chosen.name, moved)
            for key, edit in self.handle.edits[chosen.name].items():
                edit.train(key in own["now"])
            chosen.ever, chosen.drawn_at = set(own["ever"]), own["drawn_at"]


def _unused(stem: str, taken: Collection[str]) -> str:
    """The name, with a number behind it where it is taken."""
    name, k = stem, 2
    while name in taken:
        name, k = f"{stem}-{k}", k + 1
    return name


def score_gradients(pieces: Pieces, batches: Iterable[Any], micro: Any, squared: bool = False) -> None:
    """Fills `pieces.gradients`: the sum over `batches` of each candidate's gradient, held on the CPU, one tensor at a time.

    `micro(batch)` gives the loss of a batch. Gradients are taken off each parameter as soon as they are complete.
    squared: fills `pieces.squares` instead, with the mean over `batches`, which are single rows, of the gradient's squares.
    """
    wanted = {
        name for c in pieces.chosen if (c.choice.needs_squares if squared else c.choice.needs_grad) for name in c.items
    }
    kept, count, hooks = pieces.squares if squared else pieces.gradients, 0, []
    model = pieces.base.model
    paused = [e for t in pieces.handle.edits.values() for e in t.values() if e.trained.requires_grad]
    for edit in paused:  # their own hooks would take the gradients away
        edit.train(False)

    def gather(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            grad = parameter.grad.float().cpu()
            grad = grad.square() if squared else grad
            kept[name] = kept[name] + grad if name in kept else grad
            parameter.grad = None

        return hook

    for name in wanted:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(True)
        hooks.append((parameter, parameter.register_post_accumulate_grad_hook(gather(name))))
    for batch in batches:
        micro(batch).backward()
        count += 1
    for value in kept.values() if squared else ():
        value /= count
    for parameter, hook in hooks:
        hook.remove()
        parameter.requires_grad_(False)
    for edit in paused:
        edit.train(True)
    model.zero_grad(set_to_none=True)  # forms that already train collected gradients too
