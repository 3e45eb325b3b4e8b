"""luthier merge: which tensors come out, of which type, from which layers; deltas to deltas; bad input; little memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier.algebra import driver, loads
from luthier.algebra.driver import run
from luthier.algebra.jobs import Method, make_jobs
from luthier.algebra.layout import lay_out
from luthier.algebra.outcome import TEMPLATES
from luthier.algebra.sources import Checkpoint, Tuned, mark_of, open_source
from luthier.algebra.writer import ShardedFile, Spec, TensorFile
from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.load import load_base, quiet
from luthier.bridge.hf import export_hf
from luthier.bridge.proof import prove
from luthier.bridge.target import Target, logits_of, target
from luthier.bridge.tensors import read_places
from luthier.cli import main
from luthier.delta import FORMS, MERGES, Stack
from luthier.delta.artefact import Delta
from luthier.delta.folder import new_folder
from luthier.errors import LuthierError
from luthier.merging.lines import LiNeS
from luthier.plan.merge import Where, load_merge, resolve
from luthier.verbs.compress import compress
from luthier.verbs.diff import diff
from luthier.verbs.merge import bytes_of, merge
from tests.tiny import tiny, tiny_ids, tiny_tokenizer


def checkpoint(folder: Path, seed: int = 0, family: str = "llama", dtype: Any = torch.float32, **settings: Any) -> Path:
    """A tiny model on disk; seeds above 0 move every number a little."""
    model = tiny(family, **settings)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if seed:
                p.add_(0.02 * torch.randn(p.shape, generator=g))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("shelf")
    rows = {"base": 0, "a": 1, "b": 2, "c": 3}
    out = {name: checkpoint(at / name, seed) for name, seed in rows.items()}
    out["a16"] = checkpoint(at / "a16", 1, dtype=torch.bfloat16)
    out["tied"] = checkpoint(at / "tied", 4, tie_word_embeddings=True)
    out["deep"] = checkpoint(at / "deep", 5, num_hidden_layers=4)
    out["gpt2"] = checkpoint(at / "gpt2", 1, "gpt2")
    out["copy"] = checkpoint(at / "copy", 1)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def reread(folder: Path) -> Any:
    """By plain transformers, without a missing or unexpected key."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


# -- the plan


def test_parameters_are_found_by_filter_depth_and_scope() -> None:
    rows = [{"filter": "attn", "value": [0.0, 1.0]}, {"filter": "mlp", "value": 0.3}, {"value": 0.5}]
    assert resolve("t", [{"t": rows}], Where("x.attn.w", 0.25)) == 0.25
    assert resolve("t", [{"t": rows}], Where("x.mlp.w", 0.25)) == 0.3
    assert resolve("t", [{"t": rows}], Where("norm")) == 0.5
    assert resolve("t", [{"t": rows[:1]}, {"t": 0.9}], Where("norm")) == 0.9
    assert resolve("t", [None, {"u": 1}], Where("norm")) is None
    assert resolve("t", [{"t": [0, 10, 40]}], Where("x", 0.75)) == 25
    assert resolve("t", [{"t": [True, False]}], Where("x", 0.5)) is True
    assert resolve("t", [{"t": ["a", "b", "c"]}], Where("x", 1.0)) == "c"
    assert resolve("t", [{"t": {"value": 2, "filter": "*"}}], Where("x")) == 2


def test_a_field_file_and_the_short_form_are_one_plan() -> None:
    field = load_merge(
        {
            "merge_method": "ties",
            "base_model": "X",
            "models": [
                {"model": "A", "parameters": {"weight": 0.3}},
                {"model": "B+lora", "parameters": {"weight": 0.7}},
            ],
            "parameters": {"density": 0.5},
            "tokenizer_source": "union",
            "dtype": "bfloat16",
        }
    )
    short = load_merge(
        {
            "method": "ties", "base": "X", "models": ["A", "B+lora"], "weights": [0.3, 0.7], "density": 0.5,
            "tokenizer": {"source": "union"}, "dtype": "bfloat16",
        }
    )  # fmt: skip
    assert field.field_file and not short.field_file
    assert field.model_copy(update={"field_file": False}) == short
    assert [str(r) for r in short.refs()] == ["X", "A", "B+lora"] and short.refs()[2].lora == "lora"


# -- tensors, layers, configs


def test_linear_by_hand_and_read_by_transformers(shelf: dict[str, Path], tmp_path: Path) -> None:
    made = merge(
        {"method": "linear", "models": [str(shelf["a"]), str(shelf["b"])], "weights": [1, 3]}, out=tmp_path / "m"
    )
    a, b, m = (tensors(f) for f in (shelf["a"], shelf["b"], tmp_path / "m"))
    assert made.kind == "checkpoint" and made.tensors == len(m) == len(a) and m.keys() == a.keys()
    for name in m:
        assert torch.allclose(m[name], 0.25 * a[name] + 0.75 * b[name], atol=1e-6)
    reread(tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == tiny_tokenizer().get_vocab()
    assert (tmp_path / "m" / "generation_config.json").exists()
    assert merge(tmp_path / "m" / "merge.yaml", out=tmp_path / "again").tensors == made.tensors
    assert all(torch.equal(t, m[n]) for n, t in tensors(tmp_path / "again").items())


def test_layers_are_stacked_and_the_config_says_how_many(shelf: dict[str, Path], tmp_path: Path) -> None:
    plan = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(shelf["deep"]), "layer_range": [0, 3]}]},
            {"sources": [{"model": str(shelf["a"]), "layer_range": [1, 2], "parameters": {"scale": [
                {"filter": "o_proj", "value": 0.0}, {"value": 1.0}]}}]},
        ],
        "dtype": "float32",
    }  # fmt: skip
    merge(plan, out=tmp_path / "m")
    m, deep, a = tensors(tmp_path / "m"), tensors(shelf["deep"]), tensors(shelf["a"])
    assert torch.equal(m["model.layers.2.mlp.up_proj.weight"], deep["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(m["model.layers.3.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])
    assert not m["model.layers.3.self_attn.o_proj.weight"].any()
    assert torch.equal(m["model.embed_tokens.weight"], deep["model.embed_tokens.weight"])
    assert torch.equal(m["lm_head.weight"], a["lm_head.weight"])
    assert reread(tmp_path / "m").config.num_hidden_layers == 4


