"""Every move holds what its kind promises: pure, right in shape, indifferent to what softmax does not see."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.delta import MOVES
from luthier.moving.engine import Fusion, Transport, divergence

FUSIONS = [name for name, cls in MOVES.items() if cls.kind == "logits"]
TRANSPORTS = [name for name, cls in MOVES.items() if cls.kind == "weights"]


def drawn(seed: int, members: int, rows: int = 6, vocabulary: int = 17, size: float = 2.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [size * torch.randn(rows, vocabulary, generator=g) for _ in range(members)]


def paired(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def test_the_room_is_swept() -> None:
    assert len(FUSIONS) >= 3 and len(TRANSPORTS) >= 3 and len(FUSIONS) + len(TRANSPORTS) == len(MOVES)


@pytest.mark.parametrize("name", list(MOVES))
def test_facts(name: str) -> None:
    cls = MOVES[name]
    assert issubclass(cls, Fusion if name in FUSIONS else Transport) and cls.paper.startswith("P")
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore
    assert cls.paper in (cls.__doc__ or "") and len(inspect.getsource(cls).splitlines()) <= 60


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("name", FUSIONS)
def test_log_probabilities_and_nothing_written(name: str, pairs: int) -> None:
    large, *rest = drawn(0, 1 + 2 * pairs)
    before = [t.clone() for t in (large, *rest)]
    out = MOVES.make(name, {}).fuse(large, paired(rest))
    assert out.shape == large.shape and out.dtype == torch.float32
    assert torch.allclose(out.logsumexp(-1), torch.zeros(len(large)), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (large, *rest), strict=True))
    half = MOVES.make(name, {}).fuse(large.bfloat16(), [(e.bfloat16(), b.bfloat16()) for e, b in paired(rest)])
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(FUSIONS), seed=st.integers(0, 999), shift=st.floats(-50, 50), pairs=st.integers(1, 3))
def test_what_softmax_does_not_see_changes_nothing(name: str, seed: int, shift: float, pairs: int) -> None:
    """A constant on a row of anyone's logits; the order of tokens; rows asked together or alone."""
    large, *rest = drawn(seed, 1 + 2 * pairs)
    fusion = MOVES.make(name, {})
    out = fusion.fuse(large, paired(rest))
    moved = [t + shift * (n + 1) for n, t in enumerate((large, *rest))]
    assert torch.allclose(fusion.fuse(moved[0], paired(moved[1:])), out, atol=3e-3)
    order = torch.randperm(large.shape[1], generator=torch.Generator().manual_seed(seed))
    turned = fusion.fuse(large[:, order], paired([t[:, order] for t in rest]))
    assert torch.allclose(turned, out[:, order], atol=3e-4)
    alone = torch.cat([fusion.fuse(large[n : n + 1], paired([t[n : n + 1] for t in rest])) for n in range(len(large))])
    assert torch.allclose(alone, out, atol=3e-4)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(FUSIONS), seed=st.integers(0, 999), pairs=st.integers(1, 3))
def test_an_expert_like_its_base_leaves_the_large_model(name: str, seed: int, pairs: int) -> None:
    large, *rest = drawn(seed, 1 + pairs)
    out = MOVES.make(name, {}).fuse(large, [(t, t.clone()) for t in rest])
    assert torch.allclose(out, large.log_softmax(-1), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), pairs=st.integers(2, 3), which=st.sampled_from(FUSIONS))
def test_the_order_of_the_pairs_does_not_matter(seed: int, pairs: int, which: str) -> None:
    large, *rest = drawn(seed, 1 + 2 * pairs)
    fusion, rows = MOVES.make(which, {}), paired(rest)
    assert torch.allclose(fusion.fuse(large, rows), fusion.fuse(large, rows[::-1]), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.1, 3.0))
def test_divergence_grows_with_the_factor(seed: int, size: float) -> None:
    """What the search of dynamic fusion stands on."""
    large, expert, base = drawn(seed, 3, size=size)
    change = expert.log_softmax(-1) - base.log_softmax(-1)
    p = large.log_softmax(-1)
    told = torch.stack([divergence((p + a * change).log_softmax(-1), p) for a in torch.linspace(0, 2, 9)])
    assert bool((told.diff(dim=0) >= -1e-5).all())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("emulated-fine-tuning", {"mix": (0.5, 0.6)}),
        ("emulated-fine-tuning", {"top_p": 1.5}),
        ("dynamic-fusion", {"most": -1.0}),
        ("dynamic-fusion", {"halvings": 0}),
        ("portllm", {"scale": 0.0}),
    ],
)
def test_wrong_settings_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=name):
        MOVES.make(name, wrong)
