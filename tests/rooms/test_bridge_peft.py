"""PEFT folders written by PEFT itself give the same logits here, and ours give the same logits there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.bridge.peft import from_peft, to_peft
from luthier.bridge.peft_in import READERS
from luthier.bridge.peft_out import WRITERS
from luthier.bridge.peft_words import base_of, unwrapped
from luthier.bridge.target import logits_of
from luthier.delta import FORMS
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.verbs.import_ import import_
from luthier.verbs.load import load
from luthier.verbs.verify import verify
from tests.tiny import tiny, tiny_ids, tiny_tokenizer

# PEFT warns of its own defaults and uses names that transformers will drop; none of that is ours.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

C = {"task_type": "CAUSAL_LM"}
S = {"task_type": "SEQ_2_SEQ_LM"}
CASES: dict[str, tuple[str, Any]] = {
    "lora-all-linear": ("llama", lambda: peft.LoraConfig(**C, target_modules="all-linear", r=4, lora_alpha=6)),
    "lora-patterns": (
        "llama",
        lambda: peft.LoraConfig(
            **C,
            target_modules=["q_proj", "down_proj"],
            r=4,
            rank_pattern={"layers.0.self_attn.q_proj": 2, r"down_proj": 3},
            alpha_pattern={r".*\.1\.mlp\.down_proj": 9},
        ),
    ),
    "lora-rslora": ("qwen2", lambda: peft.LoraConfig(**C, target_modules=["q_proj", "v_proj"], r=9, use_rslora=True)),
    "lora-regex": ("llama", lambda: peft.LoraConfig(**C, target_modules=r".*\.1\..*(k|o)_proj", r=3)),
    "lora-layers": ("llama", lambda: peft.LoraConfig(**C, target_modules=["up_proj"], layers_to_transform=[1])),
    "lora-exclude": (
        "llama",
        lambda: peft.LoraConfig(**C, target_modules=["up_proj"], exclude_modules=["layers.0.mlp.up_proj"]),
    ),
    "lora-conv1d": ("gpt2", lambda: peft.LoraConfig(**C, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora-embedding": ("gpt2", lambda: peft.LoraConfig(**C, target_modules=["wte", "c_fc"], fan_in_fan_out=True)),
    "lora-head-saved": (
        "llama",
        lambda: peft.LoraConfig(**C, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "lora-bias": ("qwen2", lambda: peft.LoraConfig(**C, target_modules=["q_proj"], bias="all")),
    "lora-tokens": (
        "llama",
        lambda: peft.LoraConfig(**C, target_modules=["q_proj"], trainable_token_indices=[9, 5]),
    ),
    "lora-tokens-tied": (
        "gpt2",
        lambda: peft.LoraConfig(**C, target_modules=["c_attn"], trainable_token_indices=[9, 5], fan_in_fan_out=True),
    ),
    "lora-t5": ("t5", lambda: peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"])),
    "lora-bert": ("bert", lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "dora": ("llama", lambda: peft.LoraConfig(**C, target_modules=["q_proj", "down_proj"], r=3, use_dora=True)),
    "dora-bias": ("qwen2", lambda: peft.LoraConfig(**C, target_modules=["q_proj", "k_proj"], use_dora=True)),
    "dora-conv1d": ("gpt2", lambda: peft.LoraConfig(**C, target_modules=["c_fc"], use_dora=True, fan_in_fan_out=True)),
    "ia3": ("llama", lambda: peft.IA3Config(**C)),
    "ia3-bias": ("qwen2", lambda: peft.IA3Config(**C)),
    "ia3-conv1d": ("gpt2", lambda: peft.IA3Config(**C, fan_in_fan_out=True)),
    "prompt": ("llama", lambda: peft.PromptTuningConfig(**C, num_virtual_tokens=4)),
    "prompt-absolute": ("gpt2", lambda: peft.PromptTuningConfig(**C, num_virtual_tokens=3)),
    "prefix": ("llama", lambda: peft.PrefixTuningConfig(**C, num_virtual_tokens=4)),
    "prefix-absolute": ("gpt2", lambda: peft.PrefixTuningConfig(**C, num_virtual_tokens=4)),
    "lora-experts": (
        "qwen3_moe",
        lambda: peft.LoraConfig(
            **C, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=3
        ),
    ),
    "lora-experts-patterns": (
        "mixtral",
        lambda: peft.LoraConfig(
            **C,
            target_modules=["q_proj"],
            target_parameters=["experts.down_proj", "layers.0.mlp.experts.gate_up_proj"],
            r=2,
            rank_pattern={"experts.down_proj": 3, "q_proj": 4},
            alpha_pattern={"layers.1.mlp.experts.down_proj": 5},
            use_rslora=True,
        ),
    ),
    "lora-parameters": (
        "llama",
        lambda: peft.LoraConfig(**C, target_modules=[], target_parameters=["q_proj.weight"], r=3),
    ),
    "lora-lora-bias": (
        "qwen2",
        lambda: peft.LoraConfig(**C, target_modules=["q_proj", "o_proj"], r=4, lora_alpha=12, lora_bias=True),
    ),
    "beft": ("llama", lambda: peft.BeftConfig(**C, target_modules=["v_proj", "up_proj"])),
    "beft-saved": ("qwen2", lambda: peft.BeftConfig(**C, target_modules=["v_proj"], modules_to_save=["norm"])),
    "shira": ("llama", lambda: peft.ShiraConfig(**C, target_modules=["q_proj", "down_proj"], r=2)),
    "tokens": ("llama", lambda: peft.TrainableTokensConfig(**C, token_indices=[3, 7])),
    "tokens-tied": ("gpt2", lambda: peft.TrainableTokensConfig(**C, token_indices=[90, 5, 7])),
    "prompt-pair": ("t5", lambda: peft.PromptTuningConfig(**S, num_virtual_tokens=4)),
    "prefix-pair": ("t5", lambda: peft.PrefixTuningConfig(**S, num_virtual_tokens=4)),
    "p-tuning": ("llama", lambda: peft.PromptEncoderConfig(**C, num_virtual_tokens=3)),
    "ln": ("llama", lambda: peft.LNTuningConfig(**C)),
    "ln-bias": ("gpt2", lambda: peft.LNTuningConfig(**C, target_modules=["ln_1", "ln_2", "ln_f"])),
}


def written(tmp_path: Path, family: str, config: Any, **settings: Any) -> tuple[Path, torch.Tensor]:
    """A folder by PEFT with every trained number disturbed, and the model's logits."""
    model = disturbed(family, config, **settings)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", ask(model)


