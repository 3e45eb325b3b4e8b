"""Probes tell the tuned model from the base, from an altered one and from another altogether."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.delta.probes import TOTAL_TOKENS, _signs, check_probes, probe_inputs, record_probes
from luthier.errors import LuthierError

V, H = 300, 24
g = torch.Generator().manual_seed(0)
EMBED, HEAD = torch.randn(V, H, generator=g), torch.randn(H, V, generator=g)
DELTA = 0.1 * torch.randn(H, 4, generator=g) @ torch.randn(4, V, generator=g)


def model(head: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
    return lambda ids: EMBED[ids].to(dtype).cumsum(1) @ head.to(dtype)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return record_probes(model(HEAD), model(HEAD + DELTA), V, [[1, 2, 3] * 20], seed=5)


@pytest.mark.parametrize(
    ("head", "nearer", "ok"),
    [
        (HEAD + DELTA, "tuned", True),
        (HEAD, "base", False),
        (HEAD + 0.6 * DELTA, "tuned", False),  # a wrong scale
        (HEAD + 2 * DELTA, "neither", False),
        (HEAD - DELTA, "neither", False),
        (torch.randn(H, V, generator=torch.Generator().manual_seed(9)) + DELTA, "neither", False),  # another base
        ((HEAD + DELTA)[:, : V - 1], "neither", False),
        (torch.cat([HEAD + DELTA, torch.zeros(H, 8)], 1), "tuned", True),  # rows added behind the vocabulary
        (HEAD + torch.nan, "neither", False),
    ],
)
def test_verdicts(stored, head, nearer, ok):
    found = check_probes(stored, model(head))
    assert (found.nearer, found.ok) == (nearer, ok), found.reason


def test_another_precision_is_still_this_delta(stored):
    found = check_probes(stored, model(HEAD + DELTA, torch.bfloat16))
    assert found.ok and 0 < found.distance_tuned < 0.2 * found.gap
    assert not check_probes(stored, model(HEAD + DELTA, torch.bfloat16), tolerance=1e-4).ok


def test_a_delta_smaller_than_the_types_difference_is_not_called_missing(stored):
    """A few steps of training in bfloat16, looked at in float32: the base's own change of type is the larger one."""
    small = record_probes(model(HEAD, torch.bfloat16), model(HEAD + 0.002 * DELTA, torch.bfloat16), V, seed=1)
    now = model(HEAD + 0.002 * DELTA)
    assert check_probes(small, now).ok is False
    found = check_probes(small, now, base_fn=model(HEAD))
    assert found.ok is None and "not decided" in found.reason
    # where the delta is large the answer is as sharp as before
    large = record_probes(model(HEAD, torch.bfloat16), model(HEAD + DELTA, torch.bfloat16), V, seed=1)
    assert check_probes(large, model(HEAD + DELTA), base_fn=model(HEAD)).ok
    assert check_probes(large, model(HEAD), base_fn=model(HEAD)).ok is False
    assert check_probes(large, model(HEAD + 2 * DELTA), base_fn=model(HEAD)).ok is False


def test_a_delta_rounded_away_by_merging_is_found():
    base = HEAD.bfloat16().float()
    tuned = base * (1 + 1e-3 * torch.randn(H, V, generator=torch.Generator().manual_seed(1)).sign())
    merged = tuned.bfloat16().float()
    assert torch.equal(merged, base)  # every entry moved by less than half a step of bf16
    kept = record_probes(model(base), model(tuned), V, seed=1)
    found = check_probes(kept, model(merged))
    assert (found.nearer, found.ok) == ("base", False) and found.distance_tuned > 1e-3
    assert check_probes(kept, model(tuned)).ok


def test_distance_estimates_the_root_mean_square_of_all_logits(stored):
    ids = stored["tokens"].split(stored["lengths"].tolist())
    gaps = torch.cat([(model(HEAD + DELTA)(i[None].long()) - model(HEAD)(i[None].long()))[0] for i in ids])
    found = check_probes(stored, model(HEAD))
    assert found.distance_tuned == pytest.approx(float(gaps.pow(2).mean().sqrt()), rel=0.15)
    assert found.gap == pytest.approx(found.distance_tuned, rel=0.15)


def test_inputs_are_few_fixed_and_never_special():
    class Tokenizer:
        all_special_ids = (0, 1, 2)

        def __len__(self) -> int:
            return 50

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert add_special_tokens is False
            return {"input_ids": [3 + ord(c) % 40 for c in text]}

    rows = probe_inputs(Tokenizer(), ["a long prompt " * 9, "b", "", "c" * 400, "d" * 400, "e" * 400], seed=2)
    assert sum(map(len, rows)) <= TOTAL_TOKENS and all(rows)
    assert rows == probe_inputs(Tokenizer(), ["a long prompt " * 9, "b", "", "c" * 400, "d" * 400, "e" * 400], seed=2)
    assert rows != probe_inputs(Tokenizer(), seed=3)
    assert min(i for row in rows for i in row) >= 3
    with pytest.raises(LuthierError, match="no tokenizer"):
        probe_inputs(50, ["text"])


def test_small_even_at_a_large_vocabulary(stored):
    assert sum(t.numel() * t.element_size() for t in stored.values()) < 200_000
    assert stored["base.projected"].shape == (int(stored["lengths"].sum()), 64)
    assert all(t.is_contiguous() for t in stored.values())  # as safetensors wants them


def test_signs_are_the_same_for_ever():
    signs = _signs(4096, 64, 7)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert (signs.T @ signs / 4096 - torch.eye(64)).abs().max() < 0.08
    assert _signs(3, 8, 0).int().tolist() == PINNED


PINNED = [[1, 1, 1, 1, -1, 1, -1, 1], [-1, -1, 1, -1, 1, 1, 1, 1], [1, 1, 1, 1, -1, -1, 1, -1]]


def test_a_cut_file_is_an_error(stored):
    with pytest.raises(LuthierError, match="tuned.projected"):
        check_probes({k: v for k, v in stored.items() if k != "tuned.projected"}, model(HEAD))
    with pytest.raises(LuthierError, match="version 9"):
        check_probes(stored | {"meta": torch.tensor([9, 5, V])}, model(HEAD))


def test_a_classifier_has_probes_too():
    pooled = lambda head: lambda ids: (EMBED[ids].mean(1)) @ head  # noqa: E731
    kept = record_probes(pooled(HEAD[:, :3]), pooled((HEAD + DELTA)[:, :3]), V)
    assert check_probes(kept, pooled((HEAD + DELTA)[:, :3])).ok
    assert check_probes(kept, pooled(HEAD[:, :3])).nearer == "base"


def test_shapes_that_differ_are_an_error():
    with pytest.raises(LuthierError, match="shape"):
        record_probes(model(HEAD), model(HEAD[:, :-1]), V)
