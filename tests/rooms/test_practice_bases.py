"""Bases that belong together: the table, building and resuming each kind, names, growing, cards and kept deltas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from luthier.bases import built
from luthier.bases.load import load_base
from luthier.effects.__main__ import main as effects
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec
from luthier.practice import bases, card, kept, tokenizer, world
from luthier.practice.grow import grow, source_layers
from luthier.practice.muon import Muon
from luthier.practice.shapes import MASKED, Size, cover, new_model
from luthier.practice.stream import STAGES, Ahead, Stream
from luthier.practice.train_base import Run, train

TINY = Size(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64)
SHORT = Run(tokens=4 * 4 * 96, rows=4, length=96, warmup=2)


@pytest.fixture(scope="module")
def words():
    """The practice tokenizer."""
    return bases._words("practice")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home of practice bases."""
    monkeypatch.setenv("LUTHIER_PRACTICE", str(tmp_path))
    return tmp_path


def tiny(name: str, **run) -> bases.Described:
    """A base of the table, small and soon done."""
    base = bases.described(name)
    size = replace(base.size, hidden=32, layers=2, heads=2, kv_heads=1, ffn=64)
    told = {"marks": base.run.marks, "mixture": base.run.mixture, "stream_seed": base.run.stream_seed} | run
    return replace(base, size=size, run=replace(SHORT, **told), delta=())


def test_every_row_of_the_table_says_how_it_is_built():
    for name in built.table():
        base = bases.described(name)
        assert base.about and base.run.steps > 100
        assert not base.parent or base.parent in built.table()
        for family in base.run.mixture:
            world.family_named(family.partition(":")[0])


def test_a_name_that_cannot_be_had_is_one_line(home):
    for name, said in (
        ("practice/sx", r"no such practice base; did you mean 's'\? \(bases: encoder, l, m"),
        ("practice/s", r"not built at .*/s; run `make practice-base NAME=s`"),
        ("practice/s/3", r"not built at .*/s/3; run `make practice-base NAME=s`"),
        ("practice/s/9", "practice/s has checkpoints 1 to 8"),
        ("practice/moe/1", "practice/moe has no checkpoints on its way"),
    ):
        with pytest.raises(LuthierError, match=said) as told:
            load_base(name)
        assert "\n" not in str(told.value)
    child = replace(tiny("m-v2"), parent="s")
    with pytest.raises(LuthierError, match="make practice-base NAME=s"):
        bases.build(child, items=0)
    assert bases.main(["nothing"]) == 2


@pytest.mark.parametrize("name", ["s", "moe", "encoder"])
def test_a_base_is_resumed_to_the_same_numbers_and_loads_by_name(home, name, capsys):
    base = tiny(name)
    assert bases.build(base, home / "other", items=0, stop_at=2) is None
    whole, parts = bases.build(base, items=0), bases.build(base, home / "other", items=0)
    assert whole == home / name and parts == home / "other"
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert not (whole / "build" / "state.safetensors").exists()
    kind = {"kind": "classify", "labels": ["a", "b"]} if name == "encoder" else {}
    held = load_base(BaseSpec.model_validate({"name": f"practice/{name}"} | kind))
    assert held.model.config.hidden_size == 32 and len(held.tokenizer) == tokenizer.VOCABULARY
    again = bases.build(base, items=0)
    assert again == whole
    with pytest.raises(LuthierError, match=f"holds another {name}, with other lr: choose another --out, or remove it"):
        bases.build(replace(base, run=replace(base.run, lr=0.5)), items=0)
    with pytest.raises(LuthierError, match="with other tokens"):
        bases.build(base, items=0, tokens=999)
    if name == "s":
        marks = sorted(p.name for p in whole.iterdir() if p.name.isdigit())
        assert marks == ["5", "6", "7"][-len(marks) :] and len(marks) >= 2
        early, late = (load_base(f"practice/s/{k}").fingerprint for k in (marks[-1], "8"))
        assert early != late == held.fingerprint


