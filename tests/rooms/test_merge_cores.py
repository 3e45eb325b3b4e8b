"""A merge gives the same numbers on one core or several, alone in memory or in company, in whatever pieces."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.algebra import driver
from luthier.algebra.driver import Crew
from luthier.algebra.loads import Pool, finite
from luthier.merging import della, engine, slerp
from luthier.parts import trims
from luthier.parts.draws import Draw
from luthier.parts.spread import alone
from luthier.verbs.merge import merge

SPAN = 1 << 16
SHAPES = {"up_proj": (700, 301), "down_proj": (301, 700), "gate_proj": (64, 64)}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two tuned ones in bfloat16, with tensors of several spans and many equal magnitudes."""
    at = tmp_path_factory.mktemp("cores")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    g = torch.Generator().manual_seed(0)
    base = {f"model.layers.0.mlp.{n}.weight": torch.randn(s, generator=g) for n, s in SHAPES.items()}
    assert max(t.numel() for t in base.values()) > 3 * SPAN
    for k, name in enumerate(("base", "a", "b")):
        (at / name).mkdir()
        (at / name / "config.json").write_text(json.dumps(config))
        g = torch.Generator().manual_seed(k)
        rows = {n: (t + (0.1 * torch.randn(t.shape, generator=g) if k else 0)).bfloat16() for n, t in base.items()}
        save_file(rows, at / name / "model.safetensors", {"format": "pt"})
    return at


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def merged(shelf: Path, out: Path, method: str) -> dict[str, torch.Tensor]:
    plan: dict[str, Any] = {"method": method, "models": [str(shelf / n) for n in "ab"], "base": str(shelf / "base")}
    if method == "slerp":
        plan |= {"models": [str(shelf / "a")], "t": 0.3}
    elif method == "linear":
        plan = {"method": method, "models": plan["models"], "weight": 0.5}
    else:
        plan |= {"weight": 0.5, "density": 0.4}
    merge(plan, out=out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "breadcrumbs_ties", "dare_ties", "della"])
def test_cores_and_company_change_nothing(
    method: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setattr(slerp, "PIECE", 1000)
    monkeypatch.setattr(trims, "SMALL", 0)
    torch.set_num_threads(1)
    whole = merged(shelf, tmp_path / "whole", method)
    for room in (engine, della, trims):
        monkeypatch.setattr(room, "SPAN", SPAN)
    one = merged(shelf, tmp_path / "one", method)
    torch.set_num_threads(3)
    three = merged(shelf, tmp_path / "three", method)
    monkeypatch.setattr(driver, "room", lambda: 1)  # nothing fits beside anything
    together = merged(shelf, tmp_path / "together", method)
    assert len(one) == len(SHAPES)
    for other in (whole, three, together):
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_crew_gives_what_one_gives_in_the_order_of_the_pieces() -> None:
    crew = Crew(3)
    try:
        for n in (0, 1, 10, 1000):
            assert crew.over(n, lambda a, b: (a, b), 7) == alone(n, lambda a, b: (a, b), 7)
        with pytest.raises(ZeroDivisionError):
            crew.over(100, lambda a, b: 1 // (a - 49), 7)
    finally:
        crew.close()


def test_draws_are_read_at_any_place() -> None:
    draw = Draw(torch.Generator().manual_seed(3))
    whole = draw.uniform(0, 1001)
    assert 0 <= float(whole.min()) and float(whole.max()) < 1
    for a, n in ((700, 301), (1, 2), (333, 1), (0, 64)):
        assert torch.equal(draw.uniform(a, n), whole[a : a + n])
    assert not torch.equal(Draw(torch.Generator().manual_seed(4)).uniform(0, 1001), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_number_that_is_none_is_seen(dtype: torch.dtype) -> None:
    x = torch.randn(300_000).to(dtype)
    assert finite(x) and finite(x[:0]) and finite(torch.full((5,), torch.finfo(dtype).max, dtype=dtype))
    for bad in (math.inf, -math.inf, math.nan):
        for at in (0, 200_001, -1):
            y = x.clone()
            y[at] = bad
            assert not finite(y)


def test_a_pool_gives_buffers_again_and_keeps_no_more_than_stated() -> None:
    pool = Pool(100)
    a, b = pool.get(40), pool.get(60)
    kept = {a.data_ptr(), b.data_ptr()}
    pool.put([a, b])
    assert {pool.get(40).data_ptr(), pool.get(60).data_ptr()} == kept
    pool.put([a, b])
    pool.get(40)
    pool.put([torch.empty(80, dtype=torch.uint8)])  # the 60 were asked for longest ago
    assert pool.get(60).data_ptr() != b.data_ptr()
    view, buffer = pool.like(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert view.shape == (3, 5) and view.dtype == torch.bfloat16 and view.data_ptr() == buffer.data_ptr()