def test_lists_of_layers_follow_the_layers(tmp_path: Path) -> None:
    deep = checkpoint(tmp_path / "q", 1, "qwen2", num_hidden_layers=3)
    config = json.loads((deep / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (deep / "config.json").write_text(json.dumps(config))
    source = {"model": str(deep)}
    parts = [{"sources": [source | {"layer_range": r}]} for r in ([0, 2], [1, 3])]
    merge({"method": "passthrough", "slices": parts}, out=tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert written["num_hidden_layers"] == 4


def test_a_head_that_one_model_ties_is_written_and_the_config_says_so(shelf: dict[str, Path], tmp_path: Path) -> None:
    plan = {"method": "linear", "models": [str(shelf["tied"]), str(shelf["a"])], "weight": 0.5}
    merge(plan, out=tmp_path / "m")
    m, tied, a = tensors(tmp_path / "m"), tensors(shelf["tied"]), tensors(shelf["a"])
    want = (tied["model.embed_tokens.weight"] + a["lm_head.weight"]) / 2
    assert torch.allclose(m["lm_head.weight"], want, atol=1e-6)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    merge(plan | {"models": [str(shelf["tied"])] * 1}, out=tmp_path / "t")
    assert "lm_head.weight" not in tensors(tmp_path / "t") and reread(tmp_path / "t").config.tie_word_embeddings


@pytest.mark.parametrize(
    ("stated", "arithmetic", "kind"),
    [
        ({}, "a16", torch.float32),
        ({"dtype": "bfloat16"}, "a", torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "float16"}, "a", torch.float16),
    ],
)
def test_types(
    stated: dict[str, str], arithmetic: str, kind: torch.dtype, shelf: dict[str, Path], tmp_path: Path
) -> None:
    merge(
        {"method": "linear", "models": [str(shelf[arithmetic]), str(shelf["b"])], "weight": 1, **stated},
        out=tmp_path / "m",
    )
    assert {t.dtype for t in tensors(tmp_path / "m").values()} == {kind}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(kind)[6:]


def test_pieces_give_what_whole_tensors_give(
    shelf: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"method": "linear", "models": [str(shelf["a"]), str(shelf["a16"])], "weights": [0.3, 0.9]}
    merge(plan, out=tmp_path / "whole")
    monkeypatch.setattr(loads, "PIECE", 100)
    merge(plan | {"shard": "20KB"}, out=tmp_path / "pieces")
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[n], pieces[n]) for n in whole)
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 2
    reread(tmp_path / "pieces")


def test_draws_depend_on_the_seed_and_not_on_the_order_of_work(shelf: dict[str, Path], tmp_path: Path) -> None:
    plan = {
        "method": "dare_ties", "base": str(shelf["base"]), "models": [str(shelf["a"]), str(shelf["b"])],
        "weight": 0.5, "density": 0.5,
    }  # fmt: skip
    for name, extra in {"one": {}, "two": {"shard": "20KB"}, "other": {"seed": 1}}.items():
        merge(plan | extra, out=tmp_path / name)
    one, two, other = (tensors(tmp_path / n) for n in ("one", "two", "other"))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_two_stacks_of_layers(tmp_path: Path) -> None:
    one, two = (checkpoint(tmp_path / str(i), i, "t5") for i in (1, 2))
    merge({"method": "linear", "models": [str(one), str(two)], "weight": 0.5}, out=tmp_path / "m")
    a, b, m = (tensors(f) for f in (one, two, tmp_path / "m"))
    assert m.keys() == a.keys() and all(torch.allclose(m[n], (a[n] + b[n]) / 2, atol=1e-6) for n in m)


# -- deltas


def on_disk(base: Path) -> Target:
    return target(load_base(str(base)))


def delta_on(base: Target, folder: Path, seed: int, form: str = "lora", sites: Any = None, **settings: Any) -> Path:
    kind = FORMS.make(form, settings)
    piece = attached(base.model).build(form, kind, sites_for(base.roles, kind, sites))
    attached(base.model).detach()
    g = torch.Generator().manual_seed(seed)
    for numbers in piece.p.values():
        for name, value in numbers.items():
            numbers[name] = value + 0.05 * torch.randn(value.shape, generator=g)
    return prove(Delta([piece]), base).save(folder)


