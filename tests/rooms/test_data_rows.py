"""Rows and their account: cuts, drops, refusals, other kinds of bases; the cache; what is shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import cache
from luthier.data import prepare as preparing
from luthier.data.ledger import Ledger
from luthier.data.prepare import prepare
from luthier.data.show import plain, show
from luthier.errors import LuthierError
from tests.rooms.test_data_kit import MARKED, PLAIN, chat, spec, taught, tokenizer, written

LONG = [chat("two?", "the cat sat on a mat " * 9), chat("two? " * 40, "four"), chat("two?", "four")]


def test_truncation_is_counted_and_a_row_that_loses_its_answer_is_caught(tmp_path: Path) -> None:
    path, tok = written(tmp_path, LONG), tokenizer()
    whole = prepare(spec(path), tok)
    sizes = [len(whole.train[i].ids) for i in range(3)]
    assert sizes[0] > 40 and sizes[1] > 40 > sizes[2]
    with pytest.raises(
        LuthierError, match=r"data.jsonl:2: no supervised token after truncation to data.max_length; raise"
    ):
        prepare(spec(path, max_length=40), tok)
    data = prepare(spec(path, max_length=40, unsupervised="drop"), tok)
    found = data.ledger.to_dict()
    assert found["read"] == 3 and found["kept"] == 2 and found["dropped"] == {"unsupervised after truncation": 1}
    assert found["truncated"]["rows"] == 2 and found["truncated"]["tokens"] == sum(sizes[:2]) - 80
    lost = whole.train[0].supervised + whole.train[1].supervised - data.train[0].supervised
    assert found["truncated"]["supervised"] == lost
    assert data.train[0].truncated == sizes[0] - 40 and len(data.train[0].ids) == 40 and data.train[0].eot is False
    assert found["end_of_turn"] == {"rows": 2, "supervised": 1, "share": 0.5, "lost_to_truncation": 1}
    assert data.longest == 40


def test_too_long_can_drop_or_refuse(tmp_path: Path) -> None:
    path, tok = written(tmp_path, LONG), tokenizer()
    data = prepare(spec(path, max_length=40, too_long="drop"), tok)
    assert len(data.train) == 1 and data.ledger.dropped == {"too long": 2} and data.ledger.truncated_rows == 0
    with pytest.raises(LuthierError, match=r"data.jsonl:1: \d+ tokens, more than data.max_length 40"):
        prepare(spec(path, max_length=40, too_long="error"), tok)


def test_an_unsupervised_record_is_refused_or_dropped(tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "two?"}]}
    path, tok = written(tmp_path, [chat("two?", "four"), asked]), tokenizer()
    with pytest.raises(LuthierError, match=r"data.jsonl:2: no supervised token; .*data.unsupervised: drop"):
        prepare(spec(path), tok)
    data = prepare(spec(path, unsupervised="drop"), tok)
    assert len(data.train) == 1 and data.ledger.dropped == {"unsupervised": 1}
    with pytest.raises(LuthierError, match=r"no row is left of .*dropped {'unsupervised': 1}"):
        prepare(spec(written(tmp_path, [asked], "b.jsonl"), unsupervised="drop"), tok)
    with pytest.raises(LuthierError, match="no supervised token"):
        prepare(spec(written(tmp_path, [chat("two?", "four", weight=0)], "c.jsonl")), tok)


def test_ledger_counts_and_survives_json(tmp_path: Path) -> None:
    records = [chat("two?", "four"), chat("two?", "four"), chat("a", "the cat sat on a mat", id=7)]
    data = prepare(spec(written(tmp_path, records)), tokenizer())
    found = data.ledger.to_dict()
    supervised = [data.train[i].supervised for i in range(3)]
    assert found["duplicates"] == 1 and found["tokens"] == int(data.train.lengths.sum())
    assert found["supervised_per_row"] == {
        "min": min(supervised),
        "median": sorted(supervised)[1],
        "max": max(supervised),
        "zero": 0,
    }
    assert found["supervised_tokens"] == sum(supervised) and found["unused_columns"] == {"id": 1}
    assert set(found["fingerprints"]) == {"data", "tokenizer", "template"}
    assert Ledger.from_state(json.loads(json.dumps(data.ledger.state()))) == data.ledger


def test_holdout_and_eval(tmp_path: Path) -> None:
    records = [chat(f"two {i}", f"four {i}") for i in range(10)]
    path, tok = written(tmp_path, records), tokenizer()
    data = prepare(spec(path, holdout=3), tok)
    assert [data.eval[i].where[-2:] for i in range(3)] == [":8", ":9", "10"] and len(data.train) == 7
    assert data.ledger.read == 7
    seen = [w for b in data.eval_batches(2) for w in b["where"]]
    assert sorted(seen) == sorted(data.eval[i].where for i in range(3))
    halves = [[w for b in data.eval_batches(2, r, 2) for w in b["where"]] for r in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(seen)
    other = prepare(spec(path, eval=[{"path": path, "limit": 2}]), tok)
    assert len(other.eval) == 2 and other.eval_ledger.notes == {"rows also in the training data": 2}
    assert list(prepare(spec(path), tok).eval_batches(2)) == []
    with pytest.raises(LuthierError, match="leaves nothing to train on"):
        prepare(spec(path, holdout=10), tok)
    with pytest.raises(LuthierError, match="keep one of them"):
        prepare(spec(path, holdout=1, eval=path), tok)


def test_seq2seq_rows(tmp_path: Path) -> None:
    tok = tokenizer(None)
    path = written(tmp_path, [{"prompt": "two?", "completion": "four"}, {"instruction": "sit", "output": "sat"}][:1])
    data = prepare(spec(path), tok, kind="seq2seq")
    row = data.train[0]
    assert tok.decode(row.ids) == "<|bos|>two?" and tok.decode(row.second) == "<|bos|>four<|end|>"
    assert (row.second_weights == 1).all() and row.supervised == len(row.second) and row.eot
    batch = next(data.batches(1))
    assert batch["weights"].shape == batch["target_ids"].shape == (1, len(row.second))
    short = prepare(spec(path, max_length=2), tok, kind="seq2seq")
    assert short.train[0].truncated and short.train[0].eot is False
    talk = prepare(spec(written(tmp_path, [chat("two?", "four")])), tok, kind="seq2seq")
    assert np.array_equal(talk.train[0].second, row.second)
    with pytest.raises(LuthierError, match="one prompt and one completion"):
        prepare(spec(written(tmp_path, [chat("a", "b", "c", "d")])), tok, kind="seq2seq")


def test_classification_rows(tmp_path: Path) -> None:
    tok = tokenizer(None)
    records: list[dict[str, Any]] = [
        {"text": "the cat", "label": "good"},
        {"text": "a mat", "label": 1, "text_pair": "sat"},
    ]
    path = written(tmp_path, records)
    data = prepare(spec(path), tok, kind="classify", labels=["bad", "good"])
    assert [data.train[i].label for i in (0, 1)] == [1, 1] and data.ledger.supervised_tokens == 2
    assert tok.decode(data.train[1].ids) == "<|bos|>a matsat"
    assert next(data.batches(2))["labels"].tolist() == [1, 1]
    with pytest.raises(LuthierError, match="list the class names in index order in base.labels"):
        prepare(spec(path), tok, kind="classify")
    with pytest.raises(LuthierError, match="unknown label 'good'; did you mean 'goods'"):
        prepare(spec(path), tok, kind="classify", labels=["bad", "goods"])
    with pytest.raises(LuthierError, match="state base.kind: classify"):
        prepare(spec(path), tok)
    with pytest.raises(LuthierError, match="takes columns text and label"):
        prepare(spec(written(tmp_path, [chat("a", "b")], "c.jsonl")), tok, kind="classify")


def test_pairs_need_both_answers_and_sft_counts_the_unused_one(tmp_path: Path) -> None:
    tok = tokenizer()
    path = written(tmp_path, [{"prompt": "two?", "chosen": "four", "rejected": "the cat"}])
    data = prepare(spec(path), tok)
    assert taught(data.train[0], tok) == "four<|end|>" and data.train[0].second is None
    assert data.ledger.notes == {"rejected answers not used: the objective takes single answers": 1}
    assert "note: rejected answers not used: the objective takes single answers" in plain(spec(path), tok, 1)
    with pytest.raises(LuthierError, match="give chosen and rejected"):
        prepare(spec(written(tmp_path, [chat("a", "b")], "b.jsonl")), tok, kind="pair")
    with pytest.raises(LuthierError, match="data.packing is for causal models"):
        prepare(spec(path, packing=True), tok, kind="pair")


def test_packing_is_as_stated_and_rehearsal_meets_the_longest(tmp_path: Path) -> None:
    path, tok = written(tmp_path, LONG * 4), tokenizer()
    data, plain = (prepare(spec(path, packing=packed, max_length=100), tok) for packed in (True, False))
    assert "segments" in next(data.batches(2)) and "segments" not in next(plain.batches(2))
    assert data.longest == 100 and data.longest_batch(2)["input_ids"].shape == (2, 100)
    loose = prepare(spec(path, max_length=1000), tok)
    assert loose.longest_batch(2)["input_ids"].shape == (2, loose.longest) and loose.longest < 1000
    assert data.steps_per_epoch(2) < plain.steps_per_epoch(2) == 6


# --- the cache


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often rows were really made, with a cache of its own."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []
    build = preparing.build
    monkeypatch.setattr(preparing, "build", lambda *a: calls.append(1) or build(*a))
    return calls


def test_cached_rows_are_the_same_mapped_and_made_once(tmp_path: Path, counted: list[int]) -> None:
    path, tok = written(tmp_path, LONG), tokenizer()
    first, second = (prepare(spec(path, cache=True), tok) for _ in range(2))
    fresh = prepare(spec(path), tok)
    assert len(counted) == 2
    assert isinstance(second.train.arrays["ids"], np.memmap) and second.train.arrays["weights"].dtype == np.uint8
    assert first.ledger.to_dict() == second.ledger.to_dict() == fresh.ledger.to_dict()
    for i in range(3):
        a, b = fresh.train[i], second.train[i]
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)
        assert (a.where, a.truncated, a.eot, a.label, a.weight) == (b.where, b.truncated, b.eot, b.label, b.weight)
    prepare(spec(path, cache=True, bucket=3, shuffle=False, packing=True), tok)
    assert len(counted) == 2
    weighted = prepare(spec(path, cache=True, role_weights={"assistant": 0.5}), tok)
    assert weighted.train.arrays["weights"].dtype == np.float32 and weighted.train[0].weights.max() == 0.5


def test_a_stale_cache_cannot_be_met(tmp_path: Path, counted: list[int]) -> None:
    path = written(tmp_path, LONG)
    base = {"cache": True, "max_length": 200}
    prepare(spec(path, **base), tokenizer())
    template_file = tmp_path / "own.jinja"
    template_file.write_text(PLAIN)
    reads_x = PLAIN + "{% if x %}{% endif %}"
    variants: list[tuple[Any, Any]] = [
        (spec(path, **base), tokenizer(MARKED + " ")),
        (spec(path, **base, template=PLAIN + "\n"), tokenizer()),
        (spec(path, **base), tokenizer(reads_x)),
        (spec(path, **base, template_options={"x": 1}), tokenizer(reads_x)),
        (spec(path, **base), tokenizer(bos=False)),
        (spec(path, cache=True, max_length=201), tokenizer()),
        (spec(path, **base, loss_on="last"), tokenizer()),
        (spec(path, **base, thinking="strip"), tokenizer()),
        (spec([{"path": path, "limit": 2}], **base), tokenizer()),
        (spec(path, **base, template=str(template_file) + ""), tokenizer(MARKED)),
    ]
    for n, (one, tok) in enumerate(variants[:-1], 2):
        prepare(one, tok)
        assert len(counted) == n, f"variant {n} met the cache of another"
    prepare(*variants[-1])
    made = len(counted)
    template_file.write_text(PLAIN + "!")
    assert prepare(*variants[-1]).template.endswith("!") and len(counted) == made + 1
    added = tokenizer()
    added.add_tokens(["cat"])
    prepare(spec(path, **base), added)
    assert len(counted) == made + 2
    stat = os.stat(path)
    text = Path(path).read_text()
    Path(path).write_text(text.replace("four", "five"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = prepare(spec(path, **base), tokenizer())
    assert len(counted) == made + 3 and "five" in tokenizer().decode(changed.train[2].ids)


def test_a_damaged_cache_is_made_again_and_no_half_written_one_stays(tmp_path: Path, counted: list[int]) -> None:
    path, tok = written(tmp_path, LONG), tokenizer()
    prepare(spec(path, cache=True), tok)
    (folder,) = cache.cache_folder().iterdir()
    ids = folder / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-8])
    assert prepare(spec(path, cache=True), tok).train.longest and len(counted) == 2
    (folder / "ledger.json").write_text("{")
    prepare(spec(path, cache=True), tok)
    assert len(counted) == 3 and [p.name for p in cache.cache_folder().iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    with pytest.raises(LuthierError, match="set LUTHIER_CACHE, or data.cache: false"):
        prepare(spec(written(tmp_path, LONG), cache=True), tokenizer())


def test_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    tok = tokenizer()
    one = prepare(spec(written(tmp_path, LONG, "a.jsonl")), tok)
    same = prepare(spec(written(tmp_path, LONG, "b.jsonl")), tok)
    other = prepare(spec(written(tmp_path, LONG[:2], "c.jsonl")), tok)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert prepare(spec(str(tmp_path / "a.jsonl"), loss_on="last"), tok).fingerprint != one.fingerprint


# --- showing


def test_show_colours_what_is_taught(tmp_path: Path) -> None:
    path, tok = written(tmp_path, [chat("two?", "four é", "a", "b"), *LONG]), tokenizer()
    first, second = show(spec(path, role_weights={"user": 0.5}), tok, 2)
    painted = {first.plain[s.start : s.end] for s in first.spans if str(s.style) == "green"}
    assert painted == {"four é<|end|>", "b<|end|>"}
    assert "two?⟨0.5⟩" in first.plain and "end-of-turn supervised" in first.plain and "data.jsonl:2" in second.plain
    text = plain(spec(path), tok, 1)
    assert "<|assistant|>⟦four é<|end|>⟧\n<|user|>a<|end|>" in text
    asked = written(tmp_path, [{"messages": [{"role": "user", "content": "two?"}]}], "b.jsonl")
    assert "0 supervised" in plain(spec(asked), tok, 1)
