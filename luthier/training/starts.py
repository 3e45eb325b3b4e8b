"""What a run goes on from: every piece of the deltas that `start_from` names finds its place in it, none is dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.bases.fingerprint import compare
from luthier.bases.load import Base
from luthier.delta import FORMS
from luthier.delta.artefact import Delta, Piece
from luthier.delta.header import read_header
from luthier.errors import LuthierError
from luthier.plan.schema import DeltaSpec, Plan


@dataclass
class Starts:
    """Where the pieces of earlier deltas go."""

    taken: dict[int, list[Piece]] = field(default_factory=dict)
    """Number of the plan's delta -> the pieces it goes on with."""
    new: list[Piece] = field(default_factory=list)
    """Numbers that the checkpoint lacks (a fresh head, rows of new tokens), which train on in every run."""
    along: list[Piece] = field(default_factory=list)
    """What no delta of the plan takes: it stays as it is, on and frozen, and is saved with the rest."""


def inherited(plan: Plan) -> tuple[Plan, int]:
    """The plan with kind, labels and new tokens of the deltas that it stands on or goes on from, and the seed that the numbers
    which a checkpoint lacks start with: theirs, since exact differences rest on it, or else the run's own.

    Errors: LuthierError where the plan, or two of the deltas, have another kind, labels or tokens, or other seeds for them.
    """
    named = dict.fromkeys([*plan.base.deltas, *(d.start_from for d in plan.delta if d.start_from)])
    cards = {folder: read_header(folder)["base"] for folder in named}
    found: dict[str, Any] = {}
    seeds: dict[int, str] = {}
    for folder, card in cards.items():
        for key in ("kind", "labels", "new_tokens"):
            if not (brought := card.get(key)):
                continue
            said = getattr(plan.base, key)
            stated = found.setdefault(key, brought if said in (None, [], "causal") else said)
            if stated != brought:
                raise LuthierError(
                    f"base.{key}: {folder} was made with {brought}, not with {stated}: state the same, or leave it out; to "
                    "go beyond it, 'luthier export' it and name that as the base"
                )
            if key != "kind":
                seeds.setdefault(card.get("seed") or 0, folder)
    if len(seeds) > 1:
        one, other = list(seeds.values())[:2]
        raise LuthierError(
            f"{one} and {other} started their new numbers from different seeds: 'luthier export' one and name that as the base"
        )
    base = plan.base.model_copy(update=found)
    return plan.model_copy(update={"base": base}), next(iter(seeds), plan.train.seed)


def starts_of(
    specs: Sequence[DeltaSpec], base: Base, fresh: Collection[str], read: Callable[[str], Delta] = Delta.load
) -> Starts:
    """The pieces of every delta that `specs` go on from, by where they go.

    A form takes the piece of its name, or the only one; a choice the moved parameters of its name where several choices
    go on from that delta, else all of them. fresh: parameters that are the checkpoint's new ones, in whole or in part.
    read: loads a delta's folder.
    Errors: another base, a piece that is not there or is taken twice, settings that the piece contradicts.
    """
    starts = Starts()
    for folder in dict.fromkeys(s.start_from for s in specs if s.start_from):
        parent = read(folder)
        same_base(parent, base)
        new = [p for p in parent.pieces if f"{p.name}-".startswith("new-") and set(p.sites) <= set(fresh)]
        starts.new += new
        owner: dict[str, str] = {p.name: "new" for p in new}
        takers = [(n, s) for n, s in enumerate(specs) if s.start_from == folder]
        alone = sum(s.choice is not None for _, s in takers) == 1
        for n, spec in takers:
            title = spec.name or spec.form or spec.choice or ""
            starts.taken[n] = [_piece_of(parent, spec)] if spec.form else _moved_of(parent, spec, owner, alone)
            for piece in starts.taken[n]:
                if piece.name in owner:
                    raise LuthierError(
                        f"delta '{title}': piece '{piece.name}' of {folder} goes on as '{owner[piece.name]}' already: name "
                        "each delta like the piece it goes on with, or leave one out"
                    )
                owner[piece.name] = title
        starts.along += [p for p in parent.pieces if p.name not in owner]
    return starts


def _piece_of(parent: Delta, spec: DeltaSpec) -> Piece:
    """The piece that a form goes on with; whatever the plan states must be what it is."""
    found = {p.name: p for p in parent.pieces}
    wanted = spec.name or spec.form or ""
    if wanted not in found and len(found) > 1:
        raise LuthierError(
            f"start_from {spec.start_from} has no piece '{wanted}'; it has {', '.join(found)}: name this delta like one of them"
        )
    piece = found.get(wanted) or parent.pieces[0]
    if (kind := FORMS.name_of(type(piece.form))) != spec.form:
        raise LuthierError(f"delta '{wanted}' is a {spec.form}, but start_from {spec.start_from} holds {kind}")
    stated = FORMS.make(spec.form or "", spec.settings)
    other = [k for k in spec.settings if getattr(stated, k) != getattr(piece.form, k)]
    other += [k for k, v in (("sites", spec.sites), ("except", spec.except_), ("layers", spec.layers)) if v]
    if other:
        raise LuthierError(
            f"delta '{wanted}' goes on from {spec.start_from}, which fixes its {other[0]}: leave that out, or start anew without start_from"
        )
    return piece


def _moved_of(parent: Delta, spec: DeltaSpec, owner: Collection[str], alone: bool) -> list[Piece]:
    """The moved parameters that a choice goes on with."""
    wanted = spec.name or spec.choice or ""
    exact = [p for p in parent.pieces if p.form.at == "base" and p.name not in owner]
    if not alone:
        exact = [p for p in exact if p.name == wanted or p.name.startswith((f"{wanted}-entries-", f"{wanted}-dense-"))]
    if not exact:
        raise LuthierError(
            f"delta '{wanted}': {spec.start_from} holds no moved parameters for a choice to go on with; it has "
            f"{', '.join(p.name for p in parent.pieces) or 'no piece'}: go on with a form, or start anew without start_from"
        )
    return exact


def same_base(delta: Delta, base: Base) -> None:
    """A delta that says it was made on another base is an error that shows both fingerprints."""
    stated = delta.base.get("fingerprint")
    if stated and base.fingerprint and compare(stated, base.fingerprint) == "different":
        raise LuthierError(
            f"the delta was made on base {stated} ({delta.base.get('name')}), this is {base.fingerprint} ({base.name}): load the right base"
        )