@pytest.fixture(scope="module")
def deltas(shelf: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at, base = tmp_path_factory.mktemp("deltas"), on_disk(shelf["base"])
    return {
        "base": shelf["base"],
        "x": delta_on(base, at / "x", 1, rank=2),
        "y": delta_on(base, at / "y", 2, rank=3, sites=["attn.q", "ffn.down"]),
        "z": delta_on(base, at / "z", 3, "sparse"),
        "w": delta_on(base, at / "w", 1, rank=4),
        "dora": delta_on(base, at / "dora", 4, "dora", rank=2),
        "ia3": delta_on(base, at / "ia3", 5, "ia3"),
        "gpt2": delta_on(on_disk(shelf["gpt2"]), at / "gpt2", 5, rank=2),
        "tied": delta_on(on_disk(shelf["tied"]), at / "tied", 6, rank=2, sites=["embed"]),
        "other": delta_on(on_disk(shelf["a"]), at / "other", 1, rank=2),
    }


@pytest.mark.parametrize("name", ["x", "z", "dora", "ia3", "gpt2", "tied"])
def test_a_base_with_a_delta_is_what_export_writes(
    name: str, deltas: dict[str, Path], shelf: dict[str, Path], tmp_path: Path
) -> None:
    base = {"gpt2": shelf["gpt2"], "tied": shelf["tied"]}.get(name, shelf["base"])
    export_hf(on_disk(base), Delta.load(deltas[name]), tmp_path / "exported")
    merge({"method": "passthrough", "models": [str(deltas[name])], "output": "checkpoint"}, out=tmp_path / "m")
    want, got = tensors(tmp_path / "exported"), tensors(tmp_path / "m")
    assert want.keys() == got.keys()
    assert max(float((want[n] - got[n]).abs().max()) for n in want) < 1e-6
    assert torch.allclose(
        logits_of(reread(tmp_path / "m"))(tiny_ids()), logits_of(reread(tmp_path / "exported"))(tiny_ids()), atol=1e-5
    )


def test_pieces_of_a_base_with_a_delta(
    deltas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {
        "method": "linear",
        "models": [str(deltas["x"]), str(deltas["z"])],
        "weights": [0.3, 0.7],
        "output": "checkpoint",
    }
    merge(plan, out=tmp_path / "whole")
    monkeypatch.setattr(loads, "PIECE", 100)
    merge(plan, out=tmp_path / "pieces")
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    assert all(torch.equal(whole[n], pieces[n]) for n in whole)


def test_low_rank_deltas_become_one_of_added_ranks(deltas: dict[str, Path], tmp_path: Path) -> None:
    plan = {
        "method": "task_arithmetic",
        "models": [str(deltas["x"]), str(deltas["y"])],
        "weights": [0.5, -1.0],
        "lambda": 2.0,
    }
    made = merge(plan, out=tmp_path / "d")
    merge(plan | {"output": "checkpoint"}, out=tmp_path / "m")
    delta = Delta.load(tmp_path / "d")
    assert made.kind == "delta" and {FORMS.name_of(type(p.form)) for p in delta.pieces} == {"lora"}
    assert {p.p[k]["A"].shape[0] for p in delta.pieces for k in p.sites if k.endswith("q_proj")} == {5}
    base = on_disk(deltas["base"])
    delta.apply(base.model)
    got = logits_of(base.model)(tiny_ids())
    assert torch.allclose(got, logits_of(reread(tmp_path / "m"))(tiny_ids()), atol=1e-4)
    assert delta.probes and delta.seals and delta.lineage["made_by"] == "merge task_arithmetic"
    merge(plan | {"rank": 2}, out=tmp_path / "trimmed")
    assert all(n["A"].shape[0] == 2 for p in Delta.load(tmp_path / "trimmed").pieces for n in p.p.values())


@pytest.mark.parametrize("method", ["ties", "linear", "breadcrumbs"])
def test_deltas_of_any_form_become_an_exact_one(method: str, deltas: dict[str, Path], tmp_path: Path) -> None:
    plan = {"method": method, "models": [str(deltas["x"]), str(deltas["z"])], "weight": 0.5}
    merge(plan, out=tmp_path / "d")
    merge(plan | {"output": "checkpoint"}, out=tmp_path / "m")
    base = on_disk(deltas["base"])
    handle = Delta.load(tmp_path / "d").apply(base.model)
    want = tensors(tmp_path / "m")
    got = dict(base.model.named_parameters())
    assert handle.edits and all(torch.equal(got[n].detach(), want[n]) for n in want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("base", "more"),
    [("base", {}), ("a16", {}), ("base", {"use_dora": True}), ("a16", {"modules_to_save": ["lm_head"]})],
    ids=["float32", "bfloat16", "dora", "saved whole"],
)
def test_peft_folders_merge_as_peft_merges(
    base: str, more: dict[str, Any], shelf: dict[str, Path], tmp_path: Path
) -> None:
    """Also in 16 bits, where the sum is rounded once; what needs numbers of the base gets them."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(shelf[base])
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], **more)
    tuned, g = peft.get_peft_model(model, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "lora_" in n or "modules_to_save" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    tuned.save_pretrained(tmp_path / "adapter")
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{shelf[base]}+{tmp_path / 'adapter'}"}]},
        out=tmp_path / "m",
    )
    want = tuned.merge_and_unload().state_dict()
    got = tensors(tmp_path / "m")
    assert max(float((want[n].float() - t.float()).abs().max()) for n, t in got.items()) < 1e-6
    assert any(not torch.equal(t, tensors(shelf[base])[n]) for n, t in got.items())


def test_a_search_asks_for_scores_and_never_ends_below_its_best(deltas: dict[str, Path], tmp_path: Path) -> None:
    records = tmp_path / "r.jsonl"
    records.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("hello there", "good day to you", "so it goes"))
    )
    plan = {
        "method": "greedy_soup", "models": [str(deltas["x"]), str(deltas["z"])],
        "evaluate": {"target": [{"source": {"path": str(records)}, "metric": "loss"}], "items": 3},
    }  # fmt: skip
    made = merge(plan, out=tmp_path / "soup")
    assert set(made.each["weight"]) <= {0.0, 1.0} and sum(made.each["weight"]) >= 1
    assert Delta.load(tmp_path / "soup").lineage["found"] == made.each
    with pytest.raises(LuthierError, match="evaluate"):
        merge({k: v for k, v in plan.items() if k != "evaluate"}, out=tmp_path / "none")


def test_a_grid_may_hold_the_base(deltas: dict[str, Path], tmp_path: Path) -> None:
    """Weights of 0 alone are scored as the base's, and are an error only where nothing is better."""
    records = tmp_path / "r.jsonl"
    records.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("hello there", "good day to you")))
    check = {"target": [{"source": {"path": str(records)}, "metric": "loss"}], "items": 2}
    plan = {"method": "deme", "models": [str(deltas["x"]), str(deltas["z"])], "evaluate": check}
    asked: list[bool] = []

    def scored(delta: Any, *args: Any) -> float:
        delta.apply(args[0].model)
        delta.detach(args[0].model)
        asked.append(not delta.pieces)
        return float(len(delta.pieces))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["luthier.verbs.merge"], "_attached_score", scored)
        made = merge(plan | {"lowest": 0.0, "points": 2}, out=tmp_path / "d")
    assert asked == [True, False, False, False] and sum(made.each["weight"]) > 0
    with pytest.raises(LuthierError, match="equals the base"):
        merge(plan | {"lowest": 0.0, "highest": 0.0, "points": 1}, out=tmp_path / "none")


