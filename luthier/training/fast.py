"""A base's blocks made faster without changing what they compute. Each replacement is tried against the original first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.bases.roles import Roles
from luthier.parts.attention import BLOCKED, blocked
from luthier.parts.fused import rms_norm, swiglu
from luthier.training.view import HeadSelector

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest relative difference on a random input at which a replacement counts as the same."""

MARK = "_luthier_fused"
"""Attribute of a forward function put in place here."""


def speed_up(model: nn.Module) -> dict[str, int]:
    """Fuses RMS norms and SwiGLU feed-forwards where that gives the module's own numbers, and has causal attention of short rows
    on a processor worked out block by block (`parts.attention`). Gives how many norms, feed-forwards and configurations.

    Only the forward functions of module instances and the name of the attention function are replaced: no parameter or hook
    changes, and a module of another kind or with another formula stays as it is. `slow_down` takes it back: a model handed on
    must not keep them, since a copy of it would go on computing with the original's weights.
    """
    done = {"norms": 0, "feed_forwards": 0, "attention": _rename_attention(model, "sdpa", blocked())}
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        weight = module._parameters.get("weight")
        if isinstance(eps, float) and weight is not None and weight.dim() == 1 and "RMSNorm" in type(module).__name__:
            done["norms"] += _replace(module, _norm(module, eps), weight.shape[0])
        if all(
            isinstance(getattr(module, n, None), nn.Linear) for n in ("gate_proj", "up_proj", "down_proj")
        ) and hasattr(module, "act_fn"):
            done["feed_forwards"] += _replace(module, _feed_forward(module), module.gate_proj.in_features)  # pyright: ignore
    return done


def slow_down(model: nn.Module) -> int:
    """Takes `speed_up` back; gives how many modules and configurations are as they were again. A no-op where there are none."""
    mine = [m for m in model.modules() if hasattr(m.__dict__.get("forward"), MARK)]
    for module in mine:
        del module.__dict__["forward"]
    return len(mine) + _rename_attention(model, BLOCKED, "sdpa")


def _rename_attention(model: nn.Module, old: str, new: str) -> int:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    found: list[Any] = [c for c in configs.values() if getattr(c, "_attn_implementation", None) == old]
    for config in found:
        config._attn_implementation = new
    return len(found)


def _norm(module: nn.Module, eps: float) -> Callable[..., Tensor]:
    own = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != module.weight.dtype:  # a gain that trains in float32 on bfloat16 activations
            return own(hidden_states)
        return rms_norm(hidden_states, module.weight, eps)  # pyright: ignore[reportArgumentType]

    return forward


def _feed_forward(module: Any) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))

    return forward


@torch.no_grad()
def _replace(module: nn.Module, forward: Callable[..., Tensor], width: int) -> bool:
    parameter = next(module.parameters())
    if parameter.is_meta or "forward" in module.__dict__:
        return False
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, width, generator=g).to(parameter.device, parameter.dtype)
    own = module.forward(x)
    if float((forward(x) - own).norm()) > CLOSE.get(parameter.dtype, 0.0) * float(own.norm()):
        return False
    setattr(forward, MARK, True)
    module.__dict__["forward"] = forward
    return True


class Pruner:
    """Skips position-wise work of the last layer where no loss looks: its feed-forward and its output projection.

    Nothing after them mixes positions, so the supervised positions' numbers and all gradients stay what they were.
    `remove` takes the hooks off again.
    """

    def __init__(self, roles: Roles, model: nn.Module, selector: HeadSelector) -> None:
        self.selector = selector
        self.hooks: list[Any] = []
        for name in _last_position_wise(roles):
            module = model.get_submodule(name)
            self.hooks.append(module.register_forward_pre_hook(self._select, prepend=True))
            self.hooks.append(module.register_forward_hook(self._scatter))
        self.shape: torch.Size | None = None

    def remove(self) -> None:
        """Takes the hooks off; the model then computes every position again."""
        while self.hooks:
            self.hooks.pop().remove()

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # A second input (BLOOM hands its feed-forward the residual) would stay whole: such a module is left alone.
        index, x = self.selector.index, args[0] if len(args) == 1 else None
        if index is None or x is None or x.dim() != 3 or self.selector.full_length != x.shape[0] * x.shape[1]:
            self.shape = None
            return None
        self.shape = x.shape
        return (x.reshape(-1, x.shape[-1])[index].unsqueeze(0), *args[1:])

    def _scatter(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
        if self.shape is None or self.selector.index is None:
            return None
        whole = out.new_zeros(self.shape[0] * self.shape[1], out.shape[-1])
        whole = whole.index_put((self.selector.index,), out[0])
        return whole.view(self.shape[0], self.shape[1], -1)


def _last_position_wise(roles: Roles) -> list[str]:
    """Modules of the last layer that work on each position alone: attn.o and the dense feed-forward as a whole."""
    last = roles.layer_count - 1
    here = [p for p in roles.parts if p.layer == last]
    if any(p.role.startswith(("router", "expert", "cross")) or p.stack for p in here):
        return []
    ffn = [p.module.rpartition(".")[0] for p in here if p.role.startswith("ffn.") and p.kind == "linear"]
    layer = roles.layers[-1]
    parents = {name for name in ffn if name != layer and name.startswith(layer)}
    output = [p.module for p in here if p.role == "attn.o" and p.kind in ("linear", "conv1d")]
    return [*output, *(parents if len(parents) == 1 else ())]
