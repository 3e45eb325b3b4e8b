"""luthier compress from end to end: deltas and checkpoint pairs in, deltas that attach, fold, verify and load out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.roles import Roles
from luthier.bridge.peft import to_peft
from luthier.bridge.target import target
from luthier.cli import main
from luthier.delta import COMPRESSIONS, FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.verbs.compress import compress
from luthier.verbs.load import load
from luthier.verbs.verify import verify
from tests.contract.conformance import quiet, shove
from tests.tiny import tiny, tiny_ids, tiny_tokenizer

IDS = tiny_ids(3, 10)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def half() -> Any:
    model: Any = tiny()
    return model.to(torch.bfloat16)


def tuned_of(model: Any, seed: int = 1, by: float = 0.02) -> Any:
    """The model with low-rank and full noise on every parameter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.dim() == 2:
                noise = (
                    noise + 3 * torch.randn(len(p), 2, generator=g) @ torch.randn(2, p.shape[1], generator=g) / 2**0.5
                )
            p.add_(noise.to(p.dtype) * by)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base checkpoint and a tuned one."""
    place = tmp_path_factory.mktemp("pair")
    return saved(tiny(), place / "base"), saved(tuned_of(tiny()), place / "tuned")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["the cat sat on a mat", "two and two are four, and more", "a luthier makes strings sing"]
    path.write_text("\n".join(json.dumps({"text": w * 6}) for w in words) + "\n")
    return path


@pytest.mark.parametrize("method", [m for m in COMPRESSIONS if not COMPRESSIONS[m].alone])
def test_a_pair_becomes_a_delta_like_any_other(
    method: str, pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    base, tuned = pair
    found = compress(
        base, tuned, method=method, out=tmp_path / "d", calibration=str(text), tokens=256, length=32, steps=5
    )
    assert verify(tmp_path / "d").ok
    model = load(str(base), [tmp_path / "d"])
    logits = quiet(model, IDS)
    attached(model).fold()
    assert torch.allclose(quiet(model, IDS), logits, atol=1e-4, rtol=1e-3)
    far, near = (quiet(m, IDS) for m in (load(str(base)), load(str(tuned))))
    assert (logits - near).norm() < (far - near).norm()
    roles = {(r["role"], r["kept"]) for r in found.report["roles"]}
    assert ("embed", "exact") in roles and ("norm.attn", "exact") in roles and ("attn.q", "packed") in roles
    delta = Delta.load(tmp_path / "d")
    for piece in delta.pieces:
        for key in piece.sites if piece.form.at == "base" else ():
            assert torch.equal(model.get_parameter(key), load(str(tuned)).get_parameter(key)), key
    total = found.report["total"]
    stored = load_file(tmp_path / "d" / "delta.safetensors")
    kept = {p.name for p in delta.pieces if p.form.at == "base"}
    own = sum(t.numel() * t.element_size() for k, t in stored.items() if k.split("/")[0] not in kept)
    weights = sum(r["weights"] for r in found.report["roles"] if r["kept"] == "packed")
    assert total["matrices_bits"] == pytest.approx(8 * own / weights)
    assert total["file_bytes"] == (tmp_path / "d" / "delta.safetensors").stat().st_size
    assert found.report["logits"]["compressed"] < found.report["logits"]["base"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2_moe", "bert", "t5"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Conv1D, fused queries, experts, encoders: exact where nothing is compressed, near where something is."""
    base, tuned = saved(tiny(family), tmp_path / "base"), saved(tuned_of(tiny(family)), tmp_path / "tuned")
    found = compress(base, tuned, method="deltazip", bits=8, out=tmp_path / "d", embeddings="drop", rest="drop")
    seen = {p.name: len(p.sites) for p in found.delta.pieces}
    assert set(seen) == {"deltazip"} and seen["deltazip"] > 3
    for name, value in found.delta.tensors(lambda s: torch.empty(0)):
        a, b = (_tensor(f, name) for f in (base, tuned))
        change = b - a if b.shape == value.shape and family != "gpt2" else (b - a).t()
        kept = value != 0
        assert (value - change)[kept].abs().max() < 0.05 * change.abs().max()


def _tensor(folder: Path, name: str) -> torch.Tensor:
    held = load_file(folder / "model.safetensors")
    return next(t for k, t in held.items() if name.endswith(k) or k.endswith(name)).float()