def test_factors_are_merged_and_the_rest_is_averaged(deltas: dict[str, Path], tmp_path: Path) -> None:
    base, folders = on_disk(deltas["base"]), []
    for seed in (1, 2):
        parts = [
            delta_on(base, tmp_path / f"{name}{seed}", 10 * seed + len(name), form, sites, **settings)
            for name, form, sites, settings in (
                ("l", "lora", ["attn.q"], {"rank": 2}),
                ("ff", "sparse", ["ffn.down"], {}),
            )
        ]
        folders.append(str(prove(Delta.load(parts[0]) + Delta.load(parts[1]), base).save(tmp_path / f"both{seed}")))
    merge({"method": "robust_merge", "models": folders}, out=tmp_path / "m")
    merge({"method": "linear", "models": folders, "output": "checkpoint"}, out=tmp_path / "mean")
    found, mean, model = Delta.load(tmp_path / "m"), tensors(tmp_path / "mean"), on_disk(deltas["base"]).model
    assert [FORMS.name_of(type(p.form)) for p in found.pieces] == ["lora", "entries"]
    found.apply(model)
    got = {n: p.detach() for n, p in model.named_parameters()}
    for name in (n for n in got if "down_proj" in n):
        assert torch.equal(got[name], mean[name]) and not torch.equal(got[name], tensors(deltas["base"])[name])
    clash = Delta.load(Path(folders[0])) + Delta.load(delta_on(base, tmp_path / "q", 9, "sparse", ["attn.q"]))
    prove(clash, base).save(tmp_path / "clash")
    with pytest.raises(
        LuthierError, match=r"robust_merge merges LoRA deltas: at .*q_proj.weight, piece '.*' is of form"
    ):
        merge({"method": "robust_merge", "models": [str(tmp_path / "clash"), folders[1]]}, out=tmp_path / "no")


