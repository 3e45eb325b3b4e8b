"""Mixtures assembled from dense models: what loads, what answers alike, where tokens go, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from luthier.bases.load import quiet as silent
from luthier.errors import LuthierError
from luthier.verbs.moe import moe
from tests.tiny import tiny, tiny_ids, tiny_tokenizer

IDS = tiny_ids(2, 9)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moe")


@cache
def saved(place: Path, family: str, seed: int, **settings: Any) -> str:
    """A tiny dense model with its tokenizer, moved off the common start by a seed."""
    model = tiny(family, **settings)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05 * (seed > 0))
    folder = place / f"{family}-{seed}-{len(settings)}"
    with silent():
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def plan(base: str, experts: list[str], mode: str = "hidden", **more: Any) -> dict[str, Any]:
    words = ["sort these", "once upon", "two and two", "who is it"]
    rows = [{"source_model": e, "positive_prompts": [words[i]]} for i, e in enumerate(experts)]
    return {"base_model": base, "experts": rows, "gate_mode": mode, **more}


def loaded(folder: Path) -> Any:
    with silent():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


SHARED = [{"source_model": "", "positive_prompts": ["anything"], "residual_scale": 0.0}]
KINDS = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen3", {"head_dim": 8}),
    ("qwen2", {}),
    ("llama", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize("layout", ["modules", "fused"])
@pytest.mark.parametrize(
    ("family", "settings"), KINDS, ids=[f"{f}{'-tied' * bool(s.get('tie_word_embeddings'))}" for f, s in KINDS]
)
def test_identical_experts_answer_as_the_dense_model(
    place: Path, tmp_path: Path, family: str, settings: Any, layout: str
) -> None:
    dense = saved(place, family, 1, **settings)
    shared = [SHARED[0] | {"source_model": dense}] if family == "qwen2" else []
    made = moe(plan(dense, [dense] * 3, shared_experts=shared, layout=layout), out=tmp_path / "m", sync=False)
    assert "same model" in made.notes[0] and made.experts == 3
    with silent():
        wanted = logits(AutoModelForCausalLM.from_pretrained(dense).eval())
    assert torch.allclose(logits(loaded(tmp_path / "m")), wanted, atol=2e-5)


def test_experts_and_the_rest_are_where_they_belong(place: Path, tmp_path: Path) -> None:
    base, one, two = (saved(place, "llama", i) for i in range(3))
    moe(plan(base, [one, two]), out=tmp_path / "m", sync=False)
    model = loaded(tmp_path / "m")
    with silent():
        dense = [AutoModelForCausalLM.from_pretrained(f) for f in (base, one, two)]
    held = dict(model.named_parameters())
    for layer in range(2):
        at = f"model.layers.{layer}"
        for e in (0, 1):
            own = dict(dense[e + 1].named_parameters())
            gate_up = torch.cat([own[f"{at}.mlp.gate_proj.weight"], own[f"{at}.mlp.up_proj.weight"]])
            assert torch.equal(held[f"{at}.mlp.experts.gate_up_proj"][e], gate_up)
            assert torch.equal(held[f"{at}.mlp.experts.down_proj"][e], own[f"{at}.mlp.down_proj.weight"])
        name = f"{at}.self_attn.q_proj.weight"
        assert torch.equal(held[name], dict(dense[0].named_parameters())[name])
        assert torch.allclose(held[f"{at}.mlp.gate.weight"].norm(dim=1), torch.ones(2), atol=1e-2)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as f:
        assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in set(f.keys())
    assert {p.name for p in (tmp_path / "m").iterdir()} >= {"tokenizer.json", "config.json", "README.md", "moe.yaml"}


def test_a_prompt_goes_to_its_expert(place: Path, tmp_path: Path) -> None:
    """The router's rows are the base's hidden states of the prompts, so a prompt's last token picks its own expert."""
    base, one, two, three = (saved(place, "llama", i) for i in range(4))
    stated = plan(base, [one, two, three], gate_dtype="float32", experts_per_token=1)
    moe(stated, out=tmp_path / "m", sync=False)
    model, words = loaded(tmp_path / "m"), tiny_tokenizer()
    with silent():
        reader = AutoModelForCausalLM.from_pretrained(base).eval()
    for e, row in enumerate(stated["experts"]):
        ids = words("<s>" + row["positive_prompts"][0], return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            state = reader(ids, output_hidden_states=True).hidden_states[0][0, -1]
        gate = model.model.layers[0].mlp.gate.weight
        assert torch.allclose(gate[e], state / state.norm(), atol=1e-5)
        assert int((gate @ state).argmax()) == e


@pytest.mark.parametrize("mode", ["hidden_avg", "cheap_embed", "random", "uniform_random"])
def test_other_gates(place: Path, tmp_path: Path, mode: str) -> None:
    base, one, two = (saved(place, "llama", i) for i in range(3))
    moe(plan(base, [one, two], mode, seed=3), out=tmp_path / "a", sync=False)
    moe(plan(base, [one, two], mode, seed=3), out=tmp_path / "b", sync=False)
    gates = [loaded(tmp_path / n).model.layers[1].mlp.gate.weight.detach() for n in "ab"]
    assert torch.equal(*gates)
    if mode == "uniform_random":
        assert float(gates[0].abs().max()) <= 32**-0.5 + 1e-6
    if mode == "cheap_embed":
        with silent():
            table = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
        ids = tiny_tokenizer()("<s>sort these", add_special_tokens=False)["input_ids"]
        total = table[ids].sum(0)
        assert torch.allclose(gates[0][0], total / total.norm(), atol=1e-5)


def test_noise_and_scale(place: Path, tmp_path: Path) -> None:
    base, one, two = (saved(place, "llama", i) for i in range(3))
    stated = plan(base, [one, two], "random")
    stated["experts"][1] |= {"noise_scale": 0.01, "residual_scale": 0.5}
    moe(stated, out=tmp_path / "m", sync=False)
    held = dict(loaded(tmp_path / "m").named_parameters())
    with silent():
        own = dict(AutoModelForCausalLM.from_pretrained(two).named_parameters())
    down = held["model.layers.0.mlp.experts.down_proj"][1] / 0.5 - own["model.layers.0.mlp.down_proj.weight"]
    assert 0.007 < float(down.detach().std()) < 0.013


def test_the_fields_ways_of_writing(place: Path, tmp_path: Path) -> None:
    """[""] where gates are drawn, and an architecture by the beginning of its name: the one that fits the models."""
    base, one = saved(place, "qwen3", 0), saved(place, "qwen3", 1)
    rows = [{"source_model": m, "positive_prompts": [""]} for m in (base, one)]
    stated = {"base_model": base, "experts": rows, "gate_mode": "random", "architecture": "qwen"}
    assert moe(stated, out=tmp_path / "m").family == "qwen3_moe"
    with pytest.raises(LuthierError, match="experts.0 has no positive_prompts"):
        moe(stated | {"gate_mode": "hidden"}, out=tmp_path / "n")


def narrower(place: Path) -> str:
    return saved(place, "llama", 1, intermediate_size=24)


BAD = {
    "unknown key": (lambda p: {"experst": []}, "experst: unknown key: did you mean 'experts'"),
    "expert key": (lambda p: {"experts": [{"source_model": "x", "positive": "a"}]}, "experts.0.positive: unknown key"),
    "no prompts": (lambda p: {"experts": [{"source_model": saved(p, "llama", 1)}] * 2}, "no positive_prompts"),
    "same prompts": (
        lambda p: {"experts": [{"source_model": saved(p, "llama", i), "positive_prompts": ["a"]} for i in (1, 2)]},
        "the same prompts",
    ),
    "too few": (lambda p: {"experts_per_token": 3}, "experts_per_token is 3 and there are 2"),
    "mode": (lambda p: {"gate_mode": "hiden"}, "gate_mode"),
    "architecture": (lambda p: {"architecture": "mixtrall"}, "did you mean 'mixtral'"),
    "deepseek": (lambda p: {"architecture": "deepseek"}, "no mixture is called 'deepseek'"),
    "shared": (
        lambda p: {"architecture": "mixtral", "shared_experts": [{"source_model": saved(p, "llama", 1)}]},
        "takes no shared_experts",
    ),
    "families": (lambda p: {"base_model": saved(p, "qwen2", 1)}, "of types llama and qwen2"),
    "no mixture": (lambda p: plan(saved(p, "gemma", 0), [saved(p, "gemma", 0)] * 2), "no mixture is made of gemma"),
    "shape": (lambda p: {"base_model": narrower(p)}, "intermediate_size is 24 in"),
    "nowhere": (lambda p: {"base_model": str(p / "no")}, "no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(place: Path, tmp_path: Path, case: str) -> None:
    base, one, two = (saved(place, "llama", i) for i in range(3))
    change, told = BAD[case]
    with pytest.raises(LuthierError, match=told) as e:
        moe(plan(base, [one, two]) | change(place), out=tmp_path / "m")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_nan_and_existing_output(place: Path, tmp_path: Path) -> None:
    base, one = saved(place, "llama", 0), saved(place, "llama", 1)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with silent():
        model.save_pretrained(tmp_path / "nan")
    with pytest.raises(LuthierError, match="up_proj|w3"):
        moe(plan(base, [one, str(tmp_path / "nan")], "random"), out=tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"nan"}
    with pytest.raises(LuthierError, match="not empty"):
        moe(plan(base, [one, one], "random"), out=tmp_path / "nan")
