"""Roles: every parameter of every family has exactly one, and patterns find what they say."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.bases.families import FAMILIES as TABLES
from luthier.bases.part import _OFFSET, adds_one
from luthier.bases.roles import Roles
from luthier.errors import LuthierError
from tests.tiny import FAMILIES, HIDDEN, LAYERS, tiny

QKVO = {"attn.q": 2, "attn.k": 2, "attn.v": 2, "attn.o": 2}
FUSED_QKV = {"attn.qkv": 2, "attn.o": 2}
GATED = {"ffn.gate": 2, "ffn.up": 2, "ffn.down": 2}
PLAIN = {"ffn.up": 2, "ffn.down": 2}
ENDS = {"embed": 1, "norm.final": 1, "head": 1}
PRE = {"norm.attn": 2, "norm.ffn": 2}
QK = {"norm.q": 2, "norm.k": 2}
SANDWICH = {**PRE, "norm.attn_out": 2, "norm.ffn_out": 2}
LLAMA = {**ENDS, **QKVO, **GATED, **PRE}
MOE = {**ENDS, **QKVO, **PRE, "router": 2, "expert.gate_up": 2, "expert.down": 2}
SHARED = {"shared.gate": 2, "shared.up": 2, "shared.down": 2, "router.shared": 2}
ENCODER = {
    **{"embed": 1, "embed.position": 1, "embed.type": 1, "norm.embed": 1, "norm.attn_out": 2, "norm.ffn_out": 2},
    **QKVO,
    **PLAIN,
}
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, **QK},
    "gemma": LLAMA,
    "gemma2": {**LLAMA, **SANDWICH},
    "gemma3_text": {**LLAMA, **SANDWICH, **QK},
    "phi": {**ENDS, **QKVO, **PLAIN, "norm.attn": 2},
    "phi3": {**ENDS, **FUSED_QKV, **PRE, "ffn.gate_up": 2, "ffn.down": 2},
    "gpt2": {**ENDS, **FUSED_QKV, **PLAIN, **PRE, "embed.position": 1},
    "gpt_neox": {**ENDS, **FUSED_QKV, **PLAIN, **PRE},
    "opt": {**ENDS, **QKVO, **PLAIN, **PRE, "embed.position": 1},
    "bloom": {**ENDS, **FUSED_QKV, **PLAIN, **PRE, "norm.embed": 1},
    "mixtral": MOE,
    "qwen2_moe": {**MOE, **SHARED},
    "qwen3_moe": {**MOE, **QK},
    "bert": {**ENCODER, "pooler": 1, "classifier": 1},
    "roberta": {**ENCODER, "classifier.dense": 1, "classifier": 1},
    "t5": {
        **{"embed": 3, "embed.position": 2, "attn.q": 4, "attn.k": 4, "attn.v": 4, "attn.o": 4},
        **{"cross.q": 2, "cross.k": 2, "cross.v": 2, "cross.o": 2, "ffn.up": 4, "ffn.down": 4},
        **{"norm.attn": 4, "norm.cross": 2, "norm.ffn": 4, "norm.final": 2, "head": 1},
    },
}


def counts(roles: Roles) -> dict[str, int]:
    return dict(Counter(part.role for part in roles.parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_role_and_every_role_its_count(family):
    model = tiny(family)
    roles = Roles(model)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert Counter(n for p in roles.parts for n in p.parameters) == Counter(names)
    assert counts(roles) == EXPECTED[family]
    assert roles.layer_count == LAYERS and roles.hidden == HIDDEN
    assert len(roles.layers) == (4 if family == "t5" else 2)
    assert len(roles.attention) == len(roles.layers)


def test_no_family_was_missed():
    assert set(EXPECTED) == set(FAMILIES)
    assert set(FAMILIES) <= set(TABLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_weights(family):
    model = tiny(family)
    values = dict(model.named_parameters(remove_duplicate=False))
    for part in Roles(model).parts:
        weight = values[part.parameters[0]]
        if part.kind == "norm":
            assert weight.shape == (part.d_in,)
        elif part.kind in ("conv1d", "embedding"):
            assert weight.shape == (part.d_in, part.d_out)
        else:
            assert weight.shape[-2:] == (part.d_out, part.d_in), part
        assert part.bias == (len(part.parameters) == 2)
        assert (part.experts == 4) == (part.kind == "fused-experts")
        assert isinstance(model.get_submodule(part.module), torch.nn.Module)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_are_as_wide_as_stated(family):
    roles = Roles(tiny(family))
    keys = roles.select("attn.k")
    assert {len(roles.rows(part, "attn.k")) for part in keys} == {roles.d_kv}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_and_inspection_agree_on_the_kind_of_part(family, monkeypatch):
    """Without its table a family is read by inspection: no part lost, and attention and feed-forward the same."""
    model = tiny(family)
    by_table = {p.name: p.role for p in Roles(model).parts}
    monkeypatch.setattr("luthier.bases.roles.FAMILIES", {})
    by_sight = {p.name: p.role for p in Roles(model).parts}
    assert set(by_sight) == set(by_table)
    for name, role in by_table.items():
        place = role.split(".")[0]
        assert by_sight[name] == role or place in ("norm", "embed", "head"), (name, role, by_sight[name])
        assert by_sight[name].split(".")[0] == place


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2", "bert"])
def test_ties_are_named(family):
    model = tiny(family, tie_word_embeddings=True)
    roles = Roles(model)
    names: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), set()).add(roles.owner[name].name)
    for part in roles.parts:
        same = names[id(dict(model.named_parameters(remove_duplicate=False))[part.parameters[0]])] - {part.name}
        assert set(part.tied_with) == same
    if family != "bert":
        assert roles.by_role("head")[0].tied_with


def test_stacks_of_an_encoder_decoder():
    roles = Roles(tiny("t5"))
    assert {p.stack for p in roles.select("cross")} == {"decoder"}
    assert len(roles.select("encoder:attn")) == len(roles.select("decoder:attn")) == 8
    assert len(roles.select("attn")) == 16
    assert roles.by_role("norm.final")[0].stack == "encoder"


@pytest.mark.parametrize(
    ("family", "pattern", "found"),
    [
        ("llama", "attn", 8),
        ("llama", "attn.q", 2),
        ("llama", "linear", 14),
        ("llama", "all-linear", 14),
        ("llama", "*.o", 2),
        ("llama", "norm", 5),
        ("llama", "q_proj", 2),
        ("llama", "self_attn.q_proj", 2),
        ("llama", "*.0.mlp.*", 3),
        ("llama", "re:.*layers\\.1\\..*(q|v)_proj", 2),
        ("llama", "model.layers.0.mlp.up_proj", 1),
        ("llama", "all", 21),
        ("gpt2", "linear", 8),
        ("gpt2", "attn.q", 2),
        ("gpt2", "attn", 4),
        ("phi3", "ffn.gate", 2),
        ("qwen2_moe", "linear", 14),
        ("qwen2_moe", "expert", 4),
        ("qwen2_moe", "experts.down_proj", 2),
        ("qwen2_moe", "router", 4),
        ("bert", "linear", 12),
        ("t5", "linear", 32),
    ],
)
def test_patterns(family, pattern, found):
    assert len(Roles(tiny(family)).select(pattern)) == found


def test_exceptions_layers_and_order():
    roles = Roles(tiny("llama"))
    some = roles.select(["ffn", "attn.q"], except_=["down_proj"], layers=[-1])
    assert [p.name for p in some] == [
        f"model.layers.1.{n}" for n in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    assert roles.select(["attn.q", "attn"]) == roles.select("attn")


@pytest.mark.parametrize(
    ("patterns", "except_", "layers", "said"),
    [
        (["q_porj"], [], None, "did you mean 'q_proj'"),
        (["attn"], ["ffn.upp"], None, "did you mean 'ffn.up'"),
        (["attn"], [], [2], "layers 0 to 1"),
        (["expert"], [], None, "'expert' matches no part"),
        (["re:("], [], None, "no regular expression"),
    ],
)
def test_what_matches_nothing_is_an_error(patterns, except_, layers, said):
    with pytest.raises(LuthierError, match=said.replace("(", r"\(")) as error:
        Roles(tiny("llama")).select(patterns, except_, layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "phi3"])
def test_rows_of_fused_matrices_are_those_the_model_uses(family):
    """With the value's rows at zero nothing reaches the output matrix of attention; with them at one, ones do."""
    model = tiny(family)
    roles = Roles(model)
    part = roles.by_role("attn.qkv")[0]
    found = [roles.rows(part, f"attn.{n}") for n in "qkv"]
    assert torch.equal(torch.cat(found).sort().values, torch.arange(part.d_out))
    module = model.get_submodule(part.module)
    out = roles.by_role("attn.o")[0]
    inputs = []
    model.get_submodule(out.module).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    rows = found[2]
    with torch.no_grad():
        weight = module.weight.T if part.kind == "conv1d" else module.weight
        weight[rows] = 0
        if module.bias is not None:
            module.bias[rows] = 0
        model(input_ids=torch.arange(3, 15)[None])
        assert inputs[0].abs().max() == 0
        if module.bias is not None:
            module.bias[rows] = 1
            model(input_ids=torch.arange(3, 15)[None])
            torch.testing.assert_close(inputs[1], torch.ones_like(inputs[1]))
        else:
            weight[rows] = 1
            model(input_ids=torch.arange(3, 15)[None])
            assert inputs[1].abs().min() > 0


