"""Fingerprints: what they see, and what they must not see."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from luthier.bases.fingerprint import (
    compare,
    fingerprint,
    fingerprint_template,
    fingerprint_tokenizer,
    full_fingerprint,
)
from luthier.errors import LuthierError
from tests.tiny import FAMILIES, tiny, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_any_changed_tensor_is_seen(family):
    model = tiny(family)
    mark = fingerprint(model)
    assert mark == fingerprint(tiny(family))
    for _, value in model.named_parameters():
        kept = value.data.clone()
        value.data.view(-1)[0] += 1
        assert compare(mark, fingerprint(model)) == "different"
        value.data.copy_(kept)
    assert fingerprint(model) == mark


def test_another_type_is_the_same_base_and_another_value_is_not():
    whole, half = tiny(), tiny().to(torch.bfloat16)
    back = tiny().to(torch.bfloat16).float()
    assert compare(fingerprint(whole), fingerprint(half)) == "same, other dtype"
    assert compare(fingerprint(half), fingerprint(back)) == "same, other dtype"
    assert compare(fingerprint(whole), fingerprint(back)) == "different"
    with pytest.raises(LuthierError, match="no fingerprint"):
        compare("abc", fingerprint(whole))


def test_attached_parameters_and_fresh_heads_do_not_count():
    model = tiny("llama", "classify")
    mark = fingerprint(model, skip=["score.weight"])
    model.score.weight.data += 1
    model.model.norm.add_module("luthier", torch.nn.ParameterDict({"A": torch.nn.Parameter(torch.zeros(2))}))
    assert fingerprint(model, skip=["score.weight"]) == mark
    assert fingerprint(model) != mark


def test_names_and_shapes_count():
    model = tiny()
    mark = fingerprint(model)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.view(16, 64))
    assert compare(mark, fingerprint(model)) == "different"


def test_large_tensors_are_sampled_in_every_column():
    table = torch.nn.Embedding(4096, 256)
    mark = fingerprint(table)
    seen = sum(bool(_changed(table, column, mark)) for column in range(0, 256, 37))
    assert seen == len(range(0, 256, 37))


def _changed(table, column, mark):
    with torch.no_grad():
        table.weight[:, column] += 1
        found = fingerprint(table) != mark
        table.weight[:, column] -= 1
    return found


def test_without_values_there_is_no_fingerprint():
    with pytest.raises(LuthierError, match="meta device"):
        fingerprint(torch.nn.Linear(2, 2, device="meta"))


def test_the_full_hash_sees_one_bit_and_ignores_sharding(tmp_path):
    values = {"a": torch.randn(70_000), "b": torch.randn(3, 5, dtype=torch.float64), "c": torch.tensor(True)}
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    for folder in (one, two, other):
        folder.mkdir()
    save_file(values, one / "model.safetensors")
    save_file({"b": values["b"]}, two / "x.safetensors")
    save_file({"a": values["a"], "c": values["c"]}, two / "y.safetensors")
    assert full_fingerprint(one) == full_fingerprint(two)
    values["a"].view(torch.int32)[69_999] ^= 1
    save_file(values, other / "model.safetensors")
    assert full_fingerprint(one) != full_fingerprint(other)
    model = tiny()
    mark = full_fingerprint(model)
    model.model.embed_tokens.weight.data.view(torch.int32)[77, 7] ^= 1
    assert full_fingerprint(model) != mark
    with pytest.raises(LuthierError, match="no safetensors"):
        full_fingerprint(tmp_path)


def test_tokenizer_and_template():
    a, b = tiny_tokenizer(), tiny_tokenizer()
    b.padding_side = "left"
    assert fingerprint_tokenizer(a) == fingerprint_tokenizer(b)
    b.add_tokens(["new"])
    assert fingerprint_tokenizer(a) != fingerprint_tokenizer(b)
    assert fingerprint_template(a) == fingerprint_template(a.chat_template) != ""
    assert fingerprint_template(a) != fingerprint_template(a.chat_template + " ")
    a.chat_template = None
    assert fingerprint_template(a) == ""
