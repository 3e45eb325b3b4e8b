"""load and verify: what is whole passes, what is broken on purpose is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.load import load_base
from luthier.bridge.hf import export_hf
from luthier.bridge.proof import Report, prove
from luthier.bridge.target import logits_of, target
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec
from luthier.verbs import export, import_, inspect, load, verify
from luthier.verbs.diff import diff
from luthier.verbs.tune import tune
from tests.rooms.test_bridge_peft import C
from tests.tiny import tiny, tiny_ids, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")


def saved(folder: Path, seed: int = 0, **settings: Any) -> Path:
    model = tiny(**settings)
    if seed:
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data.add_(0.02 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("other") / "other", seed=5)


def made(base: Path, form: str = "lora", size: float = 0.05, **settings: Any) -> Delta:
    """A delta with every trained number disturbed, proven on its base."""
    on = target(str(base))
    kind = FORMS.make(form, settings)
    piece = attached(on.model).build(form, kind, sites_for(on.roles, kind))
    attached(on.model).detach()
    g = torch.Generator().manual_seed(3)
    for numbers in piece.p.values():
        for name, value in numbers.items():
            numbers[name] = value + size * torch.randn(value.shape, generator=g)
    return prove(Delta([piece]), on)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(base, rank=4).save(tmp_path_factory.mktemp("delta") / "delta")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a trainer leaves it: adapter, tokenizer and template in one folder."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = peft.get_peft_model(
        load_base(str(base)).model, peft.LoraConfig(**C, r=4, target_modules=["q_proj", "o_proj"])
    )
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def failed(report: Report) -> dict[str, str]:
    assert not report.ok
    return {c.name: c.detail for c in report.failed}


def resave(folder: Path, change: Any) -> None:
    """Alters a delta's tensors and writes a digest that fits, as a faulty tool would."""
    delta = Delta.load(folder)
    change(delta.pieces[0].p)
    seals, probes = delta.seals, delta.probes
    delta.save(folder)
    assert delta.seals is seals and delta.probes is probes


# -- deltas


@pytest.mark.parametrize("form", ["lora", "dora", "ia3", "adapter", "prompt", "prefix", "scale-shift", "sparse"])
def test_a_whole_delta_holds(form: str, base: Path, tmp_path: Path) -> None:
    folder = made(base, form).save(tmp_path / "delta")
    report = verify(folder, full=True)
    assert report.ok, str(report)
    names = {c.name for c in report.checks if c.ok}
    assert {"file", "norms", "base", "tokenizer", "template", "tensors", "seals", "probes"} <= names


def test_a_fold_that_is_refused_leaves_the_callers_model_as_it_was() -> None:
    model = tiny(tie_word_embeddings=True).to(torch.bfloat16)
    on = target(model, tiny_tokenizer())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind = FORMS.make("lora", {"rank": 2})
    piece = attached(model).build("lora", kind, sites_for(on.roles, kind, ["embed", "attn.q"]))
    attached(model).detach()
    for numbers in piece.p.values():
        numbers["B"] = numbers["B"] + 1e-4
    with pytest.raises(LuthierError, match="folding loses"):
        load(model, [prove(Delta([piece]), on)], fold=True, check=False, max_lost=0.0)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    after = dict(model.named_parameters())
    assert set(after) == set(before) and all(torch.equal(after[n], before[n]) for n in before)


