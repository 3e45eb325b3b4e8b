"""Batches: every row once, the same everywhere, resumable anywhere; packing mixes nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.cache import gather
from luthier.data.collate import Collate, segment_mask
from luthier.data.order import Batches, permutation
from luthier.data.pack import first_fit_decreasing
from luthier.data.rows import Row
from luthier.errors import LuthierError


def rows(n: int, seed: int = 0, longest: int = 12) -> Any:
    draw = np.random.default_rng(seed)
    made = []
    for i in range(n):
        length = int(draw.integers(2, longest + 1))
        weights = np.ones(length, np.float32)
        weights[0] = 0
        made.append(Row(np.full(length, i + 10, np.int32), weights, f"r{i}", eot=True))
    return gather(made)


def draw_epoch(over: Batches) -> list[dict[str, Any]]:
    return list(over.one_epoch())


CASES = {
    "n": st.integers(1, 60),
    "size": st.integers(1, 7),
    "bucket": st.integers(1, 5),
    "world": st.integers(1, 3),
    "seed": st.integers(0, 5),
    "shuffle": st.booleans(),
    "packed": st.booleans(),
    "stop": st.integers(0, 200),
}


@settings(max_examples=120, deadline=None)
@given(**CASES)
def test_every_row_once_on_all_ranks_and_resumes_exactly(
    n: int, size: int, bucket: int, world: int, seed: int, shuffle: bool, packed: bool, stop: int
) -> None:
    store = rows(n)

    def ranks() -> list[Batches]:
        common = {"seed": seed, "world": world, "shuffle": shuffle, "bucket": bucket, "window": 16}
        common["capacity"] = 16 if packed else None
        return [Batches(store, size, collate=Collate(0, packed=packed), rank=r, **common) for r in range(world)]

    for epoch in range(2):
        running = ranks()
        for one in running:
            one.epoch = epoch
        drawn = [draw_epoch(one) for one in running]
        assert len({len(d) for d in drawn}) == 1 and len(drawn[0]) == running[0].per_epoch
        seen = [w for d in drawn for b in d for w in b["where"]]
        assert sorted(seen) == sorted(f"r{i}" for i in range(n))
        assert sum(float(b["weights"].sum()) for d in drawn for b in d) == float((store.lengths - 1).sum())
        assert [b["last"] for b in drawn[0]] == [False] * (len(drawn[0]) - 1) + [True]

    whole, cut = ranks()[-1], ranks()[-1]
    steps = stop % (2 * whole.per_epoch)
    for _ in range(steps):
        next(whole), next(cut)
    again = ranks()[-1]
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    for _ in range(3):
        a, b = next(whole), next(again)
        assert a["where"] == b["where"] and a["last"] == b["last"]
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["weights"], b["weights"])


def test_order_is_pinned_and_differs_between_epochs_and_seeds() -> None:
    assert permutation(8, 0, 0, 0, 1).tolist() == PINNED
    store, collate = rows(40), Collate(0)
    orders = [[b["where"] for b in draw_epoch(Batches(store, 4, collate=collate, seed=s))] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    two = Batches(store, 4, collate=collate)
    assert [b["where"] for b in draw_epoch(two)] != [b["where"] for b in draw_epoch(two)]


PINNED = [0, 5, 3, 7, 1, 2, 4, 6]
"""Another numpy or machine must draw the same: a resumed run counts on it."""


def test_without_shuffle_and_with_bucket_one_the_order_is_the_files() -> None:
    over = Batches(rows(10), 3, collate=Collate(0), shuffle=False, bucket=1)
    assert [w for b in draw_epoch(over) for w in b["where"]] == [f"r{i}" for i in range(10)]


def test_buckets_pad_less() -> None:
    store = rows(400, longest=100)

    def padding(bucket: int) -> int:
        found = draw_epoch(Batches(store, 8, collate=Collate(0), bucket=bucket))
        return sum(int((b["attention_mask"] == 0).sum()) for b in found)

    assert padding(50) < padding(1) / 5


def test_resuming_under_other_settings_is_refused_by_name() -> None:
    store = rows(20)
    state = Batches(store, 4, collate=Collate(0)).state_dict()
    with pytest.raises(LuthierError, match="batch_size 4 -> 8"):
        Batches(store, 8, collate=Collate(0)).load_state_dict(state)
    with pytest.raises(LuthierError, match="rows 20 -> 19; seed 0 -> 1; world 1 -> 2"):
        Batches(rows(19), 4, collate=Collate(0), seed=1, world=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("batch", "accumulate", "world", "steps"), [(4, 1, 1, 5), (4, 2, 1, 3), (3, 1, 2, 4), (3, 3, 2, 2)]
)
def test_steps_per_epoch(batch: int, accumulate: int, world: int, steps: int) -> None:
    assert Batches(rows(20), batch, collate=Collate(0), world=world).steps_per_epoch(accumulate) == steps


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 60))
def test_first_fit_decreasing_holds_everything_once(lengths: list[int], capacity: int) -> None:
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    slow: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, used in enumerate(slow) if used + length <= capacity), None)
        if at is None:
            slow.append(length)
        else:
            slow[at] += length
    assert len(slow) == len(bins)


def test_packed_batch_keeps_records_apart() -> None:
    store = rows(30)
    over = Batches(store, 2, collate=Collate(0, packed=True), capacity=24, window=30)
    tokens = 0
    for batch in draw_epoch(over):
        ids, segments, positions = batch["input_ids"], batch["segments"], batch["position_ids"]
        for line in range(len(ids)):
            for number in range(1, int(segments[line].max()) + 1):
                own = segments[line] == number
                assert len(set(ids[line][own].tolist())) == 1
                assert positions[line][own].tolist() == list(range(int(own.sum())))
                assert float(batch["weights"][line][own][0]) == 0
                tokens += int(own.sum())
        assert torch.equal(batch["attention_mask"] > 0, segments > 0)
        assert float(batch["weights"][segments == 0].sum()) == 0 and ids.shape[1] <= 24
    assert tokens == int(store.lengths.sum())
    assert over.total < 15


def test_segment_mask_is_causal_and_block_diagonal() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 0]])
    mask = segment_mask(segments, torch.float32)
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert mask.dtype == torch.float32 and mask.min() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_logits_are_the_unpacked_ones(attention: str) -> None:
    from tests.tiny import tiny

    model = tiny("llama", attn_implementation=attention)
    draw = np.random.default_rng(0)
    made = [Row(draw.integers(3, 120, 9).astype(np.int32), np.ones(9, np.float32), f"r{i}") for i in range(3)]
    packed = Collate(0, packed=True)([[made[0], made[1], made[2]]])
    with torch.no_grad():
        mask = segment_mask(packed["segments"], torch.float32)
        got = model(
            packed["input_ids"], attention_mask=mask, position_ids=packed["position_ids"], use_cache=False
        ).logits
        alone = Collate(0)([[r] for r in made])
        want = model(alone["input_ids"], attention_mask=alone["attention_mask"], use_cache=False).logits
    assert torch.allclose(got.reshape(3, 9, -1), want, atol=1e-5)


def test_collated_kinds() -> None:
    pair = Row(
        np.array([5, 6]), np.array([0, 1.0]), "a", second=np.array([5, 7, 8]), second_weights=np.array([0, 1, 1.0])
    )
    both = Collate(0, "pair")([[pair], [pair]])
    assert both["pairs"] == 2 and both["input_ids"].tolist() == [[5, 6, 0], [5, 6, 0], [5, 7, 8], [5, 7, 8]]
    assert both["weights"].tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1]] and both["where"] == ["a", "a"]
    seq = Collate(0, "seq2seq")([[pair]])
    assert seq["input_ids"].tolist() == [[5, 6]] and seq["target_ids"].tolist() == [[5, 7, 8]]
    assert seq["weights"].tolist() == [[0, 1, 1]] and seq["target_mask"].tolist() == [[1, 1, 1]]
    named = Collate(0, "classify")([[Row(np.array([5]), np.zeros(1), "a", label=2, weight=0.5)]], silent=True)
    assert named["labels"].tolist() == [2] and named["label_weights"].tolist() == [0] and named["where"] == []