@pytest.mark.parametrize("output", ["checkpoint", "delta"])
def test_the_first_pass_draws_what_the_second_draws(
    output: str, deltas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: dict[str, dict[str, int]] = {"measure": {}, "merge": {}}

    def spied(what: str) -> None:
        plain = getattr(LiNeS, what)

        def spy(self: LiNeS, t: Stack) -> Any:
            assert t.generator is not None
            seeds[what][t.name] = t.generator.initial_seed()
            return plain(self, t)

        monkeypatch.setattr(LiNeS, what, spy)

    spied("measure")
    spied("merge")
    plan = {"method": "lines", "of": "dare_linear", "density": 0.5, "seed": 3, "output": output}
    merge(plan | {"models": [str(deltas["x"]), str(deltas["z"])]}, out=tmp_path / "m")
    assert seeds["measure"] and seeds["measure"] == seeds["merge"]


def test_the_fingerprint_is_read_off_the_files(shelf: dict[str, Path]) -> None:
    source = open_source(str(shelf["tied"]))
    assert isinstance(source, Checkpoint)
    assert mark_of(source, "float32") == load_base(str(shelf["tied"])).fingerprint


@pytest.mark.parametrize("output", ["checkpoint", "delta"])
def test_stocks_ratio_is_told_layer_by_layer(output: str, deltas: dict[str, Path], tmp_path: Path) -> None:
    """Model Stock's t: every layer's in the outcome, mean and range among the notes."""
    plan = {"method": "model_stock", "models": [str(deltas["x"]), str(deltas["w"])], "output": output}
    made = merge(plan, out=tmp_path / "m")
    t = made.layers["t"]
    assert {"0", "1"} <= set(t) and max(t.values()) <= 1 and t["0"] != t["1"]
    if output == "checkpoint":
        held = json.loads((tmp_path / "m" / "merge.json").read_text())
        assert held["layers"] == made.layers and held["notes"] == made.notes and "embed" in t
    else:
        assert Delta.load(tmp_path / "m").lineage["layers"] == made.layers
    (line,) = [n for n in made.notes if n.startswith("t: mean")]
    assert re.fullmatch(r"t: mean [\d.e-]+ \([\d.e-]+ to [\d.e-]+\)", line)


# -- bad input


def altered(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    table = tensors(folder)
    change(table)
    save_file(table, out / "model.safetensors", {"format": "pt"})
    return str(out)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def bad(kind: str, s: dict[str, Path], d: dict[str, Path], tmp: Path) -> tuple[list[str], str]:
    """Arguments of the command, and what the line must say."""
    a, b, base = str(s["a"]), str(s["b"]), str(s["base"])
    norm = "model.norm.weight"
    two = [a, b, "--method"]
    if kind == "nan":
        bad_one = altered(s["b"], tmp / "nan", lambda t: t[norm].view(-1)[3:4].fill_(float("nan")))
        return [a, bad_one, "--method", "linear", "weight=1"], rf"{norm} holds NaN"
    if kind == "missing":
        return [a, altered(s["b"], tmp / "x", lambda t: t.__delitem__(norm)), "-m", "linear"], f"lacks {norm}"
    if kind == "misshapen":

        def cut(t: dict[str, torch.Tensor]) -> None:
            t[norm] = t[norm][:-1].clone()

        return [a, altered(s["b"], tmp / "x", cut), "-m", "linear"], f"{norm} differs in shape"
    if kind == "vocabulary":

        def grown(t: dict[str, torch.Tensor]) -> None:
            for n in ("model.embed_tokens.weight", "lm_head.weight"):
                t[n] = torch.cat([t[n], t[n][:2]])

        return [a, altered(s["b"], tmp / "x", grown), "-m", "linear"], "tokenizer_source"
    if kind == "tokens":
        other = altered(s["b"], tmp / "x", lambda t: None)
        table = json.loads((tmp / "x" / "tokenizer.json").read_text())
        words = table["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (tmp / "x" / "tokenizer.json").write_text(json.dumps(table))
        return [a, other, "-m", "linear"], "another tokenizer"
    if kind == "cut":
        other = altered(s["b"], tmp / "x", lambda t: None)
        _cut(tmp / "x" / "model.safetensors")
        return [a, other, "-m", "linear"], "truncated"
    if kind == "pickle":
        (tmp / "x").mkdir()
        (tmp / "x" / "config.json").write_text((s["a"] / "config.json").read_text())
        (tmp / "x" / "pytorch_model.bin").write_bytes(b"\x80")
        return [a, str(tmp / "x"), "-m", "linear"], "pickle"
    if kind == "integers differ":

        def stamped(v: int) -> Callable[[dict[str, torch.Tensor]], None]:
            return lambda t: t.update({"model.steps": torch.tensor([v])})

        return [altered(s[n], tmp / n, stamped(i)) for i, n in enumerate("ab")] + [
            "-m",
            "linear",
        ], "whole numbers that differ"
    if kind == "bases":
        return [
            str(d["x"]),
            str(d["other"]),
            "-m",
            "ties",
            "density=0.5",
            "weight=1",
        ], r"different bases \(.*:.*:.*;.*:.*:"
    if kind == "base":
        return [str(d["x"]), "-m", "ties", "--base", a, "density=0.5", "weight=1"], r"another base \(.*:.*\) than .*:"
    if kind == "family":
        return [a, str(s["gpt2"]), "-m", "linear"], "one architecture"
    if kind == "layers":
        return [a, str(s["deep"]), "-m", "linear"], "a has 2 layers, .*deep has 4 layers: merge models of equally many"
    if kind == "columns":

        def widened(t: dict[str, torch.Tensor]) -> None:
            t["model.embed_tokens.weight"] = t["model.embed_tokens.weight"].repeat(1, 2)

        wide = altered(s["b"], tmp / "x", widened)
        return [a, wide, "-m", "linear"], r"differs in shape: .*\[128, 64\]: merge models of one architecture and width"
    if kind == "inside a source":
        return [str(s["copy"]), b, "-m", "linear", "--out", str(s["copy"] / "bad")], "bad lies in .*copy, which is read"
    if kind in ("delta cut", "delta altered", "probes cut"):
        folder = Path(shutil.copytree(d["x"], tmp / "x"))
        file = folder / ("probes.safetensors" if kind == "probes cut" else "delta.safetensors")
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if kind == "delta altered" else data[:-100])
        to = "delta" if kind == "delta cut" else "checkpoint"
        return [str(folder), str(d["y"]), "-m", "linear", f"output={to}"], rf"{file.name} is truncated or altered"
    if kind == "no vocabulary":
        other = altered(s["b"], tmp / "x", lambda t: None)
        (tmp / "x" / "tokenizer.json").write_text("{}")
        return [a, other, "-m", "linear"], "tokenizer.json holds no vocabulary"
    table: dict[str, tuple[list[str], str]] = {
        "no shard": ([*two, "linear", "shard=-5GB"], "shard: '-5GB' is less than a byte"),
        "endless shard": ([*two, "linear", "shard=infGB"], "shard: 'infGB' is no size"),
        "empty gradient": ([*two, "linear", "weight=[]"], "weight: an empty list"),
        "template of a delta": (
            [str(d["x"]), str(d["y"]), "-m", "linear", "chat_template=chatml"],
            "chat_template is a checkpoint's.*output=checkpoint",
        ),
        "tokenizer of a delta": (
            [str(d["x"]), str(d["y"]), "-m", "linear", "tokenizer_source=base"],
            "tokenizer is a checkpoint's.*output=checkpoint",
        ),
        "sum of nothing": (
            [*two, "task_arithmetic", "--base", base, "weights=[1,-1]", "normalize=true"],
            "task_arithmetic: the weights .* add up to 0.*set normalize: false",
        ),
        "density of nothing": ([*two, "dare_ties", "--base", base, "density=0"], "a density of 0 leaves nothing"),
        "selection of nothing": ([*two, "sce", "--base", base, "select_topk=0"], "a select_topk of 0 leaves nothing"),
        "epsilon turned": ([*two, "della", "--base", base, "density=0.5", "epsilon=-0.1"], "an epsilon below 0"),
        "beyond": ([a, "-m", "slerp", "--base", base, "t=[0.5,1.5]"], r"t is not between 0 \(the base\) and 1"),
        "arc of nothing": ([*two, "nuslerp", "weights=[1,-1]"], "nuslerp: the weights .* cancel"),
        "no base": ([*two, "ties", "weight=1", "density=0.5"], "needs the base"),
        "weights": ([*two, "linear", "-w", "1", "-w", "-1"], "add up to 0"),
        "weight count": ([*two, "linear", "-w", "1"], "one number for each"),
        "density": ([*two, "ties", "--base", base, "weight=1", "density=1.5"], "density"),
        "missing weight": ([*two, "slerp", "--base", base], r"t is missing|models besides the base"),
        "method": ([*two, "tise"], "did you mean 'ties'"),
        "parameter": ([*two, "linear", "wieght=1"], "did you mean 'weight'"),
        "too many": ([a, b, str(s["c"]), "-m", "slerp", "--base", base, "t=0.5"], "slerp takes 1 models"),
        "no model": ([a, str(tmp / "nowhere"), "-m", "linear"], "no such folder"),
        "no plan": ([str(tmp / "nowhere.yaml")], "no such plan"),
        "twice": ([a, a, "-m", "linear"], "named twice"),
        "nothing": (["-m", "linear"], "nothing to merge"),
        "no method": ([a, b], "which merge"),
        "dtype": ([*two, "linear", "dtype=floot16"], "dtype"),
        "overflow": ([*two, "linear", "normalize=false", "weight=1e30", "out_dtype=float16"], "not finite in float16"),
        "rank": ([*two, "linear", "rank=4"], "rank trims"),
        "delta of checkpoints": ([*two, "linear", "output=delta"], "luthier diff"),
        "text": ([*two, "linear", "weight=much"], "must be a number"),
        "form": ([str(d["x"]), str(d["z"]), "-m", "task_arithmetic", "rank=2"], "full rank"),
        "delta as base": (
            [str(d["x"]), "-m", "slerp", "--base", str(d["y"]), "t=0.5"],
            "is a delta.*output=checkpoint",
        ),
    }
    return table[kind]


KINDS = (
    [
        "nan",
        "missing",
        "misshapen",
        "vocabulary",
        "tokens",
        "cut",
        "pickle",
        "integers differ",
        "bases",
        "base",
        "family",
    ]
    + ["layers", "no base", "weights", "weight count", "density", "missing weight", "method", "parameter", "too many"]
    + [
        "no model",
        "no plan",
        "twice",
        "nothing",
        "no method",
        "dtype",
        "overflow",
        "rank",
        "delta of checkpoints",
        "text",
    ]
    + ["form", "delta as base", "columns", "inside a source", "sum of nothing", "arc of nothing"]
    + ["delta cut", "delta altered", "probes cut", "no vocabulary", "no shard", "endless shard", "empty gradient"]
    + [
        "template of a delta",
        "tokenizer of a delta",
        "density of nothing",
        "selection of nothing",
        "epsilon turned",
        "beyond",
    ]
)


def digest(folders: dict[str, Path]) -> str:
    h = hashlib.sha256()
    for folder in folders.values():
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                h.update(f"{file}".encode() + file.read_bytes())
    return h.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line_and_leaves_nothing(
    kind: str, shelf: dict[str, Path], deltas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, says = bad(kind, shelf, deltas, tmp_path)
    before, out = digest(shelf | deltas), tmp_path / "place" / "out"
    out.parent.mkdir()
    with pytest.raises(SystemExit) as left:
        main(["merge", *args, *([] if "--out" in args else ["--out", str(out)])])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert re.search(says, said), said
    assert not list(out.parent.iterdir()), "something half-written was left"
    assert digest(shelf | deltas) == before


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"merge_method": "linear", "base_model": "x", "models": ["a"], "paramters": {}}, "did you mean 'parameters'"),
        ({"merge_method": "linear"}, "models, slices and modules"),
        ({"merge_method": "linear", "models": [{"model": "a", "parameter": {}}]}, "did you mean 'parameters'"),
        ({"merge_method": "slerp", "slices": [{"sources": [{"model": "a"}]}]}, "layer_range is missing"),
        ({"merge_method": "linear", "models": [{"model": "a+b+c"}]}, "is no model"),
        ({"merge_method": "linear", "models": [{"model": "a"}], "parameters": [1]}, "parameters: give a table"),
        ({"merge_method": "linear", "models": [{"model": "a"}], "tokenizer_source": "base", "tokenizer": {}}, ""),
    ],
)
def test_a_wrong_plan_names_the_key(plan: dict[str, Any], says: str, tmp_path: Path) -> None:
    if not says:
        assert load_merge(plan).tokenizer is not None
        return
    file = tmp_path / "plan.yml"
    file.write_text(yaml.safe_dump(plan))
    with pytest.raises(LuthierError, match=says) as found:
        load_merge(file)
    assert str(file) in str(found.value) and "\n" not in str(found.value)


