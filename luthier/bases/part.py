"""One part of a model: the module (or single parameter) that plays one role."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Kind = Literal["linear", "conv1d", "embedding", "norm", "fused-experts", "other"]


@dataclass(frozen=True)
class Part:
    """A module with parameters of its own and the role it plays."""

    name: str
    """Path in memory: of the module ("model.layers.0.self_attn.q_proj"), or of the parameter where a module holds
    parameters of several roles ("model.layers.0.mlp.experts.down_proj")."""
    role: str
    layer: int | None
    """Number of the layer within its stack; None outside the layers."""
    stack: str | None
    """"encoder" or "decoder" in encoder–decoder models, else None."""
    kind: Kind
    """conv1d holds its weight as (d_in, d_out); fused-experts as (experts, d_out, d_in), or its transpose."""
    parameters: tuple[str, ...]
    """Full names in memory, weight first."""
    d_in: int
    """Rows of the table for an embedding; the normalised width for a norm."""
    d_out: int
    bias: bool
    expert: int | None = None
    """Number of the expert where every expert has modules of its own."""
    tied_with: tuple[str, ...] = ()
    """Names of the other parts that hold the same tensor."""
    experts: int = 0
    """Number of experts in a fused parameter."""
    transposed: bool = False
    """Whether the weight is held as (…, d_in, d_out)."""
    offset: bool = False
    """Whether it is a norm that multiplies by 1 + weight."""

    @property
    def module(self) -> str:
        """Path of the owning module: `name`, or its parent where the part is a single parameter."""
        return self.name.rpartition(".")[0] if self.name in self.parameters else self.name

    @property
    def leaf(self) -> str:
        """Last component of the name, as in PEFT's target_modules."""
        return self.name.rpartition(".")[2]


@dataclass
class Raw:
    """What inspection reads off a module before its role is known."""

    name: str
    module: nn.Module
    kind: Kind
    parameters: tuple[str, ...]
    d_in: int
    d_out: int
    bias: bool
    experts: int = 0
    transposed: bool = False
    offset: bool = False


def is_attached(name: str) -> bool:
    """Whether a parameter or buffer name belongs to an attached delta rather than to the base."""
    return "luthier" in name.split(".")[:-1]


def raw_parts(model: nn.Module) -> Iterator[Raw]:
    """Every module that owns parameters, in model order; parameters other than weight and bias one by one."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = {
            name: value
            for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
            if not is_attached(prefix + name)
        }
        if usual := tuple(n for n in ("weight", "bias") if n in own):
            kind, d_in, d_out, transposed = _shape(module, own[usual[0]].shape)
            names = tuple(prefix + n for n in usual)
            offset = kind == "norm" and adds_one(module)
            yield Raw(path, module, kind, names, d_in, d_out, "bias" in own, 0, transposed, offset)
        for name, value in own.items():
            if name in usual or (name.endswith("_bias") and name.removesuffix("_bias") in own):
                continue
            bias = f"{name}_bias"
            names = (prefix + name, *((prefix + bias,) if bias in own else ()))
            if value.dim() == 3:
                turned = bool(getattr(module, "is_transposed", False))
                d_out, d_in = value.shape[:0:-1] if turned else value.shape[1:]
                experts = value.shape[0]
                yield Raw(prefix + name, module, "fused-experts", names, d_in, d_out, bias in own, experts, turned)
            else:
                yield Raw(prefix + name, module, "other", names, value.shape[-1], value.shape[0], bias in own)


def _shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[Kind, int, int, bool]:
    """(kind, d_in, d_out, transposed) of a module with a weight; by what it has rather than by its class."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return "linear", int(module.in_features), int(module.out_features), False  # pyright: ignore[reportArgumentType]
    if type(module).__name__ == "Conv1D" and len(shape) == 2:
        return "conv1d", shape[0], shape[1], True
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim, False
    if len(shape) == 1 and "norm" in type(module).__name__.lower():
        return "norm", shape[0], shape[0], False
    return "other", shape[-1], shape[0], False


_OFFSET: dict[type[nn.Module], bool] = {}


def adds_one(norm: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight: with a weight of zeros it still gives something. Tried once for a class; one
    that takes more than its input and a gate is taken for a plain norm."""
    kind = type(norm)
    if kind not in _OFFSET:
        probe = copy.copy(norm)
        own = {n: None if p is None else nn.Parameter(torch.zeros(p.shape)) for n, p in norm._parameters.items()}
        probe._parameters = own
        x = torch.linspace(1, 2, len(norm.weight))[None]  # pyright: ignore[reportArgumentType]
        _OFFSET[kind] = False
        for given in ((x,), (x, x)):
            try:
                with torch.no_grad():
                    _OFFSET[kind] = bool(kind.forward(probe, *given).any())
                break
            except (AttributeError, RuntimeError, TypeError):
                continue
    return _OFFSET[kind]
