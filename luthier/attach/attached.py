"""The handle of a model with deltas on it: the only code that puts forms on a model, freezes, folds and detaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach import edits, extras
from luthier.attach.fold import FoldReport, exchanged, folded
from luthier.attach.numbers import CHILD, Live, key_of, numbers_of, put
from luthier.attach.point import Placed, Point
from luthier.attach.prompts import stack_of
from luthier.attach.weights import gathered, module_at, oriented, read_weight
from luthier.delta import FORMS, Context, Form, Site, State
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.parts.seeds import generator_of

HANDLE = "_luthier"


class Attached:
    """Deltas on one model. Get it with `attached(model)`; it lives as long as the model does."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ctx, self.enabled = model, Context(), True
        self.kept: frozenset[str] = frozenset()
        """Pieces that stay on while the handle is off."""
        self.rows: dict[str, Tensor] = {}
        """Piece -> numbers of the batch's rows that it works on; a piece that is not named works on all."""
        self.pieces: dict[str, Piece] = {}
        self.points: dict[str, Point] = {}
        self.placed: dict[str, list[Placed]] = {}
        self.edits: dict[str, dict[str, edits.Edit]] = {}
        self.extras: dict[str, Any] = {}
        self._flags = {n: q.requires_grad for n, q in model.named_parameters()}
        self._folded: dict[str, tuple[nn.Module, str, Tensor]] | None = None
        # At the inner stack, so that forward passes that skip the head are seen too.
        self._hook = (stack_of(model) or model).register_forward_pre_hook(self._see, with_kwargs=True)
        for q in model.parameters():
            q.requires_grad_(False)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.ctx.training, self.ctx.mask = module.training, kwargs.get("attention_mask")
        self.ctx.aux.clear()

    # -- putting on

    def build(self, name: str, form: Form, sites: Iterable[Site], seed: int = 0) -> Piece:
        """A fresh piece: its numbers are drawn per site, from `seed` and the site's name alone, then started."""
        p, fixed, table = {}, {}, {}
        sites = list(sites)
        try:
            form.check(sites)
        except ValueError as e:
            raise LuthierError(f"piece '{name}', form '{FORMS.name_of(type(form))}': {e}") from e
        for site in sites:
            if site.kind not in form.kinds:
                raise LuthierError(
                    f"form '{FORMS.name_of(type(form))}' cannot go on {site.name} ({site.kind}); it goes on {', '.join(form.kinds)}"
                )
            module = module_at(self.model, site.name)
            g = generator_of(seed, name, site.name)
            own = form.at == "base" or site.kind == "fused-experts"  # several such sites share one module
            key = f"{site.name}.{site.parameter}" if own else site.name
            p0, f0 = form.build(site, g)
            weight = lambda m=module, s=site: read_weight(m, s).float()  # noqa: E731
            bias = getattr(module, "bias", None)
            p1, f1 = form.start(State(site, p0, f0, weight, bias if isinstance(bias, Tensor) else None, self.ctx))
            p[key], fixed[key], table[key] = dict(p1), dict(f1), site
        if not table:
            raise LuthierError(f"piece '{name}' has no site: nothing would be trained; state other sites")
        first = p[next(iter(table))]
        for numbers in p.values():
            numbers.update({k: first[k].clone() for k in form.shared if numbers[k].shape == first[k].shape})
        return Piece(name, form, table, p, fixed)

    def add(self, piece: Piece, *, train: bool = False) -> None:
        """Attaches a piece: its numbers go to each site's device, its hooks on the modules."""
        if self._folded is not None:
            raise LuthierError("this model is folded: unfold it before attaching more")
        if piece.name in self.pieces:
            raise LuthierError(f"a piece called '{piece.name}' is already on this model: name the new one otherwise")
        for site in piece.sites.values():
            module_at(self.model, site.name)  # all there, or nothing is attached
        self.pieces[piece.name] = piece
        self.placed[piece.name] = []
        try:
            if piece.form.at == "base":
                self._edit(piece)
            else:
                self._place(piece, train)
        except Exception:
            self.detach(piece.name)
            raise

    def _place(self, piece: Piece, train: bool) -> None:
        shared: dict[str, nn.Parameter] = {}
        for key, site in piece.sites.items():
            module = module_at(self.model, site.name)
            weight = getattr(module, site.parameter, None)
            anchor = weight if isinstance(weight, Tensor) else next(self.model.parameters())
            _check_shapes(piece, key, anchor, weight)
            holder = numbers_of(module).piece(_holder(piece.name, site))
            put(holder, piece.p[key], piece.fixed[key], anchor.device, train, shared)
            shared |= {k: holder.get_parameter(k) for k in piece.form.shared if not shared}

            def read(m: nn.Module = module, s: Site = site) -> Tensor:
                return oriented(getattr(m, s.parameter).detach(), s)

            bias = getattr(module, "bias", None)
            state = State(
                site,
                Live(holder, True),
                Live(holder, False),
                read,
                bias if isinstance(bias, Tensor) else None,
                self.ctx,
            )
            placed = Placed(piece.name, piece.form, state, piece.scale)
            self.placed[piece.name].append(placed)
            if piece.form.at in extras.PLACES:
                extras.PLACES[piece.form.at](self, placed)
            else:
                if site.name not in self.points:
                    self.points[site.name] = Point(module, self)
                self.points[site.name].add(placed)

    def _edit(self, piece: Piece) -> None:
        table = self.edits.setdefault(piece.name, {})
        others = {key for name, t in self.edits.items() if name != piece.name for key in t}
        for key, site in piece.sites.items():
            held = read_weight(module_at(self.model, site.name), site).dtype
            dtype = getattr(torch, piece.form.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            if torch.promote_types(held, dtype) not in (dtype, held):  # one must convert to the other exactly
                raise LuthierError(
                    f"piece '{piece.name}' holds exact differences in {piece.form.dtype}, but the base is held in "  # pyright: ignore
                    f"{str(held)[6:]}: load the base with dtype: {piece.form.dtype}"  # pyright: ignore
                )
            edit = edits.begin(self.model, piece.name, key, None, None)
            base = edit.original
            if key in others:  # a second delta of the same base adds to the first one's result
                base = next(t[key].original for n, t in self.edits.items() if n != piece.name and key in t)
            state = State(site, piece.p[key], piece.fixed[key], lambda b=base: b)
            tuned = piece.form.edit(base, state)  # pyright: ignore[reportAttributeAccessIssue]
            with torch.no_grad():
                if piece.scale != 1 or key in others:
                    tuned = edit.parameter.float() + piece.scale * (tuned.float() - base.float())
                edit.parameter.copy_(tuned)
            table[key] = edit

    # -- base parameters that train

    def move(
        self,
        piece: str,
        selection: Mapping[str, Tensor | None],
        dtype: torch.dtype | None = torch.float32,
        back: bool = False,
    ) -> list[edits.Edit]:
        """Lets base parameters train in place: parameter name -> flat entries, or None for the whole.

        A parameter already moved by this piece goes on from where it stands; with `back`, entries of it that are not of
        the selection return to the base. Gives the edits of the selection.
        """
        table = self.edits.setdefault(piece, {})
        for other, taken in self.edits.items():
            if other != piece and (both := set(taken) & set(selection)):
                raise LuthierError(
                    f"'{piece}' and '{other}' would both move {sorted(both)[0]}: give them different sites"
                )
        for name, index in selection.items():
            if name not in table:
                table[name] = edits.begin(self.model, piece, name, index, dtype)
            else:
                if dtype is not None:
                    table[name].hold_in(dtype)
                if index is not None or table[name].values is not None:
                    table[name].reindex(index, back)
                    numbers_of(table[name].module).piece(piece)._parameters.pop(f"{table[name].name}_values", None)
            if table[name].values is not None:
                holder = numbers_of(table[name].module).piece(piece)
                holder._parameters[f"{table[name].name}_values"] = table[name].values
            table[name].train(True)
        return [table[name] for name in selection]

    def adopt(self, piece: str, found: Iterable[Piece]) -> None:
        """Lets exact pieces of an earlier delta go on as `piece`: their values are where its training starts."""
        table: dict[str, edits.Edit] = {}
        for old in found:
            old.name = f"{piece}-start"
            self.add(old)
            del self.pieces[old.name], self.placed[old.name]
            table |= self.edits.pop(old.name)
        for edit in table.values():
            edit.piece = piece
        self.edits[piece] = table

    def after_step(self) -> None:
        """To be called after every optimiser step: entries that moved are written into their parameters."""
        for table in self.edits.values():
            for edit in table.values():
                edit.write()

    # -- switching, folding, taking off

    def on(self, piece: str) -> bool:
        """Whether a piece works in a forward pass now."""
        return self.enabled or piece in self.kept

    @contextmanager
    def off(self, keep: Collection[str] = ()) -> Iterator[nn.Module]:
        """The base itself, in place: hooks silent, moved parameters at the base's values; afterwards all is as it was.

        The pieces named in `keep` stay on: the base as a run on top of them met it.
        """
        if keep and self._folded is not None:
            raise LuthierError(f"this model is folded: unfold it to switch off all but {', '.join(sorted(keep))}")
        was, held, self.enabled = self.enabled, self.kept, False
        self.kept = frozenset(keep) if was else held & frozenset(keep)
        shown, (written, self._folded) = was or self._folded is not None, (self._folded, None)
        tuned = exchanged(written or {})
        moved = [e for name, t in self.edits.items() if name not in keep for e in t.values()] if shown else []
        for edit in reversed(moved):
            edit.swap()
        torch.clear_autocast_cache()  # else a surrounding autocast goes on with casts of the values that stood there
        try:
            yield self.model
        finally:
            for edit in moved:
                edit.swap()
            exchanged(tuned)
            torch.clear_autocast_cache()
            self.enabled, self.kept, self._folded = was, held, written

    @contextmanager
    def routed(self, rows: Mapping[str, Sequence[int]]) -> Iterator[nn.Module]:
        """Many tuned models in one batch: a piece works on its rows only, and the base's own products are made once.

        rows: piece -> numbers of rows (records of the batch); pieces not named work on all. Refused where a piece is
        not added to a module's output row by row: one that edits or replaces weights, adds keys or inputs, or sits on
        experts.
        """
        for name in rows:
            if name not in self.placed or name in self.edits:
                raise LuthierError(
                    f"piece '{name}' cannot be routed: it edits the base in place, or is not on this model"
                )
            for q in self.placed[name]:
                placed = q.form.at in ("weight", "output", "hidden") and not q.form.changes_weight
                if (
                    not placed
                    or q.state.site.role.startswith("expert")
                    or q.state.site.kind in ("norm", "fused-experts")
                ):
                    raise LuthierError(
                        f"piece '{name}' cannot be routed: at {q.state.site.name} it does not act row by row"
                    )
        device = next(self.model.parameters()).device
        was, self.rows = self.rows, {k: torch.as_tensor(v, device=device).long() for k, v in rows.items()}
        try:
            yield self.model
        finally:
            self.rows = was

    def fold(self) -> FoldReport:
        """Writes every change into the base's weights (in float32, then rounded to their type) and silences the hooks.

        Refused where a form has no weight change, or a bias is needed that the module lacks. `unfold` undoes it exactly.
        """
        if self._folded is not None:
            raise LuthierError("this model is folded: unfold it before folding it again")
        self._folded, report = folded(self.model, self.pieces.values(), self.points.values())
        self.enabled = False
        return report

    def unfold(self) -> None:
        """Puts back what `fold` replaced, bit for bit, and switches the hooks on again."""
        exchanged(self._folded or {})
        self._folded, self.enabled = None, True

    def detach(self, piece: str | None = None) -> None:
        """Takes one piece off, or all: the base is then bit for bit what it was, its names and flags too. Exact pieces that
        stand above it on the same parameters stay, as if it had never been there."""
        if self._folded is not None:
            self.unfold()
        for name in [piece] if piece else list(reversed({**self.pieces, **self.edits})):
            if name not in self.pieces and name not in self.edits:
                raise LuthierError(f"no piece called '{name}' is on this model; there are: {', '.join(self.pieces)}")
            above = self._above(name)
            for lifted in [*reversed(above), name]:
                for edit in reversed(self.edits.pop(lifted, {}).values()):
                    edit.restore()
            for lifted in above:
                self._edit(self.pieces[lifted])
            for point in self.points.values():
                point.drop(name)
            extras.remove(self, name)
            self.pieces.pop(name, None)
            for placed in self.placed.pop(name, []):
                module = module_at(self.model, placed.state.site.name)
                numbers_of(module)._modules.pop(key_of(_holder(name, placed.state.site)), None)
        if not self.pieces and not self.edits:
            for point in self.points.values():
                point.remove()
            for module in self.model.modules():
                module._modules.pop(CHILD, None)
            self._hook.remove()
            for n, q in self.model.named_parameters():
                q.requires_grad_(self._flags.get(n, q.requires_grad))  # an untied head is new here
            self.model.__dict__.pop(HANDLE, None)

    def _above(self, piece: str) -> list[str]:
        """Exact pieces that were put on after this one, on its result or on that of one of these; in their order."""
        names, found = list(self.edits), []
        held = set(self.edits.get(piece, ()))
        for name in names[names.index(piece) + 1 :] if held else ():
            if name in self.pieces and held & self.edits[name].keys():
                found.append(name)
                held |= self.edits[name].keys()
        return found

    # -- reading

    def trained(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Piece -> (name, parameter) of all that collects gradients now."""
        out: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, placed in self.placed.items():
            for n, q in enumerate(placed):
                own = [(k, v) for k, v in q.state.p.items() if v.requires_grad and not (n and k in q.form.shared)]
                rows = [(f"{name}/{q.state.site.name}/{k}", v) for k, v in own]
                out.setdefault(name, []).extend(rows)  # pyright: ignore[reportArgumentType]
        for name, table in self.edits.items():
            rows = [(f"{name}/{key}", e.trained) for key, e in table.items() if e.trained.requires_grad]
            out.setdefault(name, []).extend(rows)
        return {name: rows for name, rows in out.items() if rows}

    def penalty(self) -> Tensor | float:
        """Sum of all forms' own regularisers and of the auxiliary losses noted in this forward pass."""
        own = [
            q.form.penalty(q.state) for t in self.placed.values() for q in t if type(q.form).penalty is not Form.penalty
        ]
        first = [t[0] for t in self.placed.values() if t]
        common = [q.form.penalty_shared(q.state) for q in first if q.form.shared]
        return sum([*own, *common, *self.ctx.aux], 0.0)

    @torch.no_grad()
    def delta(self, sites: Mapping[str, Site] | None = None) -> Delta:
        """A copy of everything attached, on the CPU; `sites` describes moved parameters by name."""
        pieces = []
        for name, piece in self.pieces.items():
            if name in self.edits:
                pieces.append(piece)
                continue
            p, fixed = {}, {}
            for key, q in zip(piece.sites, self.placed[name], strict=True):
                p[key] = {k: gathered(v.detach()).cpu().clone() for k, v in q.state.p.items()}
                fixed[key] = {k: gathered(v.detach()).cpu().clone() for k, v in q.state.fixed.items()}
            pieces.append(dataclasses.replace(piece, p=p, fixed=fixed))
        for name, table in self.edits.items():
            if name not in self.pieces:
                pieces += edits.moved(name, table, sites or {})
        return Delta(pieces)


@dataclasses.dataclass(frozen=True)
class Above:
    """Switches off what stands above some pieces of a model and leaves those on: the base as a run on top of them met it."""

    handle: Attached
    kept: frozenset[str]

    def off(self) -> AbstractContextManager[nn.Module]:
        """The base with the kept pieces alone."""
        return self.handle.off(keep=self.kept)


def _check_shapes(piece: Piece, key: str, anchor: Tensor, weight: Any) -> None:
    site = piece.sites[key]
    if isinstance(weight, Tensor) and weight.dim() == 2:
        d_out, d_in = oriented(weight, site).shape if not hasattr(weight, "full_tensor") else (site.d_out, site.d_in)
        if (d_out, d_in) != (site.d_out, site.d_in):
            raise LuthierError(
                f"piece '{piece.name}' was made for {site.name} of {site.d_out}×{site.d_in}, this model's is {d_out}×{d_in}: another base"
            )


def _holder(piece: str, site: Site) -> str:
    return f"{piece}-{site.parameter}" if site.kind == "fused-experts" else piece


def attached(model: nn.Module) -> Attached:
    """The handle of a model, made at first use; making it freezes the base."""
    if HANDLE not in model.__dict__:
        model.__dict__[HANDLE] = Attached(model)
    return model.__dict__[HANDLE]
