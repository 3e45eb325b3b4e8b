"""A second device where there is none: tensors whose numbers lie on the CPU, and that no operation takes together with the
CPU's own. What mixes the two is an error here as it is on a GPU; all else gives the CPU's numbers.

    with Elsewhere():
        model = bring(tiny("llama"))
        model(input_ids=ids.to(THERE))
"""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")
"""What the second device is called: the one type beside the CPU that every build of torch can differentiate on."""
aten = torch.ops.aten
COPIES = (aten.copy_, aten.copy)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
"""Operations that take places on the CPU for numbers on a device."""
M = TypeVar("M", bound=nn.Module)


class There(Tensor):
    """A tensor on the second device."""

    inner: Tensor
    is_meta = False  # pyright: ignore

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        place = (inner.shape, inner.stride(), inner.storage_offset())
        out = torch.Tensor._make_wrapper_subclass(cls, *place, dtype=inner.dtype, device=THERE)  # pyright: ignore
        out.inner = inner
        return out

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _worked(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """What a dispatcher does not see: that `torch.tensor` makes a tensor elsewhere, and `tolist`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.tolist and isinstance(args[0], There):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """Within it tensors can be made on the second device, and brought there."""

    def __enter__(self) -> Any:
        self.made = _Made()
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *told: Any) -> None:
        super().__exit__(*told)
        self.made.__exit__(*told)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _worked(func, args, kwargs or {})


def _worked(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, kind = tree_leaves((args, kwargs)), func.overloadpacket
    there = [t for t in leaves if isinstance(t, There)]
    here = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, There)]
    stated = kwargs.get("device")
    goes = bool(there) if stated is None else torch.device(stated).type == THERE.type
    if kind in COPIES:
        goes = isinstance(args[0], There)
    free = kind in (aten._to_copy, *COPIES) or (kind in INDEXED and isinstance(args[0], There))
    if there and not free and any(t.dim() for t in here):
        raise RuntimeError(f"{func} takes tensors of two devices: {_shapes(there)} there, {_shapes(here)} on the CPU")
    if goes and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{func} draws on a device with a generator of the CPU")
    known = {id(t.inner): t for t in there}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
    out = func(*args, **(kwargs if stated is None else {**kwargs, "device": torch.device("cpu")}))

    def brought(value: Any) -> Any:
        return known[id(value)] if id(value) in known else There(value) if goes and isinstance(value, Tensor) else value

    return tree_map(brought, out)


def _shapes(tensors: list[Any]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def bring(model: M) -> M:
    """The model with its parameters and buffers on the second device; ties stay ties."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and id(old) not in made:
                    new = There(old.detach().clone())
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    table[name] = made[id(old)]
    return model


def run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has whole runs be made on the second device: bases are brought there as they are loaded, batches as they are used."""
    from torch.nn.utils import clip_grad
    from torch.optim import optimizer

    from luthier.bases import load
    from luthier.training.machine import Machine

    made = load.Base

    def brought(*args: Any, **kwargs: Any) -> Any:
        base = made(*args, **kwargs)
        bring(base.model)
        return base

    monkeypatch.setattr(load, "Base", brought)
    monkeypatch.setattr(Machine, "device", property(lambda self: THERE))
    # torch lists the devices whose joint kernels it knows.
    monkeypatch.setattr(clip_grad, "_device_has_foreach_support", lambda device: True)
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", THERE.type])