def test_another_tokenizer_has_its_own_pieces():
    other = tokenizer.train(tokenizer.OTHER_VOCABULARY, tokenizer.OTHER_PIECES, each=300)
    assert len(other) == tokenizer.OTHER_VOCABULARY
    text = "Zürich, 1234 apples!"
    assert other.decode(other(text)["input_ids"]) == text
    pieces = [other.decode([i]) for i in range(len(other))]
    assert any(piece.isdigit() and len(piece) == 2 for piece in pieces)  # which the practice tokenizer never has


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_grown_model_says_what_the_small_one_says(words, layers):
    small = new_model(TINY, words, 0).eval()
    ids = torch.tensor([words("Sort 4, 2 and 9 for the miller.")["input_ids"]])
    with torch.no_grad():
        for p in small.parameters():  # away from the flat start, where everything agrees
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        before = {n: p.clone() for n, p in small.named_parameters()}
        said = small(ids).logits
        plain, noisy = grow(small, layers, noise=0.0).eval(), grow(small, layers).eval()
        assert torch.allclose(plain(ids).logits, said, atol=1e-5)
        assert torch.allclose(noisy(ids).logits, said, atol=1e-4)
    assert all(torch.equal(before[n], p) for n, p in small.named_parameters())
    assert noisy.config.hidden_size == 64 and len(noisy.model.layers) == 2 + layers
    q = noisy.model.layers[0].self_attn.q_proj.weight
    assert not torch.allclose(q[:, :32], q[:, 32:], atol=1e-4)
    assert [s for s, _ in source_layers(6, 3)] == [0, 1, 1, 2, 3, 3, 4, 5, 5]


def test_a_grown_base_is_built_from_its_parent(home, words):
    bases.build(tiny("s", marks=0), items=0)
    base = replace(tiny("l"), parent="s", grow={"layers": 1})
    folder = bases.build(base, items=0)
    assert folder == home / "l"
    held, told = load_base("practice/l"), json.loads((folder / "training.json").read_text())
    assert held.model.config.hidden_size == 64 and held.model.config.num_hidden_layers == 3
    assert told["parent"] == "s" and told["parent_fingerprint"] == load_base("practice/s").fingerprint
    assert bases.build(base, items=0) == folder
    with pytest.raises(LuthierError, match="holds another l, with other tokenizer:"):
        bases.build(replace(base, tokenizer="other"), items=0)
    changed = home / "m-v2"
    assert bases.build(replace(tiny("m-v2"), parent="s"), items=0, stop_at=1) is None
    bases.build(replace(tiny("s", marks=0, seed=1)), home / "new", items=0)
    (home / "new" / "model.safetensors").replace(home / "s" / "model.safetensors")
    with pytest.raises(LuthierError, match="told.parent_fingerprint"):
        bases.build(replace(tiny("m-v2"), parent="s"), items=0)
    assert not (changed / "config.json").exists()
    with pytest.raises(LuthierError, match="holds another l, with other parent_fingerprint:"):
        bases.build(base, items=0)
    (home / "s" / "config.json").unlink()
    assert bases.build(base, items=0) == folder, "the parent is not at hand"


def test_a_built_base_is_put_into_the_package_with_its_card(home, monkeypatch, capsys):
    package = home / "package"
    package.mkdir()
    (package / "training.json").write_text("{}")
    monkeypatch.setattr(card, "ASSET", package)
    monkeypatch.setattr(card, "families", lambda: ("facts", "recall"))
    small = tiny("s", marks=0)
    monkeypatch.setattr(bases, "described", lambda name: small)
    assert bases.main(["s", "--install", "--items", "2"]) == 0
    assert capsys.readouterr().out.strip().endswith(str(package))
    assert (package / "model.safetensors").read_bytes() == (home / "s" / "model.safetensors").read_bytes()
    assert json.loads((package / "card.json").read_text())["training"]["base"] == "s"
    assert not (home / "s" / "card.json").exists() and "# practice/s" in (package / "README.md").read_text()


