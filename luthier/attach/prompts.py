"""Extra embeddings before the first token. The model's outputs keep the length of its inputs; of an encoder-decoder the
encoder reads them, its own states keep the extra positions, and every layer of the decoder sees those.

Hooks on the module that embeds the tokens and runs the layers: it is handed embeddings, mask and positions extended
at the left, and its hidden states are cut back, so that logits, labels and heads meet the original tokens. With a cache
the prompt goes in once, at the first call; mask and positions are extended at every call.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError

HELD = "_luthier_prompts"
MARK = "_luthier_prompt"
"""On a cache: how many extra positions it holds."""


class Prompts:
    """All prompts of one model, in the order attached; one pair of hooks."""

    def __init__(self, module: nn.Module, handle: Any) -> None:
        self.module, self.handle, self.cut = module, handle, 0
        self.decoder: Any = handle.model.get_decoder() if _pair(handle.model) else None
        self.placed: list[Any] = []
        self.names = list(inspect.signature(module.forward).parameters)
        self.hooks = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]
        if self.decoder is not None:
            self.hooks.append(self.decoder.register_forward_pre_hook(self.across, with_kwargs=True))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Extends what goes in."""
        self.cut = 0
        placed = [q for q in self.placed if self.handle.on(q.piece)]
        if not placed:
            return None
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        self._refuse_packing(kwargs)
        ids, embeds, cache = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        embeds = module.get_input_embeddings()(ids) if embeds is None else embeds  # pyright: ignore
        prompt = torch.cat([q.form.extra(q.state) for q in placed]).to(embeds)
        batch, n = embeds.shape[0], prompt.shape[0]
        begun = cache is not None and cache.get_seq_length() > 0
        if begun and getattr(cache, MARK, None) != n:
            raise LuthierError("the cache was filled without this soft prompt: start from an empty cache")
        if not begun:
            self.cut = n
            embeds = torch.cat([prompt.expand(batch, -1, -1), embeds], 1)
        kwargs |= {"input_ids": None, "inputs_embeds": embeds}
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], 1)
        if (at := kwargs.get("position_ids")) is not None:
            first = torch.arange(n, device=at.device, dtype=at.dtype).expand(at.shape[0], -1)
            kwargs["position_ids"] = at + n if begun else torch.cat([first, at + n], 1)
        if (kind := kwargs.get("token_type_ids")) is not None and not begun:
            kwargs["token_type_ids"] = torch.cat([kind.new_zeros(batch, n), kind], 1)
        return (), kwargs

    def _refuse_packing(self, kwargs: dict[str, Any]) -> None:
        mask, at = kwargs.get("attention_mask"), kwargs.get("position_ids")
        packed = self.handle.ctx.segments is not None or (
            mask is not None and (isinstance(mask, dict) or mask.dim() != 2)
        )
        restarts = mask is None and at is not None and bool((at.diff(dim=-1) != 1).any())
        if packed or restarts:
            raise LuthierError(
                f"piece '{self.placed[0].piece}': a soft prompt stands before the row's first token, so rows of several "
                "records have no place for it: state data: {packing: false}"
            )

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Cuts the extra positions off what comes out, and marks the cache."""
        if not self.cut or self.decoder is not None:
            return None
        n, self.cut = self.cut, 0
        if isinstance(out, tuple):
            return (out[0][:, n:], *out[1:])
        if (cache := out.get("past_key_values")) is not None:
            setattr(cache, MARK, n)
        out["last_hidden_state"] = out["last_hidden_state"][:, n:]
        if (states := out.get("hidden_states")) is not None:
            out["hidden_states"] = tuple(h[:, n:] for h in states)
        return out

    def across(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Opens the prompt's positions of the encoder's states, [B, n + T, hidden], to the decoder: its mask is [B, T]."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is None or states is None or not (n := states.shape[1] - mask.shape[1]):
            return None
        return args, kwargs | {"encoder_attention_mask": torch.cat([mask.new_ones(len(mask), n), mask], 1)}


def _pair(model: Any) -> bool:
    """Whether a model is an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stack_of(model: nn.Module) -> nn.Module | None:
    """The module that embeds tokens and runs the layers: the innermost one that takes inputs_embeds and a mask. None
    where there is no such module, or two (encoder–decoder models)."""
    find: Any = getattr(model, "get_input_embeddings", None)
    if find is None or _pair(model):
        return None
    embed = find()
    path = next((n for n, m in model.named_modules() if m is embed), "")
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if {"inputs_embeds", "attention_mask"} <= set(inspect.signature(module.forward).parameters):
            return module
    return None


def place(handle: Any, placed: Any) -> None:
    """Puts a prompt before the tokens; of an encoder-decoder before the encoder's."""
    module = handle.model.get_encoder() if _pair(handle.model) else stack_of(handle.model)
    if module is None:
        raise LuthierError(
            f"piece '{placed.piece}': {type(handle.model).__name__} has no single stack that takes embeddings, so a soft "
            "prompt has no place: use another form on this base"
        )
    embed: Tensor = module.get_input_embeddings().weight  # pyright: ignore
    if placed.state.site.d_out != embed.shape[1]:
        raise LuthierError(
            f"piece '{placed.piece}': embeddings are {embed.shape[1]} wide here, the prompt {placed.state.site.d_out}"
        )
    held: Prompts = module.__dict__.get(HELD) or Prompts(module, handle)
    module.__dict__[HELD] = held
    held.placed.append(placed)

    def undo() -> None:
        held.placed = [q for q in held.placed if q is not placed]
        if not held.placed:
            for hook in held.hooks:
                hook.remove()
            module.__dict__.pop(HELD, None)

    handle.extras.setdefault(placed.piece, []).append(undo)
