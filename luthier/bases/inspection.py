"""Roles by inspection, for architectures without a table: names in common use, module types and shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from luthier.bases.part import Raw

ATTENTION = re.compile(r"(^|[._])(self_?)?attn|attention|(^|[._])mixer\.(mha|attn)|seq_transf", re.I)
CROSS = re.compile(r"encoder_attn|cross_?attn|cross_?attention|encdec_?attention", re.I)
EXPERT = re.compile(r"(^|\.)experts?\.(\d+)(\.|$)")
MIXER = re.compile(r"linear_attn|mixer|mamba|ssm|short_conv|(^|\.)conv(\.|$)|rglru|recurrent", re.I)
SHARED = re.compile(r"shared_(expert|mlp)", re.I)

ATTENTION_LEAVES: dict[str, str] = {
    **dict.fromkeys(("q", "wq", "q_proj", "query", "q_lin", "to_q", "q_attn", "query_proj", "linear_q"), "q"),
    **dict.fromkeys(("k", "wk", "k_proj", "key", "k_lin", "to_k", "key_proj", "linear_k"), "k"),
    **dict.fromkeys(("v", "wv", "v_proj", "value", "v_lin", "to_v", "value_proj", "linear_v"), "v"),
    **dict.fromkeys(("o", "wo", "o_proj", "out_proj", "out_lin", "to_out", "c_proj", "dense", "proj", "resid"), "o"),
    **dict.fromkeys(("qkv", "wqkv", "qkv_proj", "c_attn", "query_key_value", "in_proj", "Wqkv", "att_proj"), "qkv"),
    **dict.fromkeys(("kv_b_proj", "kv_proj"), "kv"),
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_a_proj"), "kv_down"),
    "q_a_proj": "q_down",
    "q_b_proj": "q",
    "sinks": "sink",
}
FFN_LEAVES: dict[str, str] = {
    **dict.fromkeys(("gate_proj", "w1", "gate", "wi_0", "linear_1"), "gate"),
    **dict.fromkeys(("up_proj", "w3", "up", "wi_1", "wi", "linear_v"), "up"),
    **dict.fromkeys(("fc1", "c_fc", "fc_in", "dense_h_to_4h", "lin1", "linear1"), "up"),
    **dict.fromkeys(("down_proj", "w2", "down", "wo", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "lin2"), "down"),
    **dict.fromkeys(("linear2",), "down"),
    **dict.fromkeys(("gate_up_proj", "gate_and_up_proj", "input_linear"), "gate_up"),
    "output_linear": "down",
}
NORMS: Sequence[tuple[str, str]] = (
    (r"(q_norm|q_layernorm|query_norm|q_ln)$", "norm.q"),
    (r"(k_norm|k_layernorm|key_norm|k_ln)$", "norm.k"),
    (r"(q_a|kv_a)_(layer)?norm$", "norm.latent"),
    (r"(pre_feedforward_layernorm|pre_mlp_norm|mlp_norm|ffn_norm|ln_2|ln2|norm2|norm_2|ln_mlp)$", "norm.ffn"),
    (r"(post_feedforward_layernorm|post_mlp_norm|ffn\.LayerNorm)$", "norm.ffn_out"),
    (r"(encoder_attn_layer_norm|ln_cross_attn|cross_attn_layer_norm)$", "norm.cross"),
    (r"(input_layernorm|self_attn_layer_norm|attention_norm|attn_norm|ln_1|ln1|norm1|norm_1|ln_attn)$", "norm.attn"),
    (r"(pre_attention_norm|pre_attn_norm|pre_self_attn_layernorm)$", "norm.attn"),
)


class Inspector:
    """Guesses the role of a part of an unknown architecture; None where it cannot tell."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        config: Any = getattr(model, "config", None)
        self.hidden: int = getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0)
        self.positions: int = getattr(config, "max_position_embeddings", 0) or 0
        self.layers = tuple(layers)
        self.embed = _output_of(model, "get_input_embeddings")
        self.head = _output_of(model, "get_output_embeddings")
        self.names = {name for name, _ in model.named_modules()}

    def role(self, raw: Raw) -> str | None:
        """The role of a part, or None."""
        if raw.module is self.embed:
            return "embed"
        if raw.module is self.head:
            return "head"
        layer = next((at for at in self.layers if raw.name.startswith(at + ".")), None)
        if raw.kind == "norm":
            return self._norm(raw, layer)
        if raw.kind == "embedding":
            return self._embedding(raw)
        if layer is None:
            return None
        inner = raw.name[len(layer) + 1 :]
        if MIXER.search(inner) and not re.search(r"(^|\.)attention(\.|$)|mixer\.(mha|attn)", inner):
            return "mixer"
        if ATTENTION.search(inner) or CROSS.search(inner):
            return self._attention(raw, inner)
        return self._feed_forward(raw, inner)

    def _embedding(self, raw: Raw) -> str | None:
        if re.search(r"pos|wpe|relative", raw.name, re.I) or (self.positions and raw.d_in == self.positions):
            return "embed.position"
        if re.search(r"type|segment", raw.name, re.I):
            return "embed.type"
        return "embed" if re.search(r"embed_tokens|word_emb|shared", raw.name) else None

    def _norm(self, raw: Raw, layer: str | None) -> str | None:
        if layer is None:
            return "norm.embed" if re.search(r"embed", raw.name.rpartition(".")[2] + raw.name, re.I) else "norm.final"
        parent = raw.name.rpartition(".")[0]
        if raw.name.endswith("post_attention_layernorm"):
            sandwich = f"{parent}.pre_feedforward_layernorm" in self.names
            only_post = f"{parent}.post_feedforward_layernorm" in self.names
            return "norm.attn_out" if sandwich or only_post else "norm.ffn"
        return next((role for pattern, role in NORMS if re.search(pattern, raw.name)), None)

    def _attention(self, raw: Raw, inner: str) -> str | None:
        place = "cross" if CROSS.search(inner) else "attn"
        role = ATTENTION_LEAVES.get(raw.name.rpartition(".")[2])
        if role == "o" and self.hidden and raw.d_in == self.hidden and raw.d_out >= 3 * self.hidden:
            role = "qkv"
        return f"{place}.{role}" if role else None

    def _feed_forward(self, raw: Raw, inner: str) -> str | None:
        leaf = raw.name.rpartition(".")[2]
        if raw.kind == "fused-experts":
            return {"gate_up_proj": "expert.gate_up", "down_proj": "expert.down", "up_proj": "expert.up"}.get(leaf)
        if (
            leaf in ("router", "gate", "gate_wg", "layer")
            and raw.d_out != self.hidden
            and self._beside_experts(raw.name)
        ):
            return "router"
        if leaf == "e_score_correction_bias":
            return "router.bias"
        if leaf == "shared_expert_gate":
            return "router.shared"
        place = "expert" if EXPERT.search(inner) else "shared" if SHARED.search(inner) else "ffn"
        if (role := FFN_LEAVES.get(leaf)) and raw.kind in ("linear", "conv1d"):
            return f"{place}.{role}"
        return None

    def _beside_experts(self, name: str) -> bool:
        """Whether a module or one of its two parents has experts beside it."""
        parts = name.split(".")
        return any(f"{'.'.join(parts[:-up])}.experts" in self.names for up in (1, 2))


def layer_prefixes(model: nn.Module) -> list[str]:
    """Module names of the layers, in order: the children of the outermost lists that hold matrices."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        if any(path == at or path.startswith(at + ".") for at in found):
            continue
        if all(sum(p.dim() >= 2 for p in child.parameters()) >= 2 for child in module):
            found += [f"{path}.{i}" for i in range(len(module))]
    return found


def _output_of(model: nn.Module, method: str) -> object | None:
    getter = getattr(model, method, None)
    if getter is None:
        return None
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None
