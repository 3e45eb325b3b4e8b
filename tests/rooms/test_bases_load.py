"""Loading: what comes back is what was saved, and every failure is one line that says what to do."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from luthier.bases.fingerprint import fingerprint_tokenizer
from luthier.bases.load import load_base
from luthier.bases.tokens import add_tokens, choose_pad
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec
from tests.tiny import FAMILIES, NATURAL, tiny, tiny_ids, tiny_tokenizer

LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from family to a folder with that tiny model and the tiny tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family, kind=None):
        at = root / f"{family}-{kind or 'natural'}"
        if not at.exists():
            tiny(family, kind).save_pretrained(at)
            tiny_tokenizer().save_pretrained(at)
        return at

    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A fresh copy of the saved Llama, to break."""
    target = tmp_path / "base"
    target.mkdir()
    for file in saved("llama").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def spec(name, **settings):
    return BaseSpec(name=str(name), **settings)


def refused(said, name, **settings):
    with pytest.raises(LuthierError, match=said) as error:
        load_base(spec(name, **settings), device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_for_bit(saved, family):
    kind = NATURAL.get(family, "causal")
    base = load_base(spec(saved(family), kind=kind, labels=LABELS if kind == "classify" else None), device="cpu")
    model = tiny(family)
    assert [n for n, _ in base.model.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(base.model.parameters(), model.parameters(), strict=True))
    assert base.new_parameters == () and base.new_rows == ()
    assert fingerprint_tokenizer(base.tokenizer) == fingerprint_tokenizer(tiny_tokenizer())
    assert base.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert not base.model.training and base.tokenizer.padding_side == "right"
    assert base.model.config.use_cache is model.config.use_cache if hasattr(model.config, "use_cache") else True
    used = base.model.config._attn_implementation
    assert used == "sdpa" or any("attention is eager" in note for note in base.notes)
    empty = load_base(spec(saved(family), kind=kind), weights=False)
    assert empty.device.type == "meta" and empty.fingerprint is None
    assert empty.roles.parts == base.roles.parts


def test_the_fingerprint_is_of_the_checkpoint(saved):
    plain = load_base(spec(saved("llama")), device="cpu")
    grown = load_base(spec(saved("llama"), new_tokens=[f"<t{i}>" for i in range(40)]), device="cpu")
    assert plain.fingerprint == grown.fingerprint is not None


def test_a_fresh_head_is_seeded_and_listed(saved):
    settings = {"kind": "classify", "labels": ["no", "yes"]}
    one = load_base(spec(saved("llama"), **settings), device="cpu")
    two = load_base(spec(saved("llama"), **settings), device="cpu")
    three = load_base(spec(saved("llama"), **settings), device="cpu", seed=1)
    assert one.new_parameters == ("score.weight",)
    assert one.model.score.weight.shape == (2, 32)
    assert torch.equal(one.model.score.weight, two.model.score.weight)
    assert not torch.equal(one.model.score.weight, three.model.score.weight)
    assert one.fingerprint == three.fingerprint
    assert one.model.config.id2label == {0: "no", 1: "yes"}
    assert any("lm_head.weight" in note for note in one.notes) and any("started anew" in note for note in one.notes)
    assert load_base(spec(saved("llama"), **settings), weights=False).new_parameters == ("score.weight",)


def test_a_trained_classifier_is_kept_and_one_with_other_labels_is_started_anew(saved):
    kept = load_base(spec(saved("bert"), kind="classify", labels=LABELS), device="cpu")
    assert torch.equal(kept.model.classifier.weight, tiny("bert").classifier.weight)
    other = load_base(spec(saved("bert"), kind="classify", labels=["x", "y"]), device="cpu")
    assert other.new_parameters == ("classifier.bias", "classifier.weight")


def test_an_encoder_from_a_masked_checkpoint_gets_pooler_and_head(saved):
    base = load_base(spec(saved("bert", "masked"), kind="classify", labels=LABELS), device="cpu")
    assert {n.split(".")[-2] for n in base.new_parameters} == {"classifier", "dense"}


def test_types(saved):
    assert load_base(spec(saved("llama")), device="cpu").dtype == torch.float32
    assert load_base(spec(saved("llama"), dtype="bfloat16"), device="cpu").dtype == torch.bfloat16


def test_new_tokens_get_rows_near_the_mean(saved):
    tokens = [f"<new{i}>" for i in range(30)]
    base = load_base(spec(saved("llama"), new_tokens=tokens), device="cpu")
    again = load_base(spec(saved("llama"), new_tokens=tokens), device="cpu")
    assert base.new_rows == tuple(range(103, 133)) and base.tokenizer.convert_tokens_to_ids("<new0>") == 103
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight, old = getattr(base.model, get)().weight, getattr(tiny(), get)().weight
        assert weight.shape == (133, 32)
        assert torch.equal(weight[:103], old[:103])
        assert (weight[103:] - old[:103].mean(0)).abs().max() < 0.05 * old.std()
        assert not torch.equal(weight[103], weight[104])
        assert torch.equal(weight, getattr(again.model, get)().weight)
    assert base.tokenizer("<new3>")["input_ids"] == [106]
    assert base.model(input_ids=torch.tensor([[5, 132]])).logits.shape[-1] == 133
    empty = load_base(spec(saved("llama"), new_tokens=tokens), weights=False)
    assert empty.new_rows == base.new_rows and empty.roles.parts == base.roles.parts


def test_tied_tables_grow_together():
    model, tokenizer = tiny("gemma"), tiny_tokenizer()
    add_tokens(tokenizer, model, [f"<n{i}>" for i in range(50)])
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape[0] == 153
    with pytest.raises(LuthierError, match="already a token"):
        add_tokens(tokenizer, model, ["<n3>"])


def test_a_pad_token_is_chosen_and_said():
    tokenizer = tiny_tokenizer(pad=False)
    assert "added" in str(choose_pad(tokenizer, 128)) and tokenizer.pad_token_id == 102
    assert choose_pad(tokenizer, 128) is None
    full = tiny_tokenizer(pad=False)
    assert "start token" in str(choose_pad(full, len(full))) and full.pad_token == "<s>"
    only = tiny_tokenizer(pad=False)
    only.bos_token = None
    assert "trained" in str(choose_pad(only, len(only))) and only.pad_token == "</s>"
    unknown = tiny_tokenizer(pad=False)
    unknown.unk_token = "<|tool|>"
    choose_pad(unknown, 128)
    assert unknown.pad_token == "<|tool|>"


def test_what_the_library_would_warn_about_is_silent_or_an_error(saved, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base(spec(saved("llama"), kind="classify", labels=LABELS), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_another_kind_is_named(saved):
    refused("state base.kind: seq2seq", saved("t5"), kind="causal")
    refused("no encoder–decoder", saved("llama"), kind="seq2seq")
    refused("labels belongs to", saved("llama"), labels=["a"])
    refused("checkpoint lacks cls.predictions.*state base.kind: classify", saved("bert"))


def test_missing_places(saved, tmp_path):
    refused("did you mean 'llama-natural'", saved("llama").parent / "llama-naturel")
    refused("no such folder; correct base.name, or give a hub name$", tmp_path / "nowhere" / "x")
    refused("is a file", saved("llama") / "config.json")
    refused("no config.json", tmp_path)
    refused("no hub name either", "three words here")


def test_offline_is_one_line_and_quick(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("hub cannot be reached .*go online once, or name a folder", "someone/never-cached-model")


def test_broken_weights(copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    refused("model.safetensors: truncated or altered", copy)
    file.write_bytes(b"\xff" * 64)
    refused("model.safetensors: truncated or altered", copy)
    file.write_bytes(whole)
    file.rename(copy / "pytorch_model.bin")
    refused("only as pickle .*refused", copy)
    (copy / "pytorch_model.bin").unlink()
    refused("no \\*.safetensors", copy)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model-00001-of-00002.safetensors").write_bytes(whole)
    refused("model-00002-of-00002.safetensors is missing", copy)


def test_keys_that_do_not_fit(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    values = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, said in (
        ({k: v for k, v in values.items() if k != name}, f"lacks {name}"),
        ({**values, "model.extra.weight": torch.zeros(2)}, "holds model.extra.weight"),
        ({**values, name: torch.zeros(3, 32)}, f"differ from config.json for {name}"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        refused(said, copy)


def test_broken_configurations(copy):
    config = json.loads((copy / "config.json").read_text())
    for text, said in (
        ("{", "not readable as JSON"),
        ("[1]", "no JSON object"),
        (json.dumps({**config, "model_type": "lama"}), "model_type 'lama' is unknown"),
        (json.dumps({**config, "model_type": "x", "auto_map": {"AutoConfig": "a.B"}}), "trust_remote_code: true"),
    ):
        (copy / "config.json").write_text(text)
        refused(said, copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text("{")
    refused("generation_config.json: not readable as JSON", copy)


def test_tokenizers(copy, saved):
    refused("not supported|does not support|cannot be loaded", copy, attention="nonsense")
    for file in copy.glob("token*"):
        file.unlink()
    refused("tokenizer", copy)
    assert load_base(spec(copy), device="cpu", tokenizer=False).tokenizer is None
    assert len(load_base(spec(copy, tokenizer=str(saved("qwen2"))), device="cpu").tokenizer) == 103
    refused("did you mean", copy, tokenizer=str(saved("qwen2")) + "x")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(copy):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(60)])
    tokenizer.save_pretrained(copy)
    refused("163 tokens but 128 embedding rows", copy)


def test_a_device_that_is_not_there(saved):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(LuthierError, match="not available"):
        load_base(spec(saved("llama")), device="cuda")


def test_logits_do_not_change(saved):
    base = load_base(spec(saved("qwen3_moe")), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(base.model(tiny_ids()).logits, tiny("qwen3_moe")(tiny_ids()).logits)
