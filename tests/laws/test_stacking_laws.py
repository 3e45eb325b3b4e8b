"""Laws of stacking: a stack of low-rank deltas is their weighted sum, whatever their ranks, scalings and sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.algebra.stacking import stack, why_not
from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.delta.seals import check_seals, seals_of
from luthier.errors import LuthierError
from tests.contract.conformance import quiet, shove
from tests.tiny import tiny

QUICK = settings(max_examples=10, deadline=None)
SETTINGS = (
    {"rank": 2},
    {"rank": 4, "alpha": 3.0},
    {"rank": 8, "scaling": "rslora"},
    {"rank": 3, "ranks": {"*.0.*": 5}, "alphas": {"*.1.*": 1.0}},
)
SITES = (None, ["attn.q", "attn.v"], ["attn.o", "*.down"])


def delta_of(name: str, seed: int, family: str = "llama", sites: Any = None, **given: Any) -> Delta:
    model = tiny(family)
    form = FORMS.make(name, given)
    handle = attached(model)
    handle.add(handle.build(name, form, sites_for(Roles(model), form, sites), seed))
    shove(handle, name, 0.02 * (seed + 1))
    return handle.delta()


def dense(delta: Delta) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, change in delta.tensors():
        out[name] = out.get(name, 0) + change
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-5) -> bool:
    return set(a) == set(b) and all(torch.allclose(a[n], b[n], atol=atol) for n in a)


weights = st.floats(-2, 2, allow_nan=False)
pairs = st.tuples(st.sampled_from(SETTINGS), st.sampled_from(SITES), st.integers(0, 3))


@given(pairs, pairs, weights, weights, st.sampled_from(["llama", "gpt2", "qwen2_moe"]))
@QUICK
def test_a_stack_is_the_weighted_sum(one: Any, two: Any, v: float, w: float, family: str) -> None:
    a = delta_of("lora", one[2], family, one[1], **one[0])
    b = delta_of("lora", two[2], family, two[1], **two[0])
    both = stack([a, b], [v, w])
    assert same(dense(both), dense(v * a + w * b))
    assert same(dense(stack([b, a], [w, v])), dense(both))
    assert same(dense(stack([a])), dense(a))
    assert same(dense(stack([a, a], [0.25, 0.75])), dense(a))
    assert same(dense(a.toward(b, 0.0)), {**{n: 0 * t for n, t in dense(b).items()}, **dense(a)})
    assert same(dense(stack([a - a])), {n: 0 * t for n, t in dense(a).items()})
    model = tiny(family)
    handle = both.apply(model)
    assert not check_seals(seals_of(handle), both.seals)
    tuned = quiet(model)
    both.detach(model)
    (v * a + w * b).apply(model)
    assert torch.allclose(quiet(model), tuned, atol=1e-4)


def test_ranks_add_up_and_are_trimmed() -> None:
    a, b = delta_of("lora", 0, rank=4), delta_of("lora", 1, rank=2)
    both = stack([a, b], [1.0, -0.5])
    assert {v["A"].shape[0] for v in both.pieces[0].p.values()} == {6}
    assert both.count() == sum(6 * (s.d_in + s.d_out) for s in both.pieces[0].sites.values())
    assert same(dense(stack([a, b], [1.0, -0.5], rank=6)), dense(both))
    small = stack([a, b], [1.0, -0.5], rank=3)
    for name, whole in dense(both).items():
        best = torch.linalg.svdvals(whole)[3:].square().sum()
        assert torch.isclose((dense(small)[name] - whole).square().sum(), best, rtol=1e-3, atol=1e-9)
    assert {v["A"].shape[0] for v in stack([a, a]).pieces[0].p.values()} == {8}
    assert {v["A"].shape[0] for v in stack([a, a], energy=1.0).pieces[0].p.values()} == {4}


def test_saved_and_loaded(tmp_path: Any) -> None:
    both = stack([delta_of("lora", 0, sites=["attn.q"], rank=4), delta_of("lora", 1, rank=2)])
    both.save(tmp_path / "d")
    assert same(dense(Delta.load(tmp_path / "d")), dense(both), 0.0)


def test_refusals() -> None:
    a = delta_of("lora", 0)
    assert why_not([a]) is None
    with pytest.raises(LuthierError, match="DoRA.*full rank"):
        stack([a, delta_of("dora", 0)])
    with pytest.raises(LuthierError, match="form 'ia3'"):
        stack([delta_of("ia3", 0)])
    with pytest.raises(LuthierError, match="1 weights for 2"):
        stack([a, a], [1.0])
    with pytest.raises(LuthierError, match="energy must lie"):
        stack([a], energy=1.5)
    with pytest.raises(LuthierError, match="rank must"):
        stack([a], rank=0)
    b = delta_of("lora", 1)
    a.base, b.base = {"fingerprint": "a:b:float32"}, {"fingerprint": "c:d:float32"}
    with pytest.raises(LuthierError, match="different bases: a:b:float32"):
        stack([a, b])
    next(iter(a.pieces[0].p.values()))["A"][0, 0] = torch.nan
    with pytest.raises(LuthierError, match="NaN"):
        stack([a])