def test_a_setting_is_named_as_it_is_written_with_all_that_it_may_be() -> None:
    for key, said in (("lambda_", "setting 'lambda': .*number"), ("rescale", "valid boolean.*; or .*'by_density'")):
        with pytest.raises(LuthierError, match=said):
            MERGES.make("dare_linear", {key: "much"})


@pytest.mark.parametrize(
    ("method", "stated", "says"),
    [
        ("linear", {"weight": float("nan")}, "weight of .* is nan: state a finite number"),
        ("linear", {"weight": [{"filter": 3, "value": 1}, {"value": 1}]}, "as text, got 3: put it in quotes"),
        ("nearswap", {"t": -1}, "t must be at least 0"),
        ("karcher", {"max_iter": -1}, "max_iter must be at least 1"),
    ],
)
def test_a_wrong_value_is_named(
    method: str, stated: dict[str, Any], says: str, shelf: dict[str, Path], tmp_path: Path
) -> None:
    plan = {"method": method, "models": [str(shelf["a"]), str(shelf["b"])], **stated}
    if method == "nearswap":
        plan |= {"base": str(shelf["a"]), "models": [str(shelf["b"])]}
    with pytest.raises(LuthierError, match=says):
        merge(plan, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"normalize": True}}, "add up to 0"),
        ({"merge_method": "nuslerp"}, "cancel, so that t is 0.5"),
        (
            {"merge_method": "lines", "base_model": "base", "parameters": {"normalize": True, "alpha": 1.0}},
            "add up to 0",
        ),
    ],
)
def test_a_field_file_whose_weights_cancel_is_merged_with_a_note(
    plan: dict[str, Any], told: str, shelf: dict[str, Path], tmp_path: Path
) -> None:
    models = [{"model": str(shelf[k]), "parameters": {"weight": w}} for k, w in (("a", 1.0), ("b", -1.0))]
    named = plan | {"models": models} | ({"base_model": str(shelf["base"])} if "base_model" in plan else {})
    made = merge(named, out=tmp_path / "m")
    assert [told in n for n in made.notes].count(True) == 1
    assert told in (tmp_path / "m" / "README.md").read_text()


