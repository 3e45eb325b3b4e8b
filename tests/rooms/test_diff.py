"""luthier diff: exact deltas give the tuned values bit for bit, extractions are the nearest, and what does not fit is one line."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from luthier.algebra import maker
from luthier.bases.fingerprint import full_fingerprint
from luthier.bases.load import quiet as silent
from luthier.bases.tokens import load_tokenizer
from luthier.bridge.proof import prove
from luthier.cli import main
from luthier.cli.app import app
from luthier.delta.artefact import Delta
from luthier.delta.seals import project, project_rows
from luthier.delta.stream import TensorStream
from luthier.errors import LuthierError
from luthier.verbs.diff import diff
from luthier.verbs.export import export
from luthier.verbs.load import load, load_base_for
from luthier.verbs.verify import verify
from tests.tiny import tiny, tiny_tokenizer

Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor | None]


def everything(name: str, p: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return torch.randn(p.shape, generator=g) * 0.02


def low(name: str, p: torch.Tensor, g: torch.Generator) -> torch.Tensor | None:
    """Rank 2 in every linear map of the layers."""
    if p.dim() != 2 or ".layers." not in name:
        return None
    return torch.randn(p.shape[0], 2, generator=g) @ torch.randn(2, p.shape[1], generator=g) * 0.05


def pair(
    place: Path,
    change: Change,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    words: bool = True,
    **settings: Any,
) -> tuple[str, str, dict[str, torch.Tensor]]:
    """A tiny base and what it was tuned to, on disk; and the tuned parameters."""
    model = tiny(family, **settings).to(dtype)
    g = torch.Generator().manual_seed(7)
    with silent():
        model.save_pretrained(place / "base")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if (dw := change(name, p, g)) is not None:
                    p.add_(dw.to(dtype))
        model.save_pretrained(place / "tuned", max_shard_size="40KB")
    if words:
        for folder in ("base", "tuned"):
            tiny_tokenizer().save_pretrained(place / folder)
    return str(place / "base"), str(place / "tuned"), {n: p.detach() for n, p in model.named_parameters()}


def same_bits(model: Any, wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    have = dict(model.named_parameters())
    return set(have) == set(wanted) and all(torch.equal(have[n], wanted[n].to(dtype)) for n in wanted)


CASES = [
    ("llama", torch.float32),
    ("llama", torch.bfloat16),
    ("llama", torch.float16),
    ("gpt2", torch.bfloat16),
    ("mixtral", torch.bfloat16),
    ("bert", torch.float32),
    ("gemma2", torch.float16),
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_exact_gives_the_tuned_values_bit_for_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base, tuned, wanted = pair(tmp_path, everything, family, dtype)
    found = diff(base, tuned, out=tmp_path / "d")
    assert not found.notes and found.delta.probes
    for held in {dtype, torch.float32}:
        assert same_bits(load(base, tmp_path / "d", dtype=str(held)[6:]), wanted, held)
    assert verify(tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    seals, card = delta.seals, dict(delta.base)
    prove(delta, load_base_for(base, [delta], {"dtype": str(dtype)[6:]}, None), full=True)
    assert set(seals) == set(delta.seals)
    assert all(
        torch.allclose(torch.tensor(seals[k]), torch.tensor(delta.seals[k]), rtol=1e-3, atol=1e-7) for k in seals
    )
    assert (
        card["fingerprint"] == delta.base["fingerprint"] and card["full_fingerprint"] == delta.base["full_fingerprint"]
    )


def test_exported_it_is_the_tuned_checkpoint(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything, dtype=torch.bfloat16)
    diff(base, tuned, out=tmp_path / "d", probes=False)
    export(tmp_path / "d", "hf", tmp_path / "back")
    assert full_fingerprint(tmp_path / "back") == full_fingerprint(Path(tuned))


def retyped(folder: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Writes a checkpoint's shards again in another type; gives their values."""
    values: dict[str, torch.Tensor] = {}
    for path in Path(folder).glob("*.safetensors"):
        part = {k: v.to(dtype) for k, v in load_file(path).items()}
        values |= part
        save_file(part, path, {"format": "pt"})
    return values


