"""Base parameters that move in place: whole, or single entries. The originals are kept, and come back bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach.weights import gathered, module_at
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Piece
from luthier.errors import LuthierError
from luthier.parts.bits import encode


def assign(place: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, which may be sharded (each process then takes its own part)."""
    like: Any = place
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(like.device).to(like.dtype).contiguous()
        value = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    like.detach().copy_(value)


@dataclass
class Edit:
    """One parameter of the base that a piece moves.

    Whole (`index` None): the parameter itself trains. Entries: `values` [k] train; after every step they are written
    into the parameter, and each backward pass gathers their gradient and frees the rest, so that gradients,
    optimiser moments and checkpoints exist for k numbers only.
    """

    module: nn.Module
    name: str
    piece: str
    original: Tensor
    index: Tensor | None = None
    values: nn.Parameter | None = None
    redrawn: bool = False
    """Entries that moved were exchanged for others on the way: what moved is then read off the values."""
    hook: Any = field(default=None, repr=False)
    dtype: torch.dtype | None = None
    """The type the base holds it in, where it moves in a wider one."""

    @property
    def parameter(self) -> nn.Parameter:
        """The live parameter (a wrapper may have replaced the object)."""
        return self.module._parameters[self.name]  # pyright: ignore[reportReturnType]

    @property
    def trained(self) -> nn.Parameter:
        """What an optimiser is given."""
        return self.parameter if self.values is None else self.values

    def train(self, on: bool) -> None:
        """Starts or stops collecting gradients; stopping keeps the values reached."""
        self.parameter.requires_grad_(on)
        if self.values is None:
            if not on:
                self.parameter.grad = None
            return
        self.values.requires_grad_(on)
        if on and self.hook is None:
            self.hook = self.parameter.register_post_accumulate_grad_hook(self._gather)
        elif not on and self.hook is not None:
            self.hook.remove()
            self.hook, self.values.grad = None, None

    @torch.no_grad()
    def reindex(self, index: Tensor | None, back: bool = False) -> None:
        """Other entries train from now on, or the whole (None). What moved so far and does not go on keeps its values or,
        with `back`, returns to the base's."""
        if index is None:
            if self.hook is not None:
                self.hook.remove()
            self.index, self.values, self.redrawn, self.hook = None, None, False, None
            return
        index = index.to(self.parameter.device)
        if self.index is None or not torch.equal(index, self.index):
            self.index, self.redrawn = index, True
            self.values = nn.Parameter(self.parameter.detach().view(-1)[index].clone())
            if back:
                assign(self.parameter, self.original)
                self.write()

    @torch.no_grad()
    def hold_in(self, dtype: torch.dtype) -> None:
        """Holds the parameter and its original in this type from now on."""
        if self.parameter.dtype != dtype:
            self.dtype = self.dtype or self.parameter.dtype
            self.parameter.data, self.original = self.parameter.data.to(dtype), self.original.to(dtype)

    def _gather(self, parameter: Tensor) -> None:
        assert self.values is not None and self.index is not None and parameter.grad is not None
        grad = parameter.grad.flatten()[self.index].to(self.values.dtype)
        self.values.grad = grad if self.values.grad is None else self.values.grad + grad
        parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Entries: puts the values into the parameter, after an optimiser step."""
        if self.values is not None and self.index is not None:
            self.parameter.view(-1)[self.index] = self.values.to(self.parameter.dtype)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the parameter's values with the kept ones: base in, tuned kept, and the other way round."""
        kept = self.original
        self.original = gathered(self.parameter.detach()).clone().to(kept.device)
        assign(self.parameter, kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the base's values back for good: entries, too, are written as these from now on."""
        self.train(False)
        assign(self.parameter, self.original)
        if self.values is not None and self.index is not None:
            self.values.copy_(self.parameter.detach().view(-1)[self.index])
        if self.dtype is not None and not hasattr(self.parameter, "full_tensor"):
            self.parameter.data = self.parameter.data.to(self.dtype)


def begin(model: nn.Module, piece: str, full_name: str, index: Tensor | None, train_in: torch.dtype | None) -> Edit:
    """Starts moving the parameter called `full_name`; `index` are flat positions of its entries.

    With `train_in` the parameter is held in that type while it moves (float32 masters of a bfloat16 base).
    """
    path, _, name = full_name.rpartition(".")
    module = module_at(model, path)
    parameter = module._parameters.get(name)
    if parameter is None:
        raise LuthierError(f"the model has no parameter '{full_name}' to move")
    edit = Edit(module, name, piece, gathered(parameter.detach()).clone(), index)
    if train_in is not None:
        edit.hold_in(train_in)
    if index is not None:
        edit.index = index.to(parameter.device)
        edit.values = nn.Parameter(edit.original.view(-1)[edit.index].clone())
    return edit


def moved(name: str, table: Mapping[str, Edit], sites: Mapping[str, Site]) -> list[Piece]:
    """What a choice moved, as exact pieces: whole parameters, and entries under '<name>-entries' if there are both."""
    out: dict[str, Piece] = {}
    for key, edit in table.items():
        tuned, base = gathered(edit.parameter.detach()).cpu(), edit.original.cpu()
        dtype, kind = str(tuned.dtype)[6:], "dense" if edit.index is None else "entries"
        where = f"{kind}-{dtype}"
        if where not in out:
            out[where] = Piece(name if not out else f"{name}-{where}", FORMS.make(kind, {"dtype": dtype}), {}, {}, {})
        piece = out[where]
        site = sites[key]
        if edit.index is None:
            piece.p[key], piece.fixed[key] = {"bits": encode(tuned, base)}, {}
        else:
            index = torch.nonzero((tuned != base).flatten()).flatten() if edit.redrawn else edit.index.cpu()
            site = dataclasses.replace(site, entries=len(index))
            piece.p[key] = {"bits": encode(tuned.flatten()[index], base.flatten()[index])}
            piece.fixed[key] = {"index": index}
        piece.sites[key] = site
    return list(out.values())
