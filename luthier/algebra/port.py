"""A delta onto another base: what fits, what is carried as it is, and what is written anew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.attach.weights import oriented
from luthier.bases.fingerprint import fingerprint_tokenizer
from luthier.bridge.target import Target
from luthier.delta import FORMS, No, Site, State
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.moving.engine import Transport
from luthier.parts.bits import encode

ANEW = "ported"
"""Name of the exact pieces that hold what had to be written anew."""


@dataclass(frozen=True)
class Carried:
    """What became of one piece. `preserved`: what is the same on the new base, in plain words."""

    piece: str
    form: str
    now: str
    preserved: str


# -- whether it fits


def fits(delta: Delta, new: Target, old: Target | None) -> None:
    """Raises LuthierError in one line where the new base has not the places that the delta was made for.

    old: the old base (its weights are not needed); where it is not at hand only the delta's own sites are compared.
    """
    if old is not None:
        _same_parts(old, new)
    if (stated := delta.base.get("kind", "causal")) != new.kind:
        raise LuthierError(f"the delta was made for a base of kind {stated}, {new.name} is {new.kind}: state onto.kind")
    parts = {p.name: p for p in new.roles.parts} | {p.module: p for p in new.roles.parts}
    for piece in delta.pieces:
        for key, site in piece.sites.items():
            if site.kind in ("model", "layer", "attention", "feed-forward"):
                if (site.layers, site.d_in) != (new.roles.layer_count, _width(site, new)):
                    raise _other(site, new, f"{site.layers} layers", f"{new.roles.layer_count}")
                continue
            if site.name not in parts:
                raise _other(site, new, site.name, "no such module")
            if piece.form.at == "base":
                have: Any = tuple(new.tensor(key).shape)
                want: Any = tuple(site.shape) or have
            else:
                part = parts[site.name]
                have, want = (part.d_out, part.d_in), (site.d_out, site.d_in)
                if site.bias != part.bias and part.name not in part.parameters:
                    raise _other(site, new, *("a bias" if b else "no bias" for b in (site.bias, part.bias)))
            if have != want:
                raise _other(site, new, "×".join(map(str, want)), "×".join(map(str, have)))
            if site.layers and site.layers != new.roles.layer_count:
                raise _other(site, new, f"a stack of {site.layers} layers", f"{new.roles.layer_count}")


def _width(site: Site, new: Target) -> int:
    return new.roles.n_kv_heads if site.kind == "attention" and site.d_in == site.kv_heads else new.roles.hidden


def _other(site: Site, new: Target, want: str, have: str) -> LuthierError:
    return LuthierError(
        f"the delta changes {site.name or 'the model'} ({want}), {new.name} has there {have}: it can be ported onto a base "
        "of the same architecture and sizes only; steer the other by luthier assemble"
    )


def _same_parts(old: Target, new: Target) -> None:
    families = [getattr(t.roles.config, "model_type", "?") for t in (old, new)]
    if families[0] != families[1]:
        raise LuthierError(
            f"{old.name} is a {families[0]}, {new.name} a {families[1]}: a delta can be ported within one architecture "
            "only; steer the other by luthier assemble"
        )
    a, b = ({p.name: (p.kind, p.d_out, p.d_in) for p in t.roles.parts} for t in (old, new))
    for name in [*a, *b]:
        if a.get(name) == b.get(name):
            continue
        said = [f"{x[name][1]}×{x[name][2]}" if name in x else "absent" for x in (a, b)]
        role = next(p.role for t in (old, new) for p in t.roles.parts if p.name == name)
        words = {"embed": 2, "head": 1}.get(role, 0)  # where the vocabulary stands in a part's (kind, d_out, d_in)
        apart = words and all(name in x for x in (a, b)) and a[name][words] != b[name][words]
        what = "their vocabularies differ" if apart else "their sizes differ"
        raise LuthierError(f"{name} is {said[0]} in {old.name} and {said[1]} in {new.name}, {what}: a delta can be ported "
                           "onto a base of the same sizes only")  # fmt: skip


def same_words(delta: Delta, new: Target, old: Callable[[], Target]) -> str | None:
    """Raises LuthierError where a token has another id on the new base; gives a note where only special tokens do.

    old: gives the old base with its tokenizer; asked only where the fingerprints differ.
    """
    told = delta.base.get("tokenizer")
    if not told or new.tokenizer is None or told == fingerprint_tokenizer(new.tokenizer):
        return None
    words = old().tokenizer
    if words is None:
        raise LuthierError(
            f"the tokenizer of {new.name} is not the delta's, and the old one is not at hand: state base:"
        )
    before, after, special = words.get_vocab(), new.tokenizer.get_vocab(), set(words.get_added_vocab())
    if moved := sorted(t for t, n in before.items() if after.get(t) != n and t not in special):
        raise LuthierError(f"{len(moved)} tokens have other ids on {new.name} ({moved[0]!r}): the vocabularies differ, and a "
                           "delta can be ported within one vocabulary only")  # fmt: skip
    return "special tokens differ from the old base's; all others have the same ids"


# -- carrying


class _Asked(Exception):
    """A form looked at the base's weight."""