def test_a_narrow_tune_of_a_wide_base_is_written_in_the_bases_type(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything)
    wanted = retyped(tuned, torch.bfloat16)
    diff(base, tuned, out=tmp_path / "d", probes=False)
    command = ["export", str(tmp_path / "d"), "--to", "hf", "--out"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "x")]).exit_code == 0
    back = load_file(tmp_path / "x" / "model.safetensors")
    assert all(torch.equal(back[name], value.float()) for name, value in wanted.items())
    for dtype, says in (
        ("bfloat16", "this one is held in bfloat16"),
        ("foo", "dtype"),
    ):  # the base's own bits are not there
        with pytest.raises(LuthierError, match=says):
            export(tmp_path / "d", "hf", tmp_path / "y", dtype=dtype)


def test_unchanged_is_left_out_and_few_entries_are_kept_alone(tmp_path: Path) -> None:
    def change(name: str, p: torch.Tensor, g: torch.Generator) -> torch.Tensor | None:
        dw = torch.zeros(p.shape)
        if name.endswith("layers.1.mlp.up_proj.weight"):
            dw[3, 5] = 0.5
        elif name.endswith("layers.0.self_attn.q_proj.weight"):
            dw += 0.25
        else:
            return None
        return dw

    base, tuned, wanted = pair(tmp_path, change)
    found = diff(base, tuned, out=tmp_path / "d", probes=False)
    delta = Delta.load(tmp_path / "d")
    sites = {p.name: list(p.sites) for p in delta.pieces}
    assert sites == {
        "entries-float32": ["model.layers.1.mlp.up_proj.weight"],
        "dense-float32": ["model.layers.0.self_attn.q_proj.weight"],
    }
    assert delta.pieces[0].count() + delta.pieces[1].count() == 1 + 32 * 32
    rows = {r.role: r for r in found.rows}
    assert (rows["ffn.up"].changed, rows["ffn.up"].kept, rows["ffn.down"].changed) == (1, 1, 0)
    assert same_bits(load(base, tmp_path / "d"), wanted, torch.float32)


