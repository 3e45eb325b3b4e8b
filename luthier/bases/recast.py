"""Recasts: a loaded base in, the same base physically smaller out, that gives the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.bases.roles import Roles
from luthier.errors import LuthierError
from luthier.parts.structure import Factored, compact, scaled_norm

RESIDUAL = ("llama", "mistral", "qwen2", "qwen3")
"""Families (model_type) whose residual stream passes through nothing but root-mean-square norms and linear maps."""
READS = ("attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up", "head")
WRITES = ("attn.o", "ffn.down")


def live_channels(model: nn.Module, roles: Roles) -> Tensor:
    """Numbers of the channels of the residual stream that anything writes to."""
    live = torch.zeros(roles.hidden, dtype=torch.bool)
    for part in roles.parts:
        weight = model.get_parameter(part.parameters[0]).detach()
        if part.role == "embed":
            live |= (weight != 0).any(0).cpu()
        elif part.role in WRITES:
            live |= (weight != 0).any(1).cpu()
            if part.bias:
                live |= (model.get_parameter(part.parameters[1]).detach() != 0).cpu()
    return live.nonzero()[:, 0]


@torch.no_grad()
def drop_channels(model: Any, roles: Roles, kept: Tensor) -> Any:
    """The model with only these channels of its residual stream, in place; `save_pretrained` writes an ordinary checkpoint.

    kept [n] ascending; nothing may write to the others (see `live_channels`). Norms are scaled and their eps is raised so
    that they give what they gave. Errors: other families; a channel that is still written to.
    """
    family = getattr(model.config, "model_type", "")
    if family not in RESIDUAL:
        raise LuthierError(
            f"channels can be dropped from {', '.join(RESIDUAL)}, this base is a {family}: keep it whole"
        )
    lost = set(live_channels(model, roles).tolist()) - set(kept.tolist())
    if lost:
        raise LuthierError(
            f"channel {min(lost)} is still written to ({len(lost)} such): fold a mask that closes it first"
        )
    width, tied = roles.hidden, model.config.tie_word_embeddings
    model.config.head_dim = roles.head_dim
    for part in roles.parts:
        module = model.get_submodule(part.module)
        weight = module.weight
        if part.role in ("embed", *READS):
            if part.role == "head" and tied:
                continue
            module.weight = nn.Parameter(weight[:, kept].contiguous(), requires_grad=False)
        elif part.role in WRITES:
            module.weight = nn.Parameter(weight[kept].contiguous(), requires_grad=False)
            if part.bias:
                module.bias = nn.Parameter(module.bias[kept].contiguous(), requires_grad=False)
        elif part.kind == "norm" and len(weight) == width:
            module.weight = nn.Parameter(scaled_norm(weight, kept), requires_grad=False)
            module.variance_epsilon = module.variance_epsilon * width / len(kept)
    for part in roles.parts:
        module = model.get_submodule(part.module)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.hidden_size = len(kept)
    model.config.rms_norm_eps = model.config.rms_norm_eps * width / len(kept)
    return model


def shrink(model: Any, roles: Roles) -> float:
    """Replaces every linear map of the layers that has zero rows or columns by a smaller one that gives the same; gives the
    share of their numbers that is left. In memory only: a plain checkpoint has no place for maps of uneven size."""
    whole = left = 0
    for part in roles.parts:
        module = model.get_submodule(part.module)
        if part.layer is None or not isinstance(module, nn.Linear):
            continue
        small = compact(module.weight.detach(), None if module.bias is None else module.bias.detach())
        whole, left = whole + module.weight.numel(), left + small.weight.numel()
        if small.weight.numel() < module.weight.numel():
            _replace(model, part.module, small)
    return left / max(1, whole)


def factor(model: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """Replaces linear maps by two thin ones each, name -> (A [r, in], B [out, r]); gives the numbers the model now has.

    In memory only: a plain checkpoint has no place for them."""
    for name, (a, b) in factors.items():
        old = model.get_submodule(name)
        like = old.weight
        bias = None if old.bias is None else old.bias.detach()
        _replace(model, name, Factored(a.to(like.device, like.dtype), b.to(like.device, like.dtype), bias))
    return sum(p.numel() for p in model.parameters())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module.eval())