def reads_base(piece: Piece) -> bool:
    """Whether the change of a piece depends on the base's values."""
    if piece.form.at == "base":
        return True

    def asked(site: Site) -> Tensor:
        raise _Asked

    try:
        for s in piece.states(asked):
            piece.form.delta(s)
            return False
    except _Asked:
        return True
    return False


def carry(
    delta: Delta, move: Transport, new: Target, old: Callable[[], Target] | None = None
) -> tuple[list[Piece], list[Carried]]:
    """The pieces on the new base, and what was preserved of each. Nothing handed in is changed.

    old: gives the old base with its weights; asked for only where a piece reads them. Errors: LuthierError where a piece
    is no change of weights and the move needs one, where the old base is needed and not at hand, and for values that are
    not finite.
    """
    pieces: list[Piece] = []
    told: list[Carried] = []
    anew: list[Piece] = []
    for piece in delta.pieces:
        name, form = FORMS.name_of(type(piece.form)), piece.form
        if isinstance(form.dense, No) and move.whole:
            raise LuthierError(f"piece '{piece.name}' ({name}) is no change of weights ({form.dense.reason}): use "
                               "method: portllm, which carries its numbers as they are")  # fmt: skip
        if isinstance(form.scales, No) and move.scale != 1:
            raise LuthierError(
                f"piece '{piece.name}' ({name}) cannot be scaled: {form.scales.reason}: leave scale at 1"
            )
        reads = reads_base(piece)
        if reads and (form.at == "base" or move.keep == "change"):
            anew.append(piece)
            told.append(Carried(piece.name, name, "dense", "the additive change"))
            continue
        scaled = dataclasses.replace(piece, scale=piece.scale * move.scale)
        if reads:
            scaled = _reseated(scaled, new)
            kept = "the form's trained numbers; its change follows the new base's weights"
        elif isinstance(form.dense, No):
            kept = "the form's numbers bit for bit; they are no change of weights"
        else:
            kept = "the additive change, its numbers bit for bit"
        pieces.append(scaled)
        told.append(Carried(piece.name, name, name, kept))
    if not anew:
        return pieces, told
    if old is None:
        raise LuthierError(
            f"piece '{anew[0].name}' depends on the old base's values, which are not at hand: state base:"
        )
    made, lost = _written_anew(delta, anew, move, new, old())
    told = [dataclasses.replace(t, preserved=f"{t.preserved}, at most {lost:.1e} of it lost to rounding")
            if t.now == "dense" else t for t in told]  # fmt: skip
    return [*made, *pieces], told


def _reseated(piece: Piece, new: Target) -> Piece:
    """The same trained numbers, the constant ones taken from the new base's weights."""
    fixed = {}
    for key, site in piece.sites.items():
        weight = oriented(new.tensor(f"{site.name}.{site.parameter}"), site).float().cpu()
        state = State(site, piece.p[key], piece.fixed[key], lambda w=weight: w, _bias(new, site))
        fixed[key] = dict(piece.form.start(state)[1])
    return dataclasses.replace(piece, fixed=fixed)


