"""Tiny seeded models of every supported family, for tests: two layers, width 32, vocabulary 128, fp32, eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 128, 32, 2, 4, 2, 48

IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = {"max_position_embeddings": 128}
BODY = {
    **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER},
    **LONG,
}
GROUPED = {**BODY, "num_key_value_heads": KV_HEADS}
GEMMA = {**GROUPED, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENCODER = {**BODY, "type_vocab_size": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi": BODY,
    "phi3": GROUPED,
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128},
    "gpt_neox": BODY,
    "opt": {**BODY, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "decoder_sparse_step": 1},
    "bert": ENCODER,
    "roberta": {**ENCODER, "max_position_embeddings": 130},
    "t5": {
        **{"d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS},
        **{"decoder_start_token_id": 0},
    },
}
"""Family (transformers' model_type) -> settings of its configuration."""

ALIASES = {"gemma3": "gemma3_text", "neox": "gpt_neox"}
NATURAL = {"bert": "classify", "roberta": "classify", "t5": "seq2seq"}
BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "causal": AutoModelForCausalLM.from_config,
    "classify": AutoModelForSequenceClassification.from_config,
    "seq2seq": AutoModelForSeq2SeqLM.from_config,
    "masked": AutoModelForMaskedLM.from_config,
}


@lru_cache(maxsize=64)
def _built(family: str, kind: str, settings: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    extra = dict(settings)
    if kind == "classify":
        extra = {"num_labels": 3, **extra}
    config = AutoConfig.for_model(family, **{**IDS, **FAMILIES[family], **extra})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[kind](config, dtype=torch.float32).eval()


def tiny(family: str = "llama", kind: str | None = None, **settings: Any) -> PreTrainedModel:
    """A fresh copy of the tiny model of a family; equal numbers at every call.

    family: a key of FAMILIES. kind: causal, classify (3 labels), seq2seq or masked; default what the family is made
    for. settings: configuration values over the table's (num_hidden_layers=4, tie_word_embeddings=True …).
    """
    family = ALIASES.get(family, family)
    kind = kind or NATURAL.get(family, "causal")
    return copy.deepcopy(_built(family, kind, tuple(sorted(settings.items()))))


def tiny_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length) that avoid the special ids 0–2."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a printable character, 103 in all, with a chat template that marks generations."""
    special = [*(["<pad>"] if pad else []), "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([*special, *characters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[-4:],
        **({"pad_token": "<pad>"} if pad else {}),
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