def test_a_rank_trims_the_factors_and_leaves_what_is_exact(shelf: dict[str, Path], tmp_path: Path) -> None:
    """Deltas of full tunes, compressed to LoRA: their norms and embeddings are exact differences, added as without a rank."""
    for name in "ab":
        compress(shelf["base"], shelf[name], method="svd", rank=4, out=tmp_path / name)
    plan = {"method": "task_arithmetic", "models": [str(tmp_path / "a"), str(tmp_path / "b")], "weights": [0.5, 1.0]}
    merge(plan, out=tmp_path / "whole")
    made = merge(plan | {"rank": 8}, out=tmp_path / "all")
    assert any("rank 8 trims the LoRA alone" in n for n in made.notes)
    bases = {n: on_disk(shelf["base"]) for n in ("whole", "all")}
    for name, base in bases.items():
        Delta.load(tmp_path / name).apply(base.model)
    got, want = (logits_of(bases[n].model)(tiny_ids()) for n in ("all", "whole"))
    assert torch.allclose(got, want, atol=1e-4)
    merge(plan | {"rank": 5}, out=tmp_path / "trimmed")
    pieces = Delta.load(tmp_path / "trimmed").pieces
    ranks = {n["A"].shape[0] for p in pieces for n in p.p.values() if "A" in n}
    exact = {k: n["bits"] for p in Delta.load(tmp_path / "whole").pieces for k, n in p.p.items()}
    kept = {k: n["bits"] for p in pieces for k, n in p.p.items() if "bits" in n}
    assert ranks == {5} and "model.norm.weight" in kept
    assert all(torch.equal(v, exact[k]) for k, v in kept.items())