def _written_anew(
    delta: Delta, anew: list[Piece], move: Transport, new: Target, old: Target
) -> tuple[list[Piece], float]:
    """Exact pieces with the changes of `anew` on the new base, and the largest share of a change that rounding took.

    Whole and single moved parameters stay what they are; other forms become whole ones, under the name ANEW.
    """
    exact = [dataclasses.replace(p, p={}, fixed=p.fixed, scale=1.0) for p in anew if p.form.at == "base"]
    made: dict[str, Piece] = {}
    lost = 0.0
    for piece in exact:
        source = next(p for p in anew if p.name == piece.name)
        for name, change in changes(delta, [source], old):
            index = piece.fixed[name].get("index")
            dtype = getattr(torch, piece.form.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            bits, share = _encoded(name, change, move, new, old, dtype, index)
            piece.p[name], lost = {"bits": bits}, max(lost, share)
    others = [p for p in anew if p.form.at != "base"]
    for name, change in changes(delta, others, old):
        module, _, parameter = name.rpartition(".")
        if new.model.get_submodule(module)._parameters.get(parameter) is None:
            piece = made.setdefault("bias", Piece(f"{ANEW}-bias", FORMS.make("bias", {}), {}, {}, {}))
            piece.sites[module] = dataclasses.replace(new.weight(module), bias=False)
            piece.p[module], piece.fixed[module] = {"b": change * move.scale}, {}
            continue
        piece = made.setdefault("dense", Piece(ANEW, FORMS.make("dense", {"dtype": "float32"}), {}, {}, {}))
        bits, share = _encoded(name, change, move, new, old, torch.float32)
        piece.sites[name], piece.p[name], piece.fixed[name] = new.site(name), {"bits": bits}, {}
        lost = max(lost, share)
    return [*exact, *made.values()], lost


def _encoded(
    name: str,
    change: Tensor,
    move: Transport,
    new: Target,
    old: Target,
    dtype: torch.dtype,
    index: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Bits of the tuned parameter over the new base's, and the share of the change that rounding took."""
    base = new.tensor(name).detach().cpu()
    if torch.promote_types(base.dtype, dtype) != dtype:
        raise LuthierError(f"{new.name} is held in {str(base.dtype)[6:]}, the delta's exact differences in {str(dtype)[6:]}: "
                           f"state onto: {{name: {new.name}, dtype: {str(dtype)[6:]}}}")  # fmt: skip
    if index is not None:
        base, change = base.flatten()[index], change.flatten()[index]
    tuned = move.carry(base, change).to(dtype)
    if not torch.isfinite(tuned).all():
        raise LuthierError(f"{name} is not finite after the port: {_unsound(name, base, change, new, old)}")
    wanted = change * move.scale
    size = float(wanted.norm())
    share = float((tuned.float() - base.float() - wanted).norm()) / size if size else 0.0
    return encode(tuned, base), share


def _unsound(name: str, base: Tensor, change: Tensor, new: Target, old: Target) -> str:
    """Which side is to blame for a number that is none, and what to do."""
    for what, value in ((f"the new base {new.name}", base), (f"the old base {old.name}", old.tensor(name))):
        if not torch.isfinite(value).all():
            return f"{what} holds NaN or infinity there; fetch it again"
    if not torch.isfinite(change).all():
        return "the delta's own change holds NaN or infinity there; train it again"
    return f"the sum is beyond the range of {str(base.dtype)[6:]}; state onto: {{name: {new.name}, dtype: float32}}"


def changes(delta: Delta, wanted: list[Piece], old: Target) -> Iterator[tuple[str, Tensor]]:
    """(parameter, change in the model's own layout, float32) that some pieces of a delta make on its base; others count
    only as far as a chained form reads what they made. One module at a time."""
    modules = dict.fromkeys(s.name for piece in wanted for s in piece.sites.values())
    for module in modules:
        here = [(p, k, s) for p in delta.pieces for k, s in p.sites.items() if s.name == module]
        here.sort(key=lambda row: {"base": 0, "weight": 1}.get(row[0].form.at, 2))
        own: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        edited: dict[str, Tensor] = {}
        for piece, key, site in here:
            if isinstance(piece.form.dense, No):
                continue
            state = _state(piece, key, site, old, edited if piece.form.at == "weight" else own)
            change = piece.form.delta(state)
            if isinstance(change, No):
                raise LuthierError(f"piece '{piece.name}' at {site.name}: {change.reason}")
            for part, value in change.items():
                name = f"{module}.{site.parameter if part == 'weight' else part}"
                value = value.detach().float().cpu() * piece.scale
                if part == "weight" and piece.form.at != "base":
                    value = oriented(value, site)
                if name not in own:
                    own[name] = _value(old, name, value)
                own[name] = own[name] + value
                if piece.form.at == "base":
                    edited[name] = own[name]
                if any(piece is p for p in wanted):
                    found[name] = found[name] + value if name in found else value
        yield from found.items()


def _state(piece: Piece, key: str, site: Site, old: Target, made: Mapping[str, Tensor]) -> State:
    """A site's state over the old base, with what was `made` of it so far."""
    name = f"{site.name}.{site.parameter}"

    def weight() -> Tensor:
        if piece.form.at == "base":
            return old.tensor(key).detach().cpu()
        return oriented(made[name] if name in made else old.tensor(name).detach().float().cpu(), site)

    bias = made.get(f"{site.name}.bias", _bias(old, site))
    return State(site, piece.p[key], piece.fixed[key], weight, bias)


def _bias(on: Target, site: Site) -> Tensor | None:
    value = on.model.get_submodule(site.name)._parameters.get("bias")
    return None if value is None else value.detach().float().cpu()


def _value(on: Target, name: str, like: Tensor) -> Tensor:
    module, _, parameter = name.rpartition(".")
    value = on.model.get_submodule(module)._parameters.get(parameter)
    return torch.zeros_like(like) if value is None else value.detach().float().cpu()


def finite(delta: Delta) -> None:
    """Raises LuthierError for a number that is not one."""
    for piece in delta.pieces:
        for key, numbers in piece.p.items():
            for name, value in numbers.items():
                if value.is_floating_point() and not math.isfinite(float(value.float().abs().sum())):
                    raise LuthierError(
                        f"the delta's piece '{piece.name}', {key}: {name} holds NaN or infinity: train it again"
                    )
