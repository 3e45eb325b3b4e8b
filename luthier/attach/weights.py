"""A site's module and weight on a model: found by name, read and written as [d_out, d_in] however it is stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from luthier.delta import Site
from luthier.errors import LuthierError, nearest

TRANSPOSED = ("conv1d", "embedding")
"""Kinds of site whose parameter is stored as [d_in, d_out]."""


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module called `name` ('' is the model); an unknown name is an error with the nearest one."""
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        known = [n for n, _ in model.named_modules() if n.count(".") == name.count(".")]
        raise LuthierError(f"the model has no module '{name}': {nearest(name, known[:40], 'module')}") from e


def oriented(tensor: Tensor, site: Site) -> Tensor:
    """Between the stored layout and [d_out, d_in]; its own inverse."""
    return tensor.t() if site.kind in TRANSPOSED and tensor.dim() == 2 else tensor


def read_weight(module: nn.Module, site: Site) -> Tensor:
    """The weight now in the module, [d_out, d_in], as a view; a sharded one is gathered."""
    weight = getattr(module, site.parameter)
    return oriented(gathered(weight.detach()), site)


def gathered(tensor: Tensor) -> Tensor:
    """A plain tensor from one that FSDP shards; every process must call this."""
    full: Any = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor
