"""Where a form's numbers live on the model: beside the base's parameters, under names that a checkpoint never sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError

CHILD = "luthier"
"""Name of the child module that holds a site's numbers."""


class Numbers(nn.Module):
    """All pieces' numbers at one module. Wrappers (DDP, FSDP) find the parameters here; state dicts leave them out."""

    def piece(self, name: str) -> nn.Module:
        """The holder of one piece, made at first use."""
        key = key_of(name)
        if key not in self._modules:
            self.add_module(key, Numbers())
        return self._modules[key]  # pyright: ignore[reportReturnType]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def key_of(piece: str) -> str:
    """Module name of a piece's holder: a prefix keeps it apart from the attributes every module has ('train', 'half')."""
    return "d_" + piece.replace(".", "_")


def numbers_of(module: nn.Module) -> Numbers:
    """The module's holder, made at first use."""
    if CHILD not in module._modules:
        module.add_module(CHILD, Numbers())
    return module._modules[CHILD]  # pyright: ignore[reportReturnType]


class Live(Mapping[str, Tensor]):
    """The numbers as they are now: a wrapper may have replaced the parameter objects since they were attached."""

    def __init__(self, holder: nn.Module, trained: bool) -> None:
        self.holder = holder
        self.table = "_parameters" if trained else "_buffers"

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self.holder, self.table)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(self.holder, self.table))

    def __len__(self) -> int:
        return len(getattr(self.holder, self.table))


def put(
    holder: nn.Module,
    p: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    device: torch.device,
    train: bool,
    shared: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Registers trained numbers (float32) and constants on the device. shared: parameters of an earlier site that stand
    for the numbers of their names here too."""
    common = {k: shared[k] for k in p if shared and k in shared}
    for name, parameter in common.items():
        held, own = parameter.detach(), p[name].detach()
        if held.shape != own.shape or not torch.equal(held.to(own.device), own):
            raise LuthierError(f"'{name}' is one for all sites, and differs between them: state sites of one width")
    for name, value in p.items():
        parameter = common.get(name)
        if parameter is None:
            value = value.detach().to(device, copy=True)
            parameter = nn.Parameter(value, requires_grad=train and value.is_floating_point())
        holder.register_parameter(name, parameter)
    for name, value in fixed.items():
        holder.register_buffer(name, value.detach().to(device, copy=True), persistent=False)
