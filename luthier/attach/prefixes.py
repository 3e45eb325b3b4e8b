"""Extra keys and values in attention, by a registered attention function: exact also when activations are recomputed.

The extra ones never enter a cache; they are put before the cached keys at every call. Every query sees all of them:
with padding, in packed rows, and beyond a sliding window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.attach.weights import module_at
from luthier.errors import LuthierError
from luthier.parts.attention import BLOCKED

OURS = "luthier_"
"""Before the name of the attention implementation that ours wraps."""
HELD = "_luthier_prefixes"
WRAPPED = ("sdpa", "eager")
TABLES = ("wpe", "position_embeddings", "embed_positions")
"""Names of learned position tables."""


def place(handle: Any, placed: Any) -> None:
    """Gives one attention module extra keys and values."""
    site = placed.state.site
    module = module_at(handle.model, site.name)
    config: Any = getattr(module, "config", None)
    used = str(getattr(config, "_attn_implementation", None)).replace(BLOCKED, "sdpa")  # which takes no extra keys
    bias = _bias_of(handle.model, module)
    known = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    if not known or (getattr(config, "is_encoder_decoder", False) and bias is None):
        raise LuthierError(
            f"piece '{placed.piece}': {type(module).__name__} does not take registered attention functions, so it can "
            "have no extra keys and values: use another form on this base"
        )
    if used.removeprefix(OURS) not in WRAPPED:
        raise LuthierError(
            f"piece '{placed.piece}': extra keys and values need attention sdpa or eager, the base runs {used}: "
            "state base: {attention: sdpa}"
        )
    _register()
    if not used.startswith(OURS):
        config._attn_implementation = OURS + used
    held = module.__dict__.setdefault(HELD, [])
    shifted = getattr(placed.form, "shift_positions", False)
    entry = (handle, placed, bias if shifted else None)
    held.append(entry)
    hooks = _shift(handle, placed) if shifted and bias is None else []

    def undo() -> None:
        module.__dict__[HELD] = [e for e in module.__dict__[HELD] if e is not entry]
        for hook in hooks:
            hook.remove()
        if not any(m.__dict__.get(HELD) for m in handle.model.modules() if getattr(m, "config", None) is config):
            config._attn_implementation = config._attn_implementation.removeprefix(OURS)

    handle.extras.setdefault(placed.piece, []).append(undo)


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if OURS + "sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return
    for name in WRAPPED:
        AttentionInterface.register(OURS + name, _wrapped(name))
        AttentionMaskInterface.register(OURS + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _wrapped(name: str) -> Callable[..., Any]:
    """The attention function `name`, with the module's extra keys and values before the others."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Eager attention is the model file's own function; the registry holds the others.
        if name == "eager":
            inner = sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore
        else:
            inner = ALL_ATTENTION_FUNCTIONS[name]
        held = [(q.form.extra(q.state), bias) for h, q, bias in module.__dict__.get(HELD, ()) if h.on(q.piece)]
        if held:
            batch, seen = key.shape[0], key.shape[2]
            more = [
                torch.cat(part, 1)[None].to(key).expand(batch, -1, -1, -1)
                for part in zip(*(pair for pair, _ in held), strict=True)
            ]
            if (bias := kwargs.get("position_bias")) is not None:
                own = [_biases(source, k.shape[1], bias, seen) for (k, _), source in held]
                kwargs["position_bias"] = torch.cat([*own, bias], -1)
            key, value = torch.cat([more[0], key], 2), torch.cat([more[1], value], 2)
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            attention_mask = _widened(
                attention_mask, more[0].shape[2], query.shape[2], seen, name == "sdpa" and causal, key
            )
        return inner(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _bias_of(model: nn.Module, module: nn.Module) -> Any:
    """The attention module that computes the relative position bias which `module` adds to its scores (T5's first layer
    computes it for the others of its stack); None where there is none."""
    found = None
    for other in model.modules():
        if getattr(other, "has_relative_attention_bias", False) and hasattr(other, "compute_bias"):
            found = other
        if other is module:
            return found if hasattr(module, "compute_bias") else None
    return None


def _biases(source: Any, extra: int, bias: Tensor, seen: int) -> Tensor:
    """Position bias [1, H, queries, extra] of extra keys: as if they stood right before the text, or none."""
    queries = bias.shape[2]
    if source is None:
        return bias.new_zeros((*bias.shape[:3], extra))
    return source.compute_bias(queries, extra, bias.device, past_seen_tokens=extra + seen - queries).to(bias)


def _widened(mask: Tensor | None, extra: int, queries: int, keys: int, causal: bool, like: Tensor) -> Tensor | None:
    """The mask [B or 1, H or 1, queries, extra + keys] that leaves the extra keys open to every query."""
    if mask is None:
        if not causal or queries == 1:
            return None
        open_ = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
        mask = open_[None, None]
    free = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([free((*mask.shape[:-1], extra)), mask[..., :keys]], -1)


def _shift(handle: Any, placed: Any) -> list[Any]:
    """Moves all positions on by the prefix's length, once per piece: hooks on what reads positions."""
    if handle.extras.get(placed.piece):
        return []
    length = placed.form.length

    def moved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not handle.on(placed.piece):
            return None
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": kwargs["position_ids"] + length}
        at = 0 if isinstance(module, nn.Embedding) else 1
        return (*args[:at], args[at] + length, *args[at + 1 :]), kwargs

    readers = [
        m for n, m in handle.model.named_modules()
        if type(m).__name__.endswith("RotaryEmbedding") or n.rpartition(".")[2] in TABLES
    ]  # fmt: skip
    if not readers:
        raise LuthierError(
            f"piece '{placed.piece}': where this base reads positions is not known: state shift_positions: false"
        )
    return [m.register_forward_pre_hook(moved, with_kwargs=True) for m in readers]