def test_signs_of_zero_and_wider_types(tmp_path: Path) -> None:
    """A bf16 base tuned to a float32 checkpoint, with a zero that changed its sign only."""
    base, tuned, _ = pair(tmp_path, lambda n, p, g: None, dtype=torch.bfloat16)
    index = json.loads((Path(tuned) / "model.safetensors.index.json").read_text())["weight_map"]
    retyped(tuned, torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    file = Path(tuned) / index[name]
    part = load_file(file)
    part[name][0, 0] = 1.00001
    save_file(part, file, {"format": "pt"})
    zero = {**load_file(Path(base) / "model.safetensors")}
    zero[name][1, 1] = 0.0
    save_file(zero, Path(base) / "model.safetensors", {"format": "pt"})
    part[name][1, 1] = -0.0
    save_file(part, file, {"format": "pt"})
    diff(base, tuned, out=tmp_path / "d", probes=False)
    delta = Delta.load(tmp_path / "d")
    assert [p.form.dtype for p in delta.pieces] == ["float32"] and delta.count() == 2  # pyright: ignore
    q = load(base, tmp_path / "d").get_submodule("model.layers.0.self_attn.q_proj").weight
    assert float(q[0, 0]) == part[name][0, 0] and torch.signbit(q[1, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2"])
def test_an_extraction_holds_what_has_its_rank(tmp_path: Path, family: str) -> None:
    def change(name: str, p: torch.Tensor, g: torch.Generator) -> torch.Tensor | None:
        one = low(name.replace("transformer.h", "model.layers"), p, g)
        if p.dim() == 3:
            return (
                torch.randn(*p.shape[:2], 2, generator=g) @ torch.randn(p.shape[0], 2, p.shape[2], generator=g) * 0.05
            )
        return (
            one
            if one is not None
            else 0.01 * torch.randn(p.shape, generator=g)
            if "norm" in name or "bias" in name
            else None
        )

    base, tuned, wanted = pair(tmp_path, change, family)
    found = diff(base, tuned, out=tmp_path / "d", rank=2)
    assert {p.name for p in Delta.load(tmp_path / "d").pieces} >= {"lora", "dense-float32"}
    assert all(r.error < 1e-4 for r in found.rows)
    model = load(base, tmp_path / "d", fold=True)
    held = {n: p for n, p in model.named_parameters() if ".luthier." not in n}
    assert set(held) == set(wanted) and all(torch.allclose(p, wanted[n], atol=1e-4) for n, p in held.items())
    assert verify(tmp_path / "d")


def test_an_extraction_is_the_best_of_its_rank_and_says_what_it_lost(tmp_path: Path) -> None:
    base, tuned, wanted = pair(tmp_path, everything)
    before = tiny("llama").get_submodule("model.layers.1.mlp.down_proj").weight
    found = diff(base, tuned, out=tmp_path / "d", rank=3, rest="drop", probes=False)
    delta = Delta.load(tmp_path / "d")
    assert [p.name for p in delta.pieces] == ["lora"] and {s.role for s in delta.pieces[0].sites.values()} == {
        *(f"attn.{x}" for x in "qkvo"),
        *(f"ffn.{x}" for x in ("gate", "up", "down")),
    }
    change = wanted["model.layers.1.mlp.down_proj.weight"] - before
    got = dict(delta.tensors())["model.layers.1.mlp.down_proj.weight"]
    best = torch.linalg.svdvals(change)[3:].square().sum()
    assert torch.isclose((change - got).square().sum(), best, rtol=1e-3)
    rows = {r.role: r for r in found.rows}
    assert 0.3 < rows["ffn.down"].error < 1 and rows["norm.attn"].error == 1 and rows["ffn.down"].ranks == [3, 3]
    assert delta.lineage["how"] == {"rank": 3, "rest": "drop"}
    assert delta.lineage["tuned"]["fingerprint"] != delta.base["fingerprint"]


def test_energy_ratio_and_sites(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything)
    found = diff(base, tuned, out=tmp_path / "e", energy=0.8, sites=["attn.q", "embed"], probes=False)
    rows = {r.role: r for r in found.rows}
    assert rows["attn.q"].error ** 2 <= 0.2 + 1e-3 and rows["embed"].error ** 2 <= 0.2 + 1e-3
    assert rows["ffn.up"].error == 0 and not rows["ffn.up"].ranks
    ranks = {len(p["A"]) for p in Delta.load(tmp_path / "e").pieces[0].p.values()}
    assert len(ranks) > 1 and max(ranks) < 32
    small = diff(base, tuned, out=tmp_path / "r", ratio=0.9, rank=4, probes=False)
    assert max(max(r.ranks) for r in small.rows if r.ranks) <= 4
    assert verify(tmp_path / "e")


def test_without_a_tokenizer_there_are_no_probes_and_it_says_so(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything, words=False)
    found = diff(base, tuned, out=tmp_path / "d")
    assert "no probes" in found.notes[0] and Delta.load(tmp_path / "d").seals


def test_probes_come_without_hard_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    base, tuned, _ = pair(tmp_path, everything)
    monkeypatch.setattr("os.link", refused)
    before = set(tmp_path.iterdir())
    diff(base, tuned, out=tmp_path / "d")
    assert Delta.load(tmp_path / "d").probes and set(tmp_path.iterdir()) == before | {tmp_path / "d"}


def test_the_tuned_models_template_travels(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything)
    words = tiny_tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}!"
    words.save_pretrained(tuned)
    assert "template" in diff(base, tuned, out=tmp_path / "d").notes[0]
    assert Delta.load(tmp_path / "d").files["chat_template.jinja"] == words.chat_template.encode()
    assert verify(tmp_path / "d")


def test_tied_heads(tmp_path: Path) -> None:
    base, tuned, wanted = pair(tmp_path, everything, tie_word_embeddings=True)
    diff(base, tuned, out=tmp_path / "d", probes=False)
    assert same_bits(load(base, tmp_path / "d"), wanted, torch.float32)
    apart = tiny("llama", tie_word_embeddings=False)
    with silent():
        apart.save_pretrained(tmp_path / "apart")
    tiny_tokenizer().save_pretrained(tmp_path / "apart")
    with pytest.raises(LuthierError, match="lm_head.weight is tied to model.embed_tokens.weight"):
        diff(base, tmp_path / "apart", out=tmp_path / "e")
    diff(tmp_path / "apart", base, out=tmp_path / "f", probes=False)
    model = load(tmp_path / "apart", tmp_path / "f")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tensor_that_the_tuned_model_has_alone_is_not_lost(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything)
    with silent():
        tiny("llama").save_pretrained(tmp_path / "more")
    tiny_tokenizer().save_pretrained(tmp_path / "more")
    values = load_file(tmp_path / "more" / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.gate.weight": torch.ones(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(values | extra, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        LuthierError, match=r"more holds model.layers.0.self_attn.gate.weight, .* take the tensor out"
    ) as e:
        diff(base, tmp_path / "more", out=tmp_path / "d")
    assert "\n" not in str(e.value) and not (tmp_path / "d").exists()
    save_file(load_file(Path(base) / "model.safetensors") | extra, Path(base) / "model.safetensors", {"format": "pt"})
    moved = {k: v + 0.1 if k == "model.norm.weight" else v for k, v in values.items()}
    save_file(moved | extra, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    assert diff(base, tmp_path / "more", out=tmp_path / "d", probes=False).notes == []


def test_a_head_that_is_stored_though_tied_is_told_of(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything, tie_word_embeddings=True)
    for file in Path(tuned).glob("model*"):
        file.unlink()
    values = load_file(Path(base) / "model.safetensors")
    table = values["model.embed_tokens.weight"]
    moved = values | {"model.norm.weight": values["model.norm.weight"] + 0.1}
    for head, said in ((table.clone(), 0), (table + 0.1, 1)):
        save_file(moved | {"lm_head.weight": head}, Path(tuned) / "model.safetensors", {"format": "pt"})
        notes = diff(base, tuned, out=tmp_path / f"d{said}", probes=False).notes
        assert len(notes) == said and all("stores lm_head.weight apart" in n for n in notes)


def widened(place: Path, family: str, dtype: torch.dtype, rows: int, more: int = 3, **settings: Any) -> dict[str, Any]:
    """A base and what it was tuned to with `more` tokens added and a table of `rows` rows; the tuned parameters."""
    base, tuned, _ = pair(place, lambda n, p, g: None, family, dtype, **settings)
    words = tiny_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<new0>"]}, replace_extra_special_tokens=False)
    words.add_tokens([f"<new{i}>" for i in range(1, more)])
    with silent():
        model = tiny(family, **settings).to(dtype)
        model.resize_token_embeddings(rows, mean_resizing=False)
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_((torch.randn(p.shape, generator=g) * 0.02).to(dtype))
        for file in Path(tuned).glob("model*"):
            file.unlink()
        model.save_pretrained(tuned)
    words.save_pretrained(tuned)
    return {n: p.detach() for n, p in model.named_parameters()}


GROWN = [
    ("llama", torch.float32, 106, {"vocab_size": 103}),
    ("llama", torch.bfloat16, 106, {"vocab_size": 103}),
    ("llama", torch.float16, 106, {"vocab_size": 104}),  # one token fits, two do not
    ("gemma2", torch.bfloat16, 106, {"vocab_size": 103}),  # tied
    ("qwen2", torch.bfloat16, 128, {}),  # all fit
]


@pytest.mark.parametrize(("family", "dtype", "rows", "settings"), GROWN)
def test_added_tokens_are_the_deltas_own(
    tmp_path: Path, family: str, dtype: torch.dtype, rows: int, settings: dict[str, Any]
) -> None:
    wanted = widened(tmp_path, family, dtype, rows, **settings)
    base = str(tmp_path / "base")
    found = diff(base, tmp_path / "tuned", out=tmp_path / "d")
    assert found.delta.probes and any("3 new tokens" in n for n in found.notes)
    assert Delta.load(tmp_path / "d").base["new_tokens"] == ["<new0>", "<new1>", "<new2>"]
    assert b"<new2>" in Delta.load(tmp_path / "d").files["tokenizer.json"]
    for held in {dtype, torch.float32}:
        assert same_bits(load(base, tmp_path / "d", dtype=str(held)[6:]), wanted, held)
    assert verify(tmp_path / "d")
    export(tmp_path / "d", "hf", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[n].view(torch.uint8), wanted[n].view(torch.uint8)) for n in back)
    assert diff(base, tmp_path / "tuned", out=tmp_path / "r", rank=2, probes=False).notes[:1] == found.notes[:1]
    assert load(base, tmp_path / "r").get_input_embeddings().weight.shape[0] == rows


def test_a_wider_tune_with_added_tokens_is_exact_too(tmp_path: Path) -> None:
    """The rows that a base starts new tokens with are the same numbers in whatever type it is held."""
    wanted = widened(tmp_path, "llama", torch.bfloat16, 106, vocab_size=103)
    values = retyped(str(tmp_path / "tuned"), torch.float32)
    file = tmp_path / "tuned" / "model.safetensors"
    values["model.embed_tokens.weight"] = values["model.embed_tokens.weight"] + 1e-6
    save_file(values, file, {"format": "pt"})
    diff(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "d", probes=False)
    model = load(str(tmp_path / "base"), tmp_path / "d", dtype="float32")
    assert same_bits(model, {n: values[n] for n in wanted}, torch.float32)


def test_a_table_that_is_larger_than_its_tokens_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    wanted = widened(tmp_path, "llama", torch.float32, 128, vocab_size=103)
    with pytest.raises(LuthierError, match=r"resize_token_embeddings\(128\) of BASE, saved with TUNED's tokenizer"):
        diff(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "d")
    model = tiny("llama", vocab_size=103)
    with silent():
        model.resize_token_embeddings(128, mean_resizing=False)
        model.save_pretrained(tmp_path / "wide")
    load_tokenizer(tmp_path / "tuned").save_pretrained(tmp_path / "wide")
    diff(tmp_path / "wide", tmp_path / "tuned", out=tmp_path / "d")
    assert same_bits(load(str(tmp_path / "wide"), tmp_path / "d"), wanted, torch.float32)


def test_added_tokens_where_the_head_has_a_bias_are_refused(tmp_path: Path) -> None:
    """What a grown bias starts with is not the table's to say."""
    widened(tmp_path, "phi", torch.float32, 106, vocab_size=103)
    with pytest.raises(LuthierError, match="resize_token_embeddings"):
        diff(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def nan(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    values = load_file(file)
    values["model.norm.weight"][3] = torch.nan
    save_file(values, file, {"format": "pt"})


def lacking(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file, {"format": "pt"})


def misshapen(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    values = load_file(file)
    values["model.norm.weight"] = torch.ones(5)
    save_file(values, file, {"format": "pt"})


def other_words(folder: str) -> None:
    """Two tokens have changed places."""
    tiny_tokenizer().save_pretrained(folder)
    file = Path(folder) / "tokenizer.json"
    table = json.loads(file.read_text())
    words = table["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(table))


def cut_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut(folder: str) -> None:
    cut_file(Path(folder) / "model.safetensors")


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nan": (nan, {}, "model.norm.weight holds NaN"),
    "lacking": (lacking, {}, "lacks model.norm.weight"),
    "misshapen": (misshapen, {}, "model.norm.weight has shape"),
    "words": (other_words, {}, "different tokenizers: 2 of"),
    "cut": (cut, {}, "truncated or altered"),
    "rank": (None, {"rank": 0}, "rank must be at least 1"),
    "energy": (None, {"energy": 1.5}, "energy must lie in"),
    "rest": (None, {"rank": 2, "rest": "dorp"}, "rest is 'exact' or 'drop'"),
    "sites": (None, {"rank": 2, "sites": ["atn.q"]}, "did you mean"),
    "norms": (None, {"rank": 2, "sites": ["norm"]}, "which LoRA cannot change"),
    "idle": (None, {"sites": ["attn.q"]}, "belong to an extraction"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_leave_nothing(tmp_path: Path, case: str) -> None:
    spoil, options, told = BAD[case]
    base, _, _ = pair(tmp_path, lambda n, p, g: None)
    with silent():
        tiny("llama", vocab_size=128).save_pretrained(tmp_path / "t")
    with torch.no_grad(), silent():
        moved = tiny("llama")
        moved.lm_head.weight.add_(0.1)
        moved.save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    if spoil is not None:
        spoil(str(tmp_path / "t"))
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(LuthierError, match=told) as e:
        diff(base, tmp_path / "t", out=tmp_path / "d", **options)
    assert "\n" not in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} == before


def test_other_models(tmp_path: Path) -> None:
    base, _, _ = pair(tmp_path, lambda n, p, g: None)
    with silent():
        tiny("qwen3").save_pretrained(tmp_path / "qwen")
        tiny("llama", vocab_size=tiny("llama").config.vocab_size + 5).save_pretrained(tmp_path / "wide")
        tiny("llama", attention_bias=True).save_pretrained(tmp_path / "bias")
        tiny("llama", hidden_size=64).save_pretrained(tmp_path / "broad")
    for other, told in (
        ("qwen", "is llama .* is qwen3"),
        ("wide", "a vocabulary of another size"),
        ("broad", r"is 128 x 32 in .* and 128 x 64 in .*: not of one base$"),
        ("bias", "has model.layers.0.self_attn.k_proj.bias"),
        ("base", "hold the same values"),
        ("nowhere", "no such folder"),
    ):
        with pytest.raises(LuthierError, match=told):
            diff(base, tmp_path / other, out=tmp_path / "d")
    with pytest.raises(LuthierError, match="lies in .*qwen, which is read"):
        diff(base, tmp_path / "qwen", out=tmp_path / "qwen" / "d")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(LuthierError, match="not empty"):
        diff(base, tmp_path / "qwen", out=tmp_path / "full")
    assert not (tmp_path / "d").exists()


def test_the_command(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, everything)
    done = CliRunner().invoke(app, ["diff", base, tuned, "--out", str(tmp_path / "d"), "--rank", "2", "--no-probes"])
    assert done.exit_code == 0 and "ffn.down" in done.output and "delta" in done.output
    assert (tmp_path / "d" / "delta.json").exists()


def test_what_verify_exits_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where all holds, 1 where a check of a delta says no (a file that is cut among them), 2 where there is none to check."""
    base, tuned, _ = pair(tmp_path, everything)
    diff(base, tuned, out=tmp_path / "d")

    def code(folder: Path) -> int | None:
        with pytest.raises(SystemExit) as left:
            main(["verify", str(folder)])
        return left.value.code  # pyright: ignore[reportReturnType]

    assert code(tmp_path / "d") == 0
    for name in ("delta.safetensors", "probes.safetensors"):
        short = Path(shutil.copytree(tmp_path / "d", tmp_path / name.split(".")[0]))
        cut_file(short / name)
        capsys.readouterr()
        assert code(short) == 1
        said = capsys.readouterr()
        assert f"{name} is truncated or altered" in said.out + said.err
    (tmp_path / "d" / "delta.json").write_text("{")
    assert code(tmp_path / "d") == code(tmp_path / "nowhere") == code(Path(__file__)) == 2


def test_a_stream_is_a_safetensors_file(tmp_path: Path) -> None:
    """Types of several widths, in any order, without their number being known; every tensor aligned."""
    wanted = {
        "a": torch.arange(3, dtype=torch.int16),
        "b": torch.randn(2, 3),
        "c": torch.tensor([True, False, True]),
        "d": torch.randn(5).to(torch.bfloat16),
        "e": torch.arange(2),
        "f": torch.zeros(0, 4),
    }
    stream = TensorStream(tmp_path / "x.safetensors", [*wanted, "never"])
    for name, tensor in wanted.items():
        stream.add(name, tensor)
    assert not (tmp_path / "x.safetensors").exists()
    stream.close()
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    other = TensorStream(tmp_path / "y.safetensors", ["a"])
    other.add("a", wanted["a"])
    other.drop()
    empty = TensorStream(tmp_path / "z.safetensors", [])
    empty.close()
    assert load_file(tmp_path / "z.safetensors") == {}
    assert {p.name for p in tmp_path.iterdir()} == {"x.safetensors", "z.safetensors"}


def test_seals_made_by_rows_are_those_of_the_whole() -> None:
    change = torch.randn(37, 20, generator=torch.Generator().manual_seed(0))
    for flip in (False, True):
        whole = project(change.t() if flip else change)
        for size in (1, 5, 37, 100):
            rows = project_rows(lambda a, b: change[a:b], (37, 20), size, flip)
            assert torch.allclose(torch.tensor(rows), torch.tensor(whole), rtol=1e-4, atol=1e-6)


def test_no_wide_copy_of_a_large_tensor_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces the delta is what it is in one: numbers, seals and what was found."""
    base, tuned, _ = pair(tmp_path, everything, dtype=torch.bfloat16)
    diff(base, tuned, out=tmp_path / "whole", probes=False)
    monkeypatch.setattr(maker, "PIECE", 100)
    most = 0

    def change(now: torch.Tensor, was: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, now.numel())
        return difference(now, was)

    difference = maker.difference
    monkeypatch.setattr(maker, "difference", change)
    diff(base, tuned, out=tmp_path / "pieces", probes=False)
    whole, pieces = Delta.load(tmp_path / "whole"), Delta.load(tmp_path / "pieces")
    assert 0 < most <= 128  # a row at least
    for name, seal in whole.seals.items():
        assert torch.allclose(torch.tensor(pieces.seals[name]), torch.tensor(seal), rtol=1e-3, atol=1e-7)
    one, two = (load_file(tmp_path / n / "delta.safetensors") for n in ("whole", "pieces"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