def test_meta_models_have_the_same_parts():
    model = tiny("qwen2_moe")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert Roles(empty).parts == Roles(model).parts


def test_classifiers_on_decoders_and_masked_heads():
    assert counts(Roles(tiny("llama", "classify")))["classifier"] == 1
    assert Roles(tiny("t5", "classify")).by_role("classifier.dense")
    assert Roles(tiny("bert", "masked")).by_role("head.transform")


def small(family, **settings):
    body = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    body |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family, **{**body, **settings})


@pytest.mark.parametrize("family", ["stablelm", "olmo2", "starcoder2", "granite", "nemotron", "falcon"])
def test_architectures_without_a_table_are_read_by_inspection(family):
    assert family not in TABLES
    with torch.device("meta"):
        roles = Roles(AutoModelForCausalLM.from_config(small(family, num_key_value_heads=4)))
    assert len(roles.select("linear")) in (8, 12, 14)
    assert len(roles.by_role("embed")) == len(roles.by_role("head")) == 1
    assert "other" not in counts(roles)


def test_an_unreadable_architecture_says_what_to_state_and_stating_it_works():
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(small("albert", embedding_size=16))
    with pytest.raises(LuthierError, match="albert_layers.*.ffn.*base: {roles:") as error:
        Roles(model)
    assert "\n" not in str(error.value)
    stated = {"embedding_hidden_mapping_in": "embed.project", "*.ffn": "ffn.up", "*.ffn_output": "ffn.down"}
    roles = Roles(model, stated)
    assert [p.leaf for p in roles.select("ffn")] == ["ffn", "ffn_output"]
    with pytest.raises(LuthierError, match="did you mean 'ffn.up'"):
        Roles(model, {**stated, "*.ffn": "ffn.upp"})
    with pytest.raises(LuthierError, match="'\\*.nothing' matches no module"):
        Roles(model, {**stated, "*.nothing": "ffn.up"})


def test_what_a_delta_attached_has_no_role():
    model = tiny("llama")
    before = Roles(model).parts
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.add_module("luthier", torch.nn.ParameterDict({"A": torch.nn.Parameter(torch.zeros(2, 32))}))
    assert Roles(model).parts == before


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_multiply_by_one_plus_their_weight_are_known(family):
    """By what they compute, not by the family's name."""
    norms = [p for p in Roles(tiny(family)).parts if p.kind == "norm"]
    assert norms and all(p.offset == family.startswith("gemma") for p in norms)


@pytest.mark.parametrize(
    "room,name,offset",
    [("nemotron", "NemotronLayerNorm1P", True), ("vaultgemma", "VaultGemmaRMSNorm", True)]
    + [("qwen3_5_moe", "Qwen3_5MoeRMSNorm", True), ("qwen3_5_moe", "Qwen3_5MoeRMSNormGated", False)],
)
def test_norms_of_other_families(room, name, offset):
    module = importlib.import_module(f"transformers.models.{room}.modeling_{room}")
    for device in ("cpu", "meta"):
        _OFFSET.clear()
        assert adds_one(getattr(module, name)(8).to(device)) is offset