def disturbed(family: str, config: Any, **settings: Any) -> Any:
    """A model by PEFT with every trained number disturbed."""
    model = peft.get_peft_model(tiny(family, **settings), config)
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def ask(model: Any) -> torch.Tensor:
    ids = tiny_ids()
    pair = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **pair).logits[:, -ids.shape[1] :]  # a soft prompt's own positions come first


@pytest.mark.parametrize("case", CASES)
def test_both_ways(tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    same_both_ways(tmp_path, family, *written(tmp_path, family, config()))


def same_both_ways(tmp_path: Path, family: str, folder: Path, theirs: torch.Tensor, **settings: Any) -> Delta:
    """What PEFT wrote gives PEFT's logits here, and what is written here gives them there; gives the delta."""
    base = tiny(family, **settings)
    untouched = logits_of(base)(tiny_ids())
    delta = from_peft(folder, base)
    assert torch.equal(logits_of(base)(tiny_ids()), untouched)
    handle = delta.apply(base)
    ours = logits_of(base)(tiny_ids())
    assert (ours - untouched).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-5
    handle.detach()

    delta.save(tmp_path / "delta")
    again = Delta.load(tmp_path / "delta")
    to_peft(again, tmp_path / "ours", base=base)
    model = tiny(family, **settings)
    back = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    assert (ask(back) - theirs).abs().max() <= 1e-5
    return delta


EMBEDDINGS = {
    "embedding adapted": (["embed_tokens", "q_proj"], "auto"),
    "head adapted": (["lm_head", "q_proj"], "auto"),
    "both adapted": (["embed_tokens", "lm_head"], "auto"),
    "saved without a word": (["q_proj"], True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_that_peft_saves_along(tmp_path: Path, case: str, tied: bool) -> None:
    modules, save = EMBEDDINGS[case]
    config = peft.LoraConfig(**C, target_modules=modules, r=4)
    model = disturbed("llama", config, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=save)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any(k.endswith(("embed_tokens.weight", "base_layer.weight")) for k in stored)
    delta = same_both_ways(tmp_path, "llama", tmp_path / "theirs", ask(model), tie_word_embeddings=tied)
    assert [piece.name for piece in delta.pieces] == ["lora"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_embedding_that_differs_moves(tmp_path: Path, tied: bool) -> None:
    model = disturbed("llama", peft.LoraConfig(**C, target_modules=["q_proj"]), tie_word_embeddings=tied)
    model.get_input_embeddings().weight.data[5] += 1
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    base = tiny(tie_word_embeddings=tied)
    delta = from_peft(tmp_path / "theirs", base)
    assert [list(piece.sites) for piece in delta.pieces[1:]] == [["model.embed_tokens.weight"]]
    delta.apply(base)
    assert (logits_of(base)(tiny_ids()) - ask(model)).abs().max() <= 1e-5


def test_an_embedding_saved_in_a_narrower_type_is_the_bases(tmp_path: Path) -> None:
    model = disturbed("llama", peft.LoraConfig(**C, target_modules=["q_proj"])).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert len(from_peft(tmp_path / "theirs", tiny()).pieces) == 1
    assert len(from_peft(tmp_path / "theirs", tiny().to(torch.bfloat16)).pieces) == 1


def test_every_type_of_peft_is_read_or_refused_by_name(tmp_path: Path) -> None:
    """Counts PEFT's own types: those that are read are all exchanged above, each other one is refused in one line."""
    read = {str(config().peft_type.value) for _, config in CASES.values()}
    assert read == set(READERS)
    for kind in (t.value for t in peft.PeftType):
        if kind in read:
            continue
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(LuthierError, match=f"peft_type {kind} has no form here") as caught:
            from_peft(tmp_path, tiny())
        assert "\n" not in str(caught.value)


def test_every_form_is_written_or_refused_by_name(tmp_path: Path) -> None:
    for name, form in FORMS.items():
        if name in WRITERS or form.at == "base":
            continue
        model = tiny()
        delta = Delta([fresh(model, name)])
        with pytest.raises(LuthierError, match=f"PEFT has no form for {name}: export to hf"):
            to_peft(delta, tmp_path / "out", base=model)


def test_experts_in_peft_terms(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "mixtral", CASES["lora-experts-patterns"][1]())
    base = tiny("mixtral")
    to_peft(from_peft(folder, base), tmp_path / "ours", base=base)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    theirs, ours = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


def test_what_one_adapter_cannot_hold(tmp_path: Path) -> None:
    """A prefix in the encoder, layers that PEFT gives the same, a bias where LoRA is not: refused, nothing written."""
    base = tiny("t5")
    both = fresh(base, "prefix")
    refused(Delta([both]), tmp_path, base, "in the encoder, where PEFT has none")
    decoder = {k: s for k, s in both.sites.items() if k.startswith("decoder")}
    apart = Piece("prefix", both.form, decoder, {k: both.p[k] for k in decoder}, {k: {} for k in decoder})
    refused(Delta([apart]), tmp_path, base, "the same prefix, and these differ")
    qwen = tiny("qwen2")
    lora = fresh(qwen, "lora", "attn.q")
    bias = fresh(qwen, "bias", "attn.v")
    refused(Delta([lora, bias]), tmp_path, qwen, "lora_bias lies on LoRA's own modules")


def fresh(model: Any, form: str, sites: str | None = None) -> Piece:
    made = FORMS.make(form, {})
    return attached(model).build(form, made, sites_for(Roles(model), made, sites))


def refused(delta: Delta, tmp_path: Path, base: Any, words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        to_peft(delta, tmp_path / "never", base=base)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "settings",
    [{"trainable_token_indices": []}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}],
    ids=["rows", "saved", "resized"],
)
def test_tokens_that_an_adapter_brings_are_added(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its tokenizer lies beside it: the base, which has no rows for them, gets them, and answers as PEFT's model does."""
    base, words = tmp_path / "base", tiny_tokenizer()
    first = len(words)
    tiny("llama", vocab_size=first).save_pretrained(base)
    words.save_pretrained(base)
    words.add_tokens(["<|one|>", "<|two|>"])
    model = tiny("llama", vocab_size=first)
    model.resize_token_embeddings(first + 2, mean_resizing=False)
    config = peft.LoraConfig(**C, target_modules=["q_proj"], r=2, **settings)
    if "trainable_token_indices" in settings:
        config.trainable_token_indices = [first, first + 1]
    theirs: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.eval()
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    theirs.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, first, 7, first + 1, 9]])
    ours = load(str(base), deltas=[str(tmp_path / "adapter")])
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    delta = import_(tmp_path / "adapter", tmp_path / "delta")
    assert delta.base["new_tokens"] == ["<|one|>", "<|two|>"]
    again = load(str(base), deltas=[str(tmp_path / "delta")])
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    assert verify(tmp_path / "adapter")


@pytest.mark.parametrize("family, leaf", [("llama", "q_proj"), ("bert", "query"), ("roberta", "query")])
def test_an_adapter_that_classifies_names_its_bases_head(family: str, leaf: str, tmp_path: Path) -> None:
    """By name alone: the kind and the number of classes are the adapter's, whatever head its base was saved with."""
    tiny(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    start = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
    )
    theirs: Any = peft.get_peft_model(start, peft.LoraConfig(task_type="SEQ_CLS", target_modules=[leaf], r=2))
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.eval().peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.config.pad_token_id = 0
    ids = tiny_ids()
    assert import_(tmp_path / "adapter", tmp_path / "delta").base["labels"] == [f"LABEL_{n}" for n in range(4)]
    for folder in ("adapter", "delta"):
        ours = load(str(tmp_path / "base"), deltas=[str(tmp_path / folder)])
        ours.config.pad_token_id = 0
        with torch.no_grad():
            assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    assert verify(tmp_path / "adapter") and verify(tmp_path / "delta")


def test_classes_are_called_as_the_base_calls_as_many(tmp_path: Path) -> None:
    start = tiny("bert")
    start.config.id2label, start.config.label2id = {0: "sad", 1: "so", 2: "glad"}, {"sad": 0, "so": 1, "glad": 2}
    start.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    theirs: Any = peft.get_peft_model(start, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    theirs.save_pretrained(tmp_path / "adapter")
    on = base_of(tmp_path / "adapter", tmp_path / "base")
    assert on.settings["labels"] == ["sad", "so", "glad"] and not on.fresh


def test_two_values_of_one_saved_module_are_refused() -> None:
    name, table = "base_model.model.lm_head", torch.ones(3, 2)
    held = {
        f"{name}.weight": table,
        f"{name}.modules_to_save.weight": table,
        f"{name}.original_module.weight": 0 * table,
    }
    assert set(unwrapped(Path("x"), {}, held)[1]) == {f"{name}.weight"}
    held[f"{name}.modules_to_save.weight"] = 2 * table
    with pytest.raises(LuthierError, match="lm_head.weight and .* are two values of one parameter"):
        unwrapped(Path("x"), {}, held)
