"""Streaming: the same rows as the store, every one once, resumed without reading again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data import prepare as preparing
from luthier.data.prepare import prepare
from luthier.errors import LuthierError
from tests.rooms.test_data_kit import chat, spec, tokenizer, written

RECORDS = [chat(f"two {i}", "the cat sat " * (i % 5 + 1)) for i in range(90)]
for at in (3, 40, 41):
    RECORDS[at] = {"messages": [{"role": "user", "content": "a"}]}
TOKENIZER = tokenizer()
KEPT = [i for i in range(90) if i not in (3, 40, 41)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    written(folder, RECORDS[:50], "a.jsonl")
    written(folder, RECORDS[50:], "b.jsonl")
    return folder


def streamed(files: Path, **more: Any) -> Any:
    return prepare(spec(str(files), **{"stream": True, "window": 16, "unsupervised": "drop", **more}), TOKENIZER)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 7),
    world=st.integers(1, 3),
    stop=st.integers(0, 60),
    packing=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_row_once_and_an_exact_resume(
    files: Path, size: int, world: int, stop: int, packing: bool, shuffle: bool
) -> None:
    more = {"packing": packing, "max_length": 80, "shuffle": shuffle}
    ranks = [streamed(files, **more).batches(size, r, world) for r in range(world)]
    drawn = [list(one.one_epoch()) for one in ranks]
    assert len({len(d) for d in drawn}) == 1
    seen = sorted(w.split("/")[-1] for d in drawn for b in d for w in b["where"])
    assert seen == sorted(f"a.jsonl:{i + 1}" if i < 50 else f"b.jsonl:{i - 49}" for i in KEPT)
    cut = streamed(files, **more).batches(size, world - 1, world)
    whole = streamed(files, **more).batches(size, world - 1, world)
    for _ in range(stop):
        next(whole), next(cut)
    again = streamed(files, **more).batches(size, world - 1, world)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    for _ in range(3):
        a, b = next(whole), next(again)
        assert a["where"] == b["where"] and torch.equal(a["input_ids"], b["input_ids"]) and a["last"] == b["last"]
    assert again.maker.ledger == whole.maker.ledger


def test_rows_and_ledger_are_the_stores(files: Path) -> None:
    data, store = streamed(files), streamed(files, stream=False)
    assert data.streaming and not store.streaming and store.train is not None
    rows = {w: b["input_ids"][i] for b in data.batches(1).one_epoch() for i, w in enumerate(b["where"])}
    for i in range(len(store.train)):
        row = store.train[i]
        assert rows[row.where].tolist() == row.ids.tolist()
    a, b = data.ledger.to_dict(), store.ledger.to_dict()
    skip = ("scope", "duplicates")
    assert {k: v for k, v in a.items() if k not in skip} == {k: v for k, v in b.items() if k not in skip}


def test_shuffles_differ_by_epoch_and_length_buckets_hold(files: Path) -> None:
    over = streamed(files, window=64).batches(4)
    first, second = ([b["where"] for b in over.one_epoch()] for _ in range(2))
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))


def test_holdout_steps_and_rehearsal(files: Path) -> None:
    data = streamed(files, holdout=10)
    seen = {w for b in data.batches(4).one_epoch() for w in b["where"]}
    held = {data.eval[i].where for i in range(len(data.eval))}
    assert len(held) == 10 and not seen & held and len(seen) == 77
    assert data.steps_per_epoch(4) == 20 and data.steps_per_epoch(4, 2, 2) == 5
    assert streamed(files, packing=True).steps_per_epoch(4) is None
    assert data.longest == 1024 and data.longest_batch(2)["input_ids"].shape == (2, 1024)


def test_auto_streams_above_the_limit(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not streamed(files, stream="auto").streaming
    monkeypatch.setattr(preparing, "STREAM_ABOVE", 89)
    assert streamed(files, stream="auto").streaming


def test_the_first_window_is_checked_before_step_one_and_the_rest_while_streaming(files: Path, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=r"a.jsonl:4: no supervised token"):
        streamed(files, unsupervised="error")
    many = [chat(f"two {i}", "four") for i in range(600)] + [{"messages": [{"role": "user", "content": "a"}]}]
    path = written(tmp_path, many)
    late = prepare(spec(path, stream=True, window=256), tokenizer())
    assert late.ledger.kept == 256
    over = late.batches(8)
    with pytest.raises(LuthierError, match=r"data.jsonl:601: no supervised token"):
        list(over.one_epoch())


def test_other_settings_are_refused_on_resume(files: Path) -> None:
    state = streamed(files).batches(4).state_dict()
    with pytest.raises(LuthierError, match="batch_size 4 -> 2"):
        streamed(files).batches(2).load_state_dict(state)