def test_a_base_kept_as_a_delta_is_its_parent_and_the_delta(home, monkeypatch):
    from luthier.delta.artefact import Delta

    monkeypatch.setattr(bases, "ITEMS", 4)
    bases.build(tiny("s", marks=0), items=0)
    ways = ({"method": "bitdelta", "embeddings": "compress", "steps": 3},)
    base = replace(tiny("m-v2", mixture={"facts": 1, "recall:1": 1}), parent="s", delta=ways)
    folder = bases.build(base, items=0)
    assert folder is not None
    record = json.loads((folder / "training.json").read_text())["kept"]
    assert (
        record["as"] == "bitdelta" and record["tried"][0]["bytes"] < (folder / "model.safetensors").stat().st_size / 4
    )
    assert set(record["before"]) == {*world.FIRST, "recall"}
    assert "Kept as a delta on practice/s by bitdelta" in "\n".join(card._kept(record, "s"))
    on, ready = load_base("practice/s"), load_base("practice/m-v2")
    assert on.fingerprint != ready.fingerprint
    handle = Delta.load(folder / "delta").apply(on.model)
    handle.fold()
    here = {name: p for name, p in on.model.named_parameters() if "luthier" not in name}  # the delta's own left out
    there = dict(ready.model.named_parameters())
    assert set(here) == set(there)
    for name, one in here.items():
        assert torch.equal(one.bfloat16().float(), there[name]), name
    kept.unfold(folder / "delta", "practice/s", home / "again")
    assert (home / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_cards_say_what_a_base_was_told_of(home, monkeypatch):
    monkeypatch.setattr(card, "families", lambda: ("facts", "lists", "recall"))
    bases.build(tiny("s", marks=0), items=2)
    base = replace(tiny("m-v2"), parent="s")
    for name in (bases.build(base, items=2), bases.build(tiny("encoder"), items=2)):
        assert name is not None
        told = json.loads((name / "card.json").read_text())
        assert set(told["scores"]) == {"facts", "lists", "recall"}
        assert list(told["taught"]) == [*["facts", "lists"], *(["recall"] if name.name == "m-v2" else [])]
        page = (name / "README.md").read_text()
        assert page.startswith("---\n") and f"# practice/{name.name}" in page
        assert f"python -m luthier.practice.card --base practice/{name.name}" in page
        assert all(0 <= share <= 1 for family in told["scores"].values() for share in family.values())
    assert "Masked tokens guessed" in (home / "encoder" / "README.md").read_text()


def test_an_encoder_is_asked_for_masked_tokens_and_no_padding():
    ids = torch.arange(400).view(4, 100) % 50
    real = torch.arange(100) < torch.tensor([[100], [60], [60], [3]])
    shown, asked = cover(ids, real, 3, 50, 7)
    assert not asked[~real].any() and abs(asked.sum() / real.sum() - MASKED) < 0.06
    assert torch.equal(shown[~asked], ids[~asked])
    assert 0.6 < (shown[asked] == 7).float().mean() < 1.0
    assert torch.equal(cover(ids, real, 3, 50, 7)[0], shown)


def test_a_stack_of_matrices_steps_as_its_matrices_do():
    g = torch.Generator().manual_seed(0)
    stack, grads = torch.randn(3, 8, 12, generator=g), torch.randn(3, 8, 12, generator=g)
    whole, single = stack.clone().requires_grad_(), [m.clone().requires_grad_() for m in stack]
    for p, grad in ((whole, grads), *zip(single, grads, strict=True)):
        p.grad = grad.clone()
    Muon([whole], 0.1).step()
    Muon(single, 0.1).step()
    assert torch.allclose(whole, torch.stack(single), atol=1e-6)


def test_mixtures_stages_and_another_process_give_the_text_they_should(words):
    mixed = Stream(words, 4, 96, seed=2, mixture={"facts": 1, "recall:1": 3})
    next(mixed)
    assert {mixed._next(i)[0] for i in range(50)} == {"facts", "recall:1"}
    long = Stream(words, 4, 96, mixture={"ledgers": 1, "facts": 9})
    assert next(long).segment.any()
    wide = Stream(words, 4, 96, stretch=10.0)
    assert wide.starts == [10 * at for at, _ in STAGES]
    plain = Stream(words, 4, 96)
    ahead = Ahead(Stream(words, 4, 96), 2)
    for _ in range(3):
        one, two = next(plain), next(ahead)
        assert (one.ids == two.ids).all() and (one.weight == two.weight).all()
        assert (plain.drawn, plain.tokens) == (ahead.drawn, ahead.tokens)


def test_a_longer_run_stretches_its_stages_and_goes_on_with_those_it_has(tmp_path, words):
    run = bases._lengthened(SHORT, 10 * SHORT.tokens, tmp_path)
    assert run.stretch == 10.0 and run.tokens == 10 * SHORT.tokens
    assert bases._lengthened(SHORT, SHORT.tokens // 2, tmp_path).stretch == 1.0
    train(tmp_path, run, TINY, stop_at=1, tokenizer=words)
    assert bases._lengthened(SHORT, 20 * SHORT.tokens, tmp_path) == replace(run, tokens=20 * SHORT.tokens)
    assert bases._lengthened(SHORT, None, tmp_path) == run


@pytest.mark.parametrize(
    ("command", "asked", "told"),
    [
        (bases.main, ["moe", "--out", "/dev/null/x"], "mend that, then run the command again"),
        (bases.main, ["moe", "--tokens", "-5"], "tokens -5: choose 1 at least"),
        (bases.main, ["moe", "--minutes", "-1"], "minutes -1: choose 0 at least"),
        (bases.main, ["moe", "--items", "-1"], "items -1: choose 0 at least"),
        (card.main, ["--items", "0"], "choose 1 at least"),
        (card.main, ["--families", "factz"], "unknown family 'factz'"),
        (card.main, ["--base", "nowhere"], "no model in nowhere"),
        (effects, ["phrasings", "--out", "/dev/null/x"], "mend that, then run the command again"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(command, asked, told, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_PRACTICE", str(tmp_path))
    assert command(asked) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1