def test_deltas_of_any_form_are_sources(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A LoRA and moved parameters together: the change that is compressed is what the delta does to the weights."""
    base, _ = pair
    on = target(str(base))
    handle, roles = attached(on.model), Roles(on.model)
    form = FORMS.make("lora", {"rank": 3})
    handle.add(handle.build("lora", form, sites_for(roles, form)))
    shove(handle, "lora")
    handle.move("norm", {n: None for n in parameter_items(roles, on.model) if "norm" in n})
    with torch.no_grad():
        for edit in handle.edits["norm"].values():
            edit.parameter.mul_(1.1)
    delta = handle.delta(parameter_items(roles, on.model))
    logits = quiet(on.model, IDS)
    delta.base = on.card()
    handle.detach()
    found = compress(delta, method="svd", rank=3, base=str(base), out=tmp_path / "d")
    assert {p.name for p in found.delta.pieces} == {"svd", "kept-float32"}
    assert torch.allclose(quiet(load(str(base), [tmp_path / "d"]), IDS), logits, atol=1e-3, rtol=1e-3)
    assert found.report["total"]["matrices_error"] < 1e-4


def test_embeddings_compressed_kept_or_dropped(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    sizes = {}
    for how in ("keep", "compress", "drop"):
        found = compress(base, tuned, out=tmp_path / how, embeddings=how, dtype="bfloat16")
        sizes[how] = found.report["total"]["file_bytes"]
        ends = {r["kept"] for r in found.report["roles"] if r["role"] in ("embed", "head")}
        assert ends == {"keep": {"exact"}, "compress": {"packed"}, "drop": set()}[how]
        assert verify(tmp_path / how).ok
    assert sizes["drop"] < sizes["compress"] < sizes["keep"]
    tied = saved(tiny(tie_word_embeddings=True), tmp_path / "tied")
    other = saved(tuned_of(tiny(tie_word_embeddings=True)), tmp_path / "tied-tuned")
    found = compress(tied, other, out=tmp_path / "both", embeddings="compress")
    assert {s.role for p in found.delta.pieces for s in p.sites.values()} >= {"embed", "head"}
    assert verify(tmp_path / "both").ok


def test_out_of_core_is_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the base in memory the tensors and seals are the same; only probes are missing."""
    base, tuned = pair
    a = compress(base, tuned, method="compeft", out=tmp_path / "a", density=0.2)
    b = compress(base, tuned, method="compeft", out=tmp_path / "b", density=0.2, probes=False)
    x, y = (load_file(tmp_path / n / "delta.safetensors") for n in "ab")
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert b.delta.seals.keys() == a.delta.seals.keys() and not b.delta.probes
    for key, seal in a.delta.seals.items():
        assert b.delta.seals[key] == pytest.approx(seal, rel=1e-3, abs=1e-6)
    assert verify(tmp_path / "b").ok


def test_lower_precision_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    found = compress(base, tuned, out=tmp_path / "d", dtype="bfloat16", probes=False)
    kept = next(p for p in found.delta.pieces if p.name == "kept-float32")  # the base's values do not fit bfloat16
    wanted = load(str(tuned)).get_parameter("model.embed_tokens.weight").bfloat16().float()
    model = load(str(base), [tmp_path / "d"], check=False)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), wanted) and kept.sites
    narrow = saved(half(), tmp_path / "base16")
    other = saved(tuned_of(half()), tmp_path / "tuned16")
    found = compress(narrow, other, out=tmp_path / "e")
    assert {p.name for p in found.delta.pieces} == {"bitdelta", "kept-bfloat16"}
    assert verify(tmp_path / "e").ok


def test_the_command(pair: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = map(str, pair)
    out = str(tmp_path / "d")
    assert (
        command("compress", base, tuned, "-m", "compeft", "density=0.2", "-c", str(text), "tokens=128", "-o", out) == 0
    )
    told = capsys.readouterr()
    assert "bits/weight" in told.out and "trying factors" in told.err
    for wrong in (["density=2"], ["density=0.2", base], ["-m", "nothing"]):
        assert command("compress", base, tuned, "-m", "compeft", *wrong, "-o", str(tmp_path / "e")) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "e").exists()
    assert command("compress", out, "-o", out) == 2
    capsys.readouterr()
    assert command("compress", base, tuned, "-o", str(Path(base) / "d")) == 2
    assert "lies in" in capsys.readouterr().err and not (Path(base) / "d").exists()


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(list(words))
    return int(e.value.code or 0)