def test_an_existing_folder_is_refused_before_anything_is_read(shelf: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(LuthierError, match="is there and not empty"):
        merge({"method": "linear", "models": ["nowhere"]}, out=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_disk_that_fails_leaves_nothing(
    shelf: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorFile, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "_put", full)
    with pytest.raises(LuthierError, match="No space left"):
        merge({"method": "linear", "models": [str(shelf["a"]), str(shelf["b"])], "weight": 1}, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_notes_on_parameters_without_effect(shelf: dict[str, Path], tmp_path: Path) -> None:
    plan = {
        "merge_method": "linear", "parameters": {"weight": 1, "int8_mask": True},
        "models": [{"model": str(shelf["a"]), "parameters": {"density": 0.5}}],
    }  # fmt: skip
    made = merge(plan, out=tmp_path / "m")
    assert [n for n in made.notes if "int8_mask" in n] and [n for n in made.notes if "density" in n]
    assert "int8_mask" in (tmp_path / "m" / "README.md").read_text()
    lines = {"method": "lines", "models": [str(shelf["a"])], "base": str(shelf["base"]), "gamma": 0.5, "weight": 0.5}
    notes = merge(lines, out=tmp_path / "lines").notes
    assert [n for n in notes if "no use for 'gamma'" in n] and not [n for n in notes if "weight" in n]
    notes = merge(lines | {"of": "breadcrumbs"}, out=tmp_path / "crumbs").notes
    assert not [n for n in notes if "gamma" in n]


def test_what_the_fields_files_may_ask_for_is_noted(shelf: dict[str, Path], tmp_path: Path) -> None:
    """Numbers are mergekit's there, where a plan of ours is refused."""
    plan = {"base_model": str(shelf["base"]), "models": [{"model": str(shelf["a"])}]}
    made = merge(plan | {"merge_method": "slerp", "parameters": {"t": [0.5, 1.5]}}, out=tmp_path / "arc")
    assert [n for n in made.notes if re.match(r"slerp: t is not between .* \(\d of \d+ tensors\)", n)]
    made = merge(plan | {"merge_method": "ties", "parameters": {"density": [0, 0.5]}}, out=tmp_path / "ties")
    assert [n for n in made.notes if n.startswith("ties: a density of 0 leaves nothing")]
    part = {"model": str(shelf["base"]), "layer_range": [0, 1]}
    more = [{"model": str(shelf[n]), "layer_range": [1, 2]} for n in ("base", "a", "b")]
    plan = {
        "method": "ties",
        "base": str(shelf["base"]),
        "slices": [{"sources": [part, part | {"model": str(shelf["a"])}]}],
    }
    plan["slices"].append({"sources": more})
    ours = merge(plan, out=tmp_path / "ours")
    theirs = {"merge_method": "ties", "base_model": plan["base"], "slices": plan["slices"]}
    made = merge(theirs, out=tmp_path / "theirs")
    assert [n for n in made.notes if "from the first 2 models of the last stretch" in n] and not ours.notes
    one, other = (tensors(tmp_path / n) for n in ("ours", "theirs"))
    assert {n for n, t in one.items() if not torch.equal(t, other[n])} == {"lm_head.weight", "model.norm.weight"}


def test_places_of_a_sequence_are_no_layers(shelf: dict[str, Path], tmp_path: Path) -> None:
    """Of two linear layers around an activation (a vision merger's mlp.0 and mlp.2) both are outside the depth."""

    def more(t: dict[str, torch.Tensor]) -> None:
        t |= {f"visual.merger.mlp.{i}.weight": torch.ones(3, 3) for i in (0, 2)}

    one = altered(shelf["a"], tmp_path / "one", more)
    plan = {"merge_method": "passthrough", "models": [{"model": one}], "parameters": {"scale": [2.0, 4.0]}}
    merge(plan, out=tmp_path / "m")
    assert {float(t.mean()) for n, t in tensors(tmp_path / "m").items() if "merger" in n} == {2.0}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_by_name(name: str, shelf: dict[str, Path], tmp_path: Path) -> None:
    plan = {"merge_method": "linear", "models": [{"model": str(shelf["a"])}], "chat_template": name}
    merge(plan, out=tmp_path / "m")
    words = AutoTokenizer.from_pretrained(tmp_path / "m")
    talk = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    said = words.apply_chat_template(
        [{"role": r, "content": c} for r, c in talk], tokenize=False, add_generation_prompt=True
    )
    want = {
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
        "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
        "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    }
    assert said == want[name]


# -- files and memory


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    table = {
        "wide": torch.randn(3, 5, dtype=torch.float64), "half": torch.randn(7).half(), "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5), "flag": torch.tensor([True, False]), "brain": torch.randn(2, 3).bfloat16(),
    }  # fmt: skip
    sharded = ShardedFile(tmp_path, [Spec(n, t.dtype, tuple(t.shape)) for n, t in table.items()], shard=64)
    for name in sharded.order:
        sharded.write(name, table[name])
    sharded.close()
    back = tensors(tmp_path)
    assert back.keys() == table.keys() and all(torch.equal(back[n], t) for n, t in table.items())
    for file in tmp_path.glob("*.safetensors"):
        assert all(p.start % p.dtype.itemsize == 0 for p in read_places(file).values())


def test_a_file_that_ends_early_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends before"), new_folder(tmp_path / "m") as new:
        file = TensorFile(new / "model.safetensors", [Spec("x", torch.float32, (4,))])
        try:
            file.close()
        finally:
            file.abandon()
    assert not list(tmp_path.iterdir())


def test_an_error_of_any_thread_arrives(shelf: dict[str, Path]) -> None:
    plan = load_merge({"method": "linear", "models": [str(shelf["a"]), str(shelf["b"])], "weight": 1})
    sources = [open_source(str(shelf[n])) for n in "ab"]
    jobs, _ = make_jobs(plan, lay_out(plan, sources, False), sources, Method("linear"))

    def broken(name: str, tensor: torch.Tensor) -> None:
        raise RuntimeError(f"cannot write {name}")

    with pytest.raises(RuntimeError, match="cannot write"):
        run(jobs, sources, broken)
    seen: list[str] = []
    run(jobs, sources, lambda name, tensor: seen.append(name), ahead=1)
    assert seen == [j.item.name for j in jobs]


def test_an_interrupt_waits_for_the_threads(shelf: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that still works when the interpreter ends takes the process down."""
    plan = load_merge({"method": "linear", "models": [str(shelf["a"]), str(shelf["b"])], "weight": 1})
    sources = [open_source(str(shelf[n])) for n in "ab"]
    jobs, _ = make_jobs(plan, lay_out(plan, sources, False), sources, Method("linear"))
    merged, threads, ended = driver._merged, torch.get_num_threads(), threading.Event()

    def slow(*given: Any) -> torch.Tensor:
        time.sleep(0.1)  # until the other waits
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        ended.set()
        return merged(*given)

    monkeypatch.setattr(driver, "_merged", slow)
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(jobs, sources, lambda name, tensor: None)
        assert ended.is_set()
    finally:
        ended.wait(1)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGINT, before)


LIMITED = """
import resource, sys
from luthier.verbs.merge import merge
import luthier.merging.linear, luthier.merging.ties
def held(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))
most = held("VmData") + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
merge(sys.argv[2], out=sys.argv[3])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_model_twice_as_large_as_memory_is_merged(method: str, tmp_path: Path) -> None:
    layers, width, limit = 36, 768, 80 << 20
    shapes = {
        f"model.layers.{i}.mlp.{n}_proj.weight": (width, 2 * width) for i in range(layers) for n in ("up", "gate")
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    for k, name in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(k)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        rows = {n: torch.empty(s, dtype=torch.bfloat16).uniform_(generator=g) for n, s in shapes.items()}
        save_file(rows, tmp_path / name / "model.safetensors", {"format": "pt"})
    size = sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    assert size > 2 * limit
    plan = {
        "merge_method": method,
        "models": [{"model": str(tmp_path / n)} for n in "ab"],
        "parameters": {"weight": 0.5},
    }
    if method == "ties":
        plan |= {"base_model": str(tmp_path / "base"), "parameters": {"weight": 0.5, "density": 0.5}}
    (tmp_path / "plan.yml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-c", LIMITED, str(limit), str(tmp_path / "plan.yml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2 * limit


LIMITED_DELTAS = """
import resource, sys
from luthier.verbs.merge import merge
import luthier.merging.ties, luthier.algebra.delta_merge, luthier.verbs.load, luthier.verbs.probes
from luthier.bases.load import load_base, quiet
load_base(sys.argv[2] + "/small", weights=False)  # what imports take is not the merge's
def held(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))
most = held("VmData") + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
made = merge({"method": "ties", "models": [f"{sys.argv[2]}/{n}" for n in ("da", "db")], "density": 0.5}, out=sys.argv[3])
print(made.notes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_deltas_twice_as_large_as_memory_become_one(tmp_path: Path) -> None:
    """Neither the base nor a delta is held whole; probes, which need the base, are left out and it says so."""
    limit = 100 << 20
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 62}
    config = AutoConfig.for_model("llama", vocab_size=128, architectures=["LlamaForCausalLM"], **sizes)
    for k, name in enumerate(("base", "a")):
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        g = torch.Generator().manual_seed(k)
        rows = {
            n: torch.empty(p.shape, dtype=torch.bfloat16).uniform_(generator=g) for n, p in model.named_parameters()
        }
        config.save_pretrained(tmp_path / name)
        save_file(rows, tmp_path / name / "model.safetensors", {"format": "pt"})
        tiny_tokenizer().save_pretrained(tmp_path / name)
    diff(tmp_path / "base", tmp_path / "a", out=tmp_path / "da", probes=False)
    assert (tmp_path / "da" / "delta.safetensors").stat().st_size > 2 * limit
    shutil.copytree(tmp_path / "da", tmp_path / "db", copy_function=os.link)  # as good as another for what it takes
    with quiet():
        tiny("llama").save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    command = [sys.executable, "-c", LIMITED_DELTAS, str(limit), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no probes: they need about" in done.stdout
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert Tuned(Checkpoint(tmp_path / "base"), tmp_path / "out").touched() == Checkpoint(tmp_path / "base").names()
    assert (tmp_path / "out" / "delta.safetensors").stat().st_size > 2 * limit


def test_sizes() -> None:
    assert bytes_of("5GB") == 5 * 1000**3 and bytes_of("2MiB") == 2 << 20 and bytes_of("100") == 100
    with pytest.raises(LuthierError, match="no size"):
        bytes_of("much")
