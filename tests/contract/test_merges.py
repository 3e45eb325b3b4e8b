"""What every merge must do, swept over the registry."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier.merging
from luthier.delta import MERGES, Merge, Stack

SHAPES: tuple[tuple[int, ...], ...] = ((6, 10), (1, 1), (7, 1), (1, 9), (5,), (1,), (3, 4, 5), (0, 4), (0,), (513, 257))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATED: dict[str, dict[str, Any]] = {"nearswap": {"t": 0.01}}
"""Settings without a default."""
VALUES = {"weight": 0.5, "density": 0.4, "gamma": 0.1, "epsilon": 0.15, "scale": 1.5}


def make(name: str) -> Merge:
    return MERGES.make(name, STATED.get(name, {}))


def stack(name: str, shape: tuple[int, ...] = (6, 10), dtype: torch.dtype = torch.float32, seed: int = 0) -> Stack:
    """As many models as the merge takes, at most three, and a base where it takes one."""
    cls, g = MERGES[name], torch.Generator().manual_seed(seed)
    least, most = cls.models
    count = max(least, min(3, most or 3))
    base = (torch.randn(shape, generator=g) * 0.02).to(dtype)
    models = [(base.float() + torch.randn(shape, generator=g) * 0.003).to(dtype) for _ in range(count)]
    each = {k: [VALUES[k]] * count for k in cls.each}
    generator = torch.Generator().manual_seed(seed) if cls.draws else None
    return Stack("w", models, None if cls.base == "unused" else base, each, "attn.q", 1, 3, generator)


def merged(name: str, t: Stack) -> Tensor:
    merge = make(name)
    if merge.looks:
        t = dataclasses.replace(t, measured={t.name: merge.measure(t)})
        if t.generator:
            t.generator.manual_seed(0)
    return merge.merge(t)


@pytest.fixture(params=list(MERGES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_type_and_values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = stack(name, shape, dtype)
    before = [x.clone() for x in (*t.tensors, *([t.base] if t.base is not None else []))]
    out = merged(name, t)
    assert out.shape == shape
    assert out.dtype == dtype or (MERGES[name].widens and out.dtype == torch.float32)
    assert torch.isfinite(out).all()
    after = [*t.tensors, *([t.base] if t.base is not None else [])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"
    owned = {x.untyped_storage().data_ptr() for x in after if x.numel()}
    assert not out.numel() or out.untyped_storage().data_ptr() not in owned, "an input was handed out"


def test_same_seed_same_result(name: str) -> None:
    big = (513, 257)
    assert torch.equal(merged(name, stack(name, big)), merged(name, stack(name, big)))
    if MERGES[name].draws and name not in ("arcee_fusion", "lines"):
        other = stack(name, big)
        assert other.generator is not None
        other.generator.manual_seed(7)
        assert not torch.equal(merged(name, stack(name, big)), make(name).merge(other))


def test_pieces_give_what_the_whole_gives(name: str) -> None:
    if not MERGES[name].pointwise:
        pytest.skip("looks at the whole tensor")
    t = stack(name, (64, 33))
    whole = merged(name, t).reshape(-1)
    cuts = [slice(0, 700), slice(700, 701), slice(701, None)]
    flat = [x.reshape(-1) for x in t.tensors]
    base = None if t.base is None else t.base.reshape(-1)
    parts = [
        merged(name, dataclasses.replace(t, tensors=[x[c] for x in flat], base=None if base is None else base[c]))
        for c in cuts
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_transposed_inputs_are_read_right(name: str) -> None:
    t = stack(name, (6, 10))
    turned = dataclasses.replace(
        t,
        tensors=[x.t().contiguous().t() for x in t.tensors],
        base=None if t.base is None else t.base.t().contiguous().t(),
        generator=stack(name).generator,
    )
    assert torch.allclose(merged(name, turned), merged(name, t), atol=1e-7)


def test_settings_and_facts_are_stated(name: str) -> None:
    cls = MERGES[name]
    assert cls.__doc__ and cls.base in ("needed", "optional", "unused")
    least, most = cls.models
    assert least >= 1 and (most is None or most >= least)
    assert set(cls.each) <= set(VALUES)
    if cls.searches:
        found = make(name).search(2, lambda each: -abs(each["weight"][0] - 0.2))
        assert set(found) <= set(cls.each) and all(len(v) == 2 for v in found.values())
    if cls.units:
        method: Any = make(name)
        eye, blocks = torch.eye(4, dtype=torch.float64), method.match(torch.eye(4))
        assert torch.equal(method.solve(eye, eye, torch.eye(4), blocks, blocks), torch.eye(4))
    if cls.factors:
        g = torch.Generator().manual_seed(0)
        pairs = [(torch.randn(4, 10, generator=g), torch.randn(6, 4, generator=g)) for _ in range(3)]
        a, b = make(name).merge_factors(pairs, stack(name, (1,)))
        assert a.shape == (4, 10) and b.shape == (6, 4)


def test_the_suite_counts_itself() -> None:
    files = {p.stem for p in Path(luthier.merging.__path__[0]).glob("*.py")} - {"__init__", "engine"}
    assert files == {MERGES[n].__module__.rsplit(".", 1)[1] for n in MERGES} and len(MERGES) >= 26
