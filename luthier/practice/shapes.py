"""What practice bases are: their shapes, the models of these shapes freshly drawn, and the loss each kind is trained by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from luthier.errors import LuthierError, nearest
from luthier.practice.stream import Rows

KINDS = ("llama", "mixtral", "bert")
BALANCE = 0.01
"""Weight of the router's auxiliary loss (Fedus et al. 2022) in a mixture of experts."""
MASKED = 0.15
"""Share of tokens that an encoder is asked for; of them 8 in 10 are masked, 1 another token, 1 as it was (Devlin et al. 2019)."""


@dataclass(frozen=True)
class Size:
    """The model's shape. Defaults are M: 5.5 M parameters, 11 MB in bf16. ``experts`` and ``top`` (how many see a token) are
    a mixtral's, each expert ``ffn`` wide; a bert has as many key-value heads as heads, and 512 positions."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 768
    context: int = 2048
    kind: str = "llama"
    experts: int = 4
    top: int = 2


M = Size()
"""The shape of the base in the package."""


def new_model(size: Size, tokenizer: Any, seed: int) -> Any:
    """A freshly drawn model of this size, fp32. Raises LuthierError for an unknown kind."""
    if size.kind not in KINDS:
        raise LuthierError(f"practice base: unknown kind {size.kind!r}; {nearest(size.kind, KINDS, 'kind')}")
    import transformers

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.ffn,
        "max_position_embeddings": size.context,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if size.kind == "bert":
        config = transformers.BertConfig(
            **{**common, "max_position_embeddings": 512}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return transformers.BertForMaskedLM(config).float()
    common |= {"num_key_value_heads": size.kv_heads, "tie_word_embeddings": False}
    common |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    if size.kind == "mixtral":
        experts = {"num_local_experts": size.experts, "num_experts_per_tok": size.top, "router_aux_loss_coef": BALANCE}
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**common, **experts, sliding_window=None, head_dim=size.hidden // size.heads)
        ).float()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)).float()


def loss_of(model: Any, rows: Rows, device: torch.device, bf16: bool, step: int = 0, mask: int = 0) -> torch.Tensor:
    """Loss over a packed batch, in which records see only their own conversation.

    Weighted mean of the next-token loss; of a mixture of experts with the router's balance besides; of an encoder the mean
    loss on masked tokens, drawn by ``step``, with ``mask`` the id that stands for them.
    """
    ids, position, segment, weight = (
        torch.from_numpy(a).to(device) for a in (rows.ids, rows.position, rows.segment, rows.weight)
    )
    length = ids.shape[1]
    seen = segment[:, :, None] == segment[:, None, :]
    if model.config.model_type == "bert":
        return _masked(model, ids, position, segment, seen, bf16, step, mask)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen = seen & causal
    sparse = {"output_router_logits": True} if model.config.model_type == "mixtral" else {}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = model.model(input_ids=ids, position_ids=position, attention_mask=seen[:, None], use_cache=False, **sparse)
        counted = weight[:, 1:] > 0
        logits = model.lm_head(out.last_hidden_state[:, :-1][counted])
    each = nn.functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    share = weight[:, 1:][counted]
    loss = (each * share).sum() / share.sum()
    return loss + BALANCE * _imbalance(model, out.router_logits, segment) if sparse else loss


def _imbalance(model: Any, logits: Any, segment: torch.Tensor) -> Any:
    """The auxiliary loss, padding left out: 1 times the experts a token where experts are used evenly."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config
    return load_balancing_loss_func(logits, config.num_local_experts, config.num_experts_per_tok, (segment > 0).long())


def cover(
    ids: torch.Tensor, real: torch.Tensor, seed: int, vocabulary: int, mask: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids with some tokens masked, which are asked for): by seed, the same on every device. At least one is."""
    g = torch.Generator().manual_seed(seed)
    chance, fate = torch.rand(ids.shape, generator=g), torch.rand(ids.shape, generator=g)
    other = torch.randint(vocabulary, ids.shape, generator=g).to(ids.device)
    chance = torch.where(real, chance.to(ids.device), torch.inf)
    asked = chance < max(MASKED, float(chance.min()) + 1e-9)
    fate = fate.to(ids.device)
    shown = torch.where(asked & (fate < 0.8), mask, torch.where(asked & (fate >= 0.9), other, ids))
    return shown, asked


def _masked(
    model: Any,
    ids: torch.Tensor,
    position: torch.Tensor,
    segment: torch.Tensor,
    seen: torch.Tensor,
    bf16: bool,
    step: int,
    mask: int,
) -> torch.Tensor:
    shown, asked = cover(ids, segment > 0, step, model.config.vocab_size, mask)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.bert(input_ids=shown, position_ids=position, attention_mask=seen[:, None]).last_hidden_state
        logits = model.cls(hidden[asked])
    return nn.functional.cross_entropy(logits.float(), ids[asked])
