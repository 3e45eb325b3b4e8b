"""PEFT folders broken on purpose: each is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.bridge.peft import from_peft, to_peft
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from tests.rooms.test_bridge_peft import CASES, C, written
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = peft.LoraConfig(**C, target_modules=["q_proj", "v_proj"], r=4, modules_to_save=["lm_head"])
    return written(tmp_path, "llama", config)[0]


def config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(LuthierError) as caught:
        from_peft(folder, tiny())
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_renamed_keys(folder: Path) -> None:
    tensors(folder, lambda t: {k.replace("self_attn", "attention"): v for k, v in t.items()})
    fails(folder, "8 of 9 tensors match nothing", "renamed")


def test_no_prefix(folder: Path) -> None:
    tensors(folder, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    fails(folder, "9 of 9 tensors match nothing")


def test_missing_layer(folder: Path) -> None:
    tensors(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in k})
    fails(folder, "1 of 4 targeted modules", "model.layers.1.self_attn.q_proj (B)")


def test_untargeted(folder: Path) -> None:
    config(folder, target_modules=["q_proj"])
    fails(folder, "does not target", "v_proj")


def test_targets_match_nothing(folder: Path) -> None:
    config(folder, target_modules=["query_key_value"])
    fails(folder, "match no module")


def test_saved_module_missing(folder: Path) -> None:
    tensors(folder, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    fails(folder, "lm_head", "save again")


def test_unstated_module(folder: Path) -> None:
    config(folder, modules_to_save=None)
    tensors(folder, lambda t: {k.replace("lm_head", "model.layers.0.mlp.up_proj"): v for k, v in t.items()})
    fails(folder, "up_proj.weight", "does not state")


def test_embedding_of_another_base_under_the_adapter(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "llama", peft.LoraConfig(**C, target_modules=["embed_tokens"]))
    tensors(folder, lambda t: {k: v + 1 if "base_layer" in k else v for k, v in t.items()})
    fails(folder, "model.embed_tokens.weight as it was under the adapter", "give the base it was trained on")


def test_unstated_bias(folder: Path) -> None:
    tensors(
        folder, lambda t: t | {k.replace("A.weight", "B.bias"): v[0].clone() for k, v in t.items() if "lora_A" in k}
    )
    fails(folder, "4 of 13 tensors match nothing")


def test_other_rank(folder: Path) -> None:
    config(folder, r=8)
    fails(folder, "shape (4, 32)", "(8, 32)")


def test_other_base(folder: Path) -> None:
    with pytest.raises(LuthierError, match="shape"):
        from_peft(folder, tiny(hidden_size=64))


def test_truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fails(folder, "truncated or altered", "copy it again")


def test_pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    fails(folder, "pickled", "safe_serialization")


def test_not_finite(folder: Path) -> None:
    tensors(folder, lambda t: {k: torch.full_like(v, torch.nan) if "lora_A" in k else v for k, v in t.items()})
    fails(folder, "not finite")


def test_whole_numbers(folder: Path) -> None:
    tensors(folder, lambda t: {k: v.int() if "lora_A" in k else v for k, v in t.items()})
    fails(folder, "A is of type int32, which no training leaves")


def test_empty_shards(folder: Path) -> None:
    tensors(folder, lambda t: {k: v[:0] if "lora_A" in k else v for k, v in t.items()})
    fails(folder, "empty shards", "ZeRO-3")


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_qalora", True), ("alora_invocation_tokens", [1, 2]), ("layer_replication", [[0, 1]]), ("a_new_field", 3)],
)
def test_fields_that_change_the_meaning(folder: Path, field: str, value: object) -> None:
    config(folder, **{field: value})
    fails(folder, f"'{field}'", "merge_and_unload")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_starts_that_change_the_base(folder: Path, start: str) -> None:
    config(folder, init_lora_weights=start)
    fails(folder, start, "path_initial_model_for_weight_conversion")


def test_neutral_fields_pass(folder: Path) -> None:
    config(folder, a_new_field=None, another=False, peft_version="99.0", init_lora_weights="gaussian")
    assert from_peft(folder, tiny()).count()


def test_unknown_type(folder: Path) -> None:
    config(folder, peft_type="BOFT")
    fails(folder, "BOFT", "LORA")


def test_experts_half_saved(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "qwen3_moe", CASES["lora-experts"][1]())
    tensors(folder, lambda t: {k: v for k, v in t.items() if "layers.1.mlp.experts.lora_A" not in k})
    with pytest.raises(
        LuthierError, match=r"1 of 4 targeted parameters lack their tensors: model.layers.1.mlp.experts"
    ):
        from_peft(folder, tiny("qwen3_moe"))
    config(folder, target_parameters=["experts.w1"])
    with pytest.raises(LuthierError, match="match no parameter of base"):
        from_peft(folder, tiny("qwen3_moe"))
    config(folder, target_parameters=["mlp.gate.weight"])
    with pytest.raises(LuthierError, match="reach model.layers.0.mlp.gate.weight, which is no stack of experts"):
        from_peft(folder, tiny("qwen3_moe"))


def test_entries_outside_of_the_weight(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "llama", CASES["shira"][1]())
    tensors(folder, lambda t: {k: v + 99 if "indices" in k else v for k, v in t.items()})
    fails(folder, "shira_indices do not lie in a weight [32, 32]")


def test_prompt_without_its_length(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "llama", CASES["prompt"][1]())
    config(folder, num_virtual_tokens=None)
    fails(folder, "'num_virtual_tokens' is 'None'")
    config(folder, num_virtual_tokens=9)
    fails(folder, "prompt_embeddings is (4, 32)", "(9, 32)")


def test_broken_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    fails(folder, "not JSON")


def test_tied_head_saved_apart(tmp_path: Path) -> None:
    base = {"tie_word_embeddings": True}
    made = peft.LoraConfig(**C, target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder, _ = written(tmp_path, "llama", made, **base)
    with pytest.raises(LuthierError, match="tie_word_embeddings: false"):
        from_peft(folder, tiny(**base))


def test_what_peft_cannot_hold(folder: Path, tmp_path: Path) -> None:
    from luthier.attach import attached
    from luthier.attach.sites import sites_for
    from luthier.bases.roles import Roles

    model = tiny()
    form = FORMS.make("adapter", {})
    piece = attached(model).build("adapter", form, sites_for(Roles(model), form))
    with pytest.raises(LuthierError, match="PEFT has no form for adapter"):
        to_peft(Delta([piece]), tmp_path / "out")
    both = Delta([piece]) + from_peft(folder, tiny())
    with pytest.raises(LuthierError, match="in one adapter"):
        to_peft(both, tmp_path / "out")
    with pytest.raises(LuthierError, match="state the base"):
        to_peft(from_peft(folder, tiny()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LuthierError, match="not empty"):
        to_peft(from_peft(folder, tiny()), folder, base=tiny())