def test_what_was_folded_into_a_model_whose_head_came_apart_is_taken_off() -> None:
    model = tiny(tie_word_embeddings=True)
    on = target(model, tiny_tokenizer())
    kind = FORMS.make("lora", {"rank": 2})
    piece = attached(model).build("lora", kind, sites_for(on.roles, kind, ["embed"]))
    attached(model).detach()
    for numbers in piece.p.values():
        numbers["B"] = numbers["B"] + 0.1
    load(model, [prove(Delta([piece]), on)], fold=True, check=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    attached(model).detach()


def test_truncated_file(copy: Path, base: Path) -> None:
    path = copy / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated or altered" in failed(verify(copy))["file"]
    with pytest.raises(LuthierError, match="truncated or altered"):
        load(str(base), copy)


def test_zeroed_layer(copy: Path, base: Path) -> None:
    resave(copy, lambda p: p["model.layers.1.mlp.up_proj"]["B"].zero_())
    told = failed(verify(copy))
    assert "lora/model.layers.1.mlp.up_proj is zero" in told["seals"]
    with pytest.raises(LuthierError, match="seals"):
        load(str(base), copy)


def test_altered_layer(copy: Path) -> None:
    resave(copy, lambda p: p["model.layers.0.self_attn.k_proj"]["A"].mul_(1.1))
    assert "k_proj is altered, off by 10%" in failed(verify(copy))["seals"]


def test_every_number_zeroed(copy: Path) -> None:
    resave(copy, lambda p: [q["B"].zero_() for q in p.values()])
    told = failed(verify(copy))
    assert "this is the base" in told["probes"] and "seals" in told


def test_other_base_shows_both_fingerprints(folder: Path, base: Path, other: Path) -> None:
    told = failed(verify(folder, str(other)))["base"]
    for path in (base, other):
        mark = load_base(str(path)).fingerprint
        assert mark and mark in told
    with pytest.raises(LuthierError, match="another base"):
        load(str(other), folder)


def test_base_in_another_dtype_is_the_same(folder: Path, base: Path) -> None:
    report = verify(folder, load_base(str(base)).model.to(torch.bfloat16))
    assert report.ok, str(report)
    assert any("another dtype" in c.detail for c in report.checks)


def test_changed_template_and_stripped_end(folder: Path, base: Path) -> None:
    on = load_base(str(base))
    on.tokenizer.chat_template = on.tokenizer.chat_template.replace("</s>", "")
    assert "not the one it was trained with" in failed(verify(folder, on))["template"]
    on = load_base(str(base))
    on.tokenizer.eos_token = "<|tool|>"
    assert "tokenizer" in failed(verify(folder, on))


def test_moved_parameters_need_the_dtype_they_were_taken_in(base: Path, tmp_path: Path) -> None:
    on = target(str(base))
    handle = attached(on.model)
    name = "model.norm.weight"
    handle.move("norm", {name: None})
    on.tensor(name).add_(0.25)
    delta = handle.delta({name: on.site(name)})
    handle.detach()
    prove(delta, on).save(tmp_path / "delta")
    assert verify(tmp_path / "delta").ok
    assert "dtype: float32" in failed(verify(tmp_path / "delta", load_base(str(base)).model.bfloat16()))["dtype"]


# -- load


def test_load_gives_an_ordinary_model(folder: Path, base: Path) -> None:
    model = load(str(base), folder)
    out = model.generate(tiny_ids(), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 16)
    tuned = logits_of(model)(tiny_ids())
    with attached(model).off():
        plain = logits_of(model)(tiny_ids())
    assert (tuned - plain).abs().max() > 1e-3
    assert (logits_of(load(str(base), folder, fold=True))(tiny_ids()) - tuned).abs().max() < 1e-5


def test_load_takes_folders_adapters_and_deltas(folder: Path, adapter: Path, base: Path) -> None:
    model = load(str(base), [folder, adapter, made(base, "ia3")])
    assert sorted(attached(model).pieces) == ["ia3", "lora", "lora-2"]


def test_load_refuses_what_it_does_not_know(base: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="did you mean 'dtype'"):
        load(str(base), folder, dtyp="float32")
    with pytest.raises(LuthierError, match="no delta at"):
        load(str(base), tmp_path / "nothing")


def test_lineage(folder: Path, base: Path, tmp_path: Path) -> None:
    child = Delta.load(folder)
    child.lineage = {"parents": [str(folder)]}
    child.save(tmp_path / "child")
    with pytest.raises(LuthierError, match="trained on top of"):
        load(str(base), tmp_path / "child")
    child.pieces[0].name = "parent0-lora"
    child.seals = {k.replace("lora/", "parent0-lora/"): v for k, v in child.seals.items()}
    child.save(tmp_path / "holds")
    load(str(base), tmp_path / "holds")
    with pytest.raises(LuthierError, match="leave that one out"):
        load(str(base), [folder, tmp_path / "holds"])


# -- adapters that others wrote


def test_adapter_holds(theirs: Path) -> None:
    report = verify(theirs)
    assert report.ok, str(report)
    names = {c.name for c in report.checks if c.ok}
    assert {"base name", "keys", "trained", "answers", "tokenizer", "end of turn", "template"} <= names


def test_adapter_saved_before_training(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(**C, r=4, target_modules=["q_proj"])
    peft.get_peft_model(load_base(str(base)).model, config).save_pretrained(tmp_path / "a")
    told = failed(verify(tmp_path / "a"))
    assert "saved before training" in told["trained"] and "does nothing" in told["answers"]


def test_adapter_half_trained(theirs: Path) -> None:
    path = theirs / "adapter_model.safetensors"
    save_file({k: v * 0 if "layers.1" in k and "lora_B" in k else v for k, v in load_file(path).items()}, path)
    assert "2 of 4 sites never moved" in failed(verify(theirs))["trained"]


def test_adapter_with_renamed_keys(theirs: Path) -> None:
    path = theirs / "adapter_model.safetensors"
    save_file({k.replace("base_model.model.", "module."): v for k, v in load_file(path).items()}, path)
    assert "match nothing" in failed(verify(theirs))["keys"]


def test_adapter_pickled(theirs: Path) -> None:
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    assert "pickled" in failed(verify(theirs))["keys"]


def test_adapter_with_another_template(theirs: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "")
    tokenizer.save_pretrained(theirs)
    assert "not the base's" in failed(verify(theirs))["template"]


def test_adapter_without_end_of_turn(theirs: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(theirs)
    assert "nothing will stop" in failed(verify(theirs))["end of turn"]


def test_adapter_with_untrained_new_tokens(theirs: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(theirs)
    assert "rows are noise" in failed(verify(theirs))["tokenizer"]


def test_import_and_back(adapter: Path, tmp_path: Path, base: Path) -> None:
    import_(adapter, tmp_path / "delta")
    assert verify(tmp_path / "delta").ok
    export(tmp_path / "delta", "peft", tmp_path / "back")
    first, second = (load_file(p / "adapter_model.safetensors") for p in (adapter, tmp_path / "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["target_modules"] == ["o_proj", "q_proj"]
    seen = inspect(tmp_path / "delta")
    assert seen["pieces"][0]["roles"] == {"attn.o": 2, "attn.q": 2} and seen["numbers"] == 4 * 4 * 64
    assert all(v > 0 for v in seen["pieces"][0]["size_by_layer"].values())


# -- merged checkpoints


def merged(adapter: Path, base: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As PEFT's users merge."""
    model = peft.PeftModel.from_pretrained(load_base(str(base)).model.to(dtype), str(adapter)).merge_and_unload()
    model.save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


def test_merge_holds(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = merged(adapter, base, tmp_path / "merged")
    report = verify(adapter, merged=out)
    assert report.ok, str(report)
    assert {"merged seals", "rounding", "merged = unmerged", "changed"} <= {c.name for c in report.checks if c.ok}
    assert verify(out, str(base)).ok


def test_merge_without_the_delta(adapter: Path, base: Path) -> None:
    told = failed(verify(adapter, merged=base))
    assert "equals the base's" in told["changed"] and "is zero" in told["merged seals"]
    assert "equals the base's" in failed(verify(base, str(base)))["changed"]


def test_merge_with_one_layer_lost(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = merged(adapter, base, tmp_path / "merged")
    lost = "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(out / "model.safetensors") | {lost: load_file(base / "model.safetensors")[lost]}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert "1 of 4 sites" in failed(verify(adapter, merged=out))["merged seals"]


def test_merge_with_a_scale_forgotten(adapter: Path, base: Path, theirs: Path, tmp_path: Path) -> None:
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    out = merged(theirs, base, tmp_path / "merged")
    assert "4 of 4 sites" in failed(verify(adapter, merged=out))["merged seals"]


def test_merge_rounded_away(theirs: Path, base: Path, tmp_path: Path) -> None:
    path = theirs / "adapter_model.safetensors"
    save_file({k: v * 1e-4 if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    report = failed(verify(theirs, merged=merged(theirs, base, tmp_path / "merged", torch.bfloat16)))
    assert "no larger than the rounding" in report.get("rounding", str(report))


def test_merge_with_nan_and_without_tensors(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = merged(adapter, base, tmp_path / "merged")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert "NaN" in failed(verify(adapter, merged=out))["finite"]
    del tensors["model.norm.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert "lacks" in failed(verify(adapter, merged=out))["checkpoint"]


def test_merge_without_tokenizer(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = merged(adapter, base, tmp_path / "merged")
    for path in out.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in failed(verify(adapter, merged=out))["tokenizer"]


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="holds no delta.json"):
        verify(tmp_path)
    with pytest.raises(LuthierError, match="nothing at"):
        verify(tmp_path / "no")


def test_export_is_what_verify_passes(folder: Path, base: Path, tmp_path: Path) -> None:
    export_hf(str(base), Delta.load(folder), tmp_path / "hf")
    report = verify(folder, merged=tmp_path / "hf")
    assert report.ok, str(report)


def test_the_probes_of_a_delta_trained_under_autocast_are_of_the_model_as_it_is_loaded(tmp_path):
    """Taken under autocast they would differ from what the loaded model gives by more than so slight a delta does."""
    plan = {
        "base": {"name": "practice", "dtype": "bfloat16"},
        "data": {"train": {"path": "practice:facts", "limit": 16}, "max_length": 48},
        "delta": [{"choice": "full"}],
        "train": {"steps": 1, "batch_size": 2, "lr": 1e-6, "precision": "bf16"},
        "audit": {"enabled": False},
    }
    out = tune(plan, out=tmp_path / "delta", progress=False).out
    assert json.loads((out / "report.json").read_text())["proof"]["precision"]["autocast"] == "bfloat16"
    report = verify(out, load_base(BaseSpec.model_validate({"name": "practice", "dtype": "float32"})))
    probes = next(c for c in report.checks if c.name == "probes")
    assert report.ok and probes.ok and "the delta is there: 0 from tuned" in probes.detail


def test_the_sign_of_a_zero_is_no_value(base: Path, tmp_path: Path) -> None:
    """Zeros that became -0.0 and nothing else: noted as that, neither lost nor empty; a delta of it holds."""
    name = "model.layers.0.mlp.up_proj.weight"
    zeros, signs = (Path(shutil.copytree(base, tmp_path / n)) for n in ("zeros", "signs"))
    for folder, value in ((zeros, 0.0), (signs, -0.0)):
        tensors = load_file(folder / "model.safetensors")
        tensors[name][0, :4] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = verify(signs, str(zeros))
    told = {c.name: c for c in report.checks}
    assert told["changed"].ok is None and "zeros of 1 tensors have the other sign" in told["changed"].detail
    assert report.ok, str(report)
    diff(str(zeros), str(signs), out=tmp_path / "delta")
    report = verify(tmp_path / "delta", merged=signs)
    assert report.ok, str(report)
    assert "zeros change their sign" in next(c.detail for c in report.checks if c.name == "norms")
    assert "equals the base's" in failed(verify(zeros, str(zeros)))["changed"]