def test_adapters_of_peft_are_sources(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    on = target(str(base))
    handle, form = attached(on.model), FORMS.make("lora", {"rank": 3})
    handle.add(handle.build("lora", form, sites_for(Roles(on.model), form)))
    shove(handle, "lora")
    wanted, delta = quiet(on.model, IDS), handle.delta()
    handle.detach()
    delta.base = on.card()
    to_peft(delta, tmp_path / "peft", base=on)
    compress(tmp_path / "peft", method="svd", rank=3, out=tmp_path / "d")
    assert torch.allclose(quiet(load(str(base), [tmp_path / "d"]), IDS), wanted, atol=1e-5)


def test_a_rank_above_a_matrixs_is_told_of(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "d")
    assert command("compress", *map(str, pair), "-m", "svd", "rank=100000", "-o", out, "-q") == 0
    assert "note: rank 100000 is more than a matrix has: 32 are kept (10 of 14 matrices)" in capsys.readouterr().err
    assert compress(*pair, method="svd", rank=16, probes=False).report["notes"] == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "bitdlta"}, "did you mean 'bitdelta'"),
    ({"method": "compeft", "density": 1.5}, "density must lie in"),
    ({"method": "compeft", "densty": 0.1}, "did you mean 'density'"),
    ({"method": "deltazip", "group": 6}, "multiple of 4"),
    ({"method": "svd", "rank": 0}, "rank must be at least 1"),
    ({"method": "svd", "sites": "norm"}, "cannot compress"),
    ({"tune": True}, "tuning needs calibration text"),
    ({"embeddings": "kep"}, "embeddings"),
    ({"sites": "atn"}, "did you mean"),
    ({"calibration": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"calibration": "TEXT", "probes": False}, "leave one of them out"),
]


@pytest.mark.parametrize("settings,told", WRONG, ids=[str(w[0]) for w in WRONG])
def test_bad_settings_are_one_line(
    settings: dict[str, Any], told: str, pair: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {k: str(text) if v == "TEXT" else v for k, v in settings.items()}
    with pytest.raises(LuthierError, match=told) as e:
        compress(*pair, out=tmp_path / "d", **given)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_bad_sources_are_one_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(LuthierError, match=r"empty\.jsonl"):
        compress(base, tuned, out=tmp_path / "d", calibration=str(tmp_path / "empty.jsonl"))
    broken = saved(tiny(), tmp_path / "nan")
    held = load_file(broken / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LuthierError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        compress(base, broken, out=tmp_path / "d", probes=False)
    other = saved(tiny(vocab_size=140), tmp_path / "other")
    with pytest.raises(LuthierError, match="its own vocabulary"):
        compress(base, other, out=tmp_path / "d")
    swapped = Path(shutil.copytree(tuned, tmp_path / "swapped"))
    words = json.loads((swapped / "tokenizer.json").read_text())
    one, two = list(words["model"]["vocab"])[-2:]
    words["model"]["vocab"] |= {one: words["model"]["vocab"][two], two: words["model"]["vocab"][one]}
    (swapped / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(LuthierError, match="different tokenizers: 2 of"):
        compress(base, swapped, out=tmp_path / "d", probes=False)
    with pytest.raises(LuthierError, match="changes none of the matrices"):
        compress(tmp_path / "nothing", out=tmp_path / "d") if (_nothing(base, tmp_path)) else None
    with pytest.raises(LuthierError, match="no delta at"):
        compress(tmp_path / "missing", out=tmp_path / "d")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(LuthierError, match="not empty"):
        compress(base, tuned, out=tmp_path / "full")
    on = target(str(base))
    handle, form = attached(on.model), FORMS.make("prefix", {"length": 2})
    handle.add(handle.build("prefix", form, sites_for(Roles(on.model), form)))
    delta = handle.delta()
    delta.base = on.card()
    with pytest.raises(LuthierError, match="no weight change"):
        compress(delta, base=str(base), out=tmp_path / "d", probes=False)
    assert not (tmp_path / "d").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def _nothing(base: Path, place: Path) -> bool:
    """A delta that moves norms only."""
    on = target(str(base))
    handle = attached(on.model)
    items = parameter_items(Roles(on.model), on.model)
    handle.move("norm", {n: None for n in items if "norm" in n})
    delta = handle.delta(items)
    delta.base = on.card()
    delta.save(place / "nothing")
    return True
