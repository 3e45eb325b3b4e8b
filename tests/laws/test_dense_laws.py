"""Deltas as exact differences: any form that folds gives the same model when it is written densely, and round trips are exact."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.algebra.changes import OfDelta
from luthier.algebra.checkpoints import Checkpoint as Stored
from luthier.algebra.dense import to_dense
from luthier.algebra.tuned import Tuned
from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.load import quiet as silent
from luthier.bases.roles import Roles
from luthier.bridge.checkpoint import Checkpoint
from luthier.delta import FORMS, No
from luthier.delta.artefact import Delta
from luthier.delta.seals import check_seals, seals_of
from luthier.errors import LuthierError
from luthier.verbs.diff import diff
from tests.contract.conformance import quiet, shove
from tests.tiny import tiny

QUICK = settings(max_examples=8, deadline=None)
FOLDING = [
    n
    for n in ("lora", "dora", "ia3", "sparse", "bias", "scale-shift")
    if n in FORMS and not isinstance(FORMS[n].dense, No)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense")


@cache
def saved(place: Path, family: str) -> Checkpoint:
    with silent():
        tiny(family).save_pretrained(place / family)
    return Checkpoint(place / family)


def delta_of(name: str, seed: int, family: str = "llama") -> Delta:
    model = tiny(family)
    form = FORMS.make(name, {})
    handle = attached(model)
    handle.add(handle.build(name, form, sites_for(Roles(model), form), seed))
    shove(handle, name, 0.02 * (seed + 1))
    return handle.delta()


def tuned(delta: Delta, family: str) -> Any:
    model = tiny(family)
    delta.apply(model)
    return quiet(model)


@given(st.sampled_from(FOLDING), st.integers(0, 2), st.sampled_from(["gpt2", "phi"]))
@QUICK
def test_dense_is_the_same_model(place: Path, name: str, seed: int, family: str) -> None:
    delta = delta_of(name, seed, family)
    dense = to_dense(delta, saved(place, family))
    assert torch.allclose(tuned(dense, family), tuned(delta, family), atol=1e-4)
    model = tiny(family)
    assert not check_seals(seals_of(dense.apply(model)), dense.seals)


@given(st.integers(0, 2), st.floats(-1, 1), st.floats(0, 1))
@QUICK
def test_arithmetic_carries_over(place: Path, seed: int, factor: float, t: float) -> None:
    a, b = delta_of("lora", seed), delta_of("lora", seed + 1)
    base = saved(place, "llama")
    mixed = to_dense(factor * a - b, base)
    assert torch.allclose(tuned(mixed, "llama"), tuned(factor * a - b, "llama"), atol=1e-4)
    between = tuned(to_dense(a.toward(b, t), base), "llama")
    assert torch.allclose(between, tuned((1 - t) * a + t * b, "llama"), atol=1e-4)
    assert torch.allclose(tuned(0 * a - (-a), "llama"), tuned(a, "llama"), atol=1e-6)
    zero = to_dense(a - a, base)
    assert torch.allclose(tuned(zero, "llama"), quiet(tiny("llama")), atol=1e-5)
    again = to_dense(mixed, base)
    assert all(torch.equal(again.pieces[0].p[k]["bits"], v["bits"]) for k, v in mixed.pieces[0].p.items())


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 5),
    st.sampled_from([1e-3, 1.0, 300.0]),
)
@QUICK
def test_diff_then_apply_is_the_tuned_model(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, seed: int, size: float
) -> None:
    """Bit for bit, whatever the sizes: changes far smaller and far larger than the weights."""
    place = tmp_path_factory.mktemp("pair")
    model, g = tiny("llama").to(dtype), torch.Generator().manual_seed(seed)
    with silent(), torch.no_grad():
        model.save_pretrained(place / "base")
        for p in model.parameters():
            p.add_((torch.randn(p.shape, generator=g) * size).to(dtype))
        model.save_pretrained(place / "tuned")
    diff(place / "base", place / "tuned", out=place / "d", probes=False)
    on = tiny("llama").to(dtype)
    Delta.load(place / "d").apply(on)
    wanted = dict(model.named_parameters())
    assert all(torch.equal(p.view(torch.uint8), wanted[n].view(torch.uint8)) for n, p in on.named_parameters())


def test_what_is_no_change_of_weights(place: Path) -> None:
    with pytest.raises(LuthierError, match="has no weight change"):
        to_dense(delta_of("prefix", 0), saved(place, "llama"))


def test_a_bias_that_the_base_lacks(place: Path) -> None:
    with pytest.raises(LuthierError, match="needs a bias at .*o_proj, which the base lacks"):
        to_dense(delta_of("bias", 0, "qwen2"), saved(place, "qwen2"))


def test_pieces_of_every_kind_at_one_weight(place: Path) -> None:
    """What moves the base, what is added to weights and what chains, in whatever order they were attached: a checkpoint with
    the delta on it, exact differences, and the folded model hold the same weights."""
    base = saved(place, "llama")
    model = tiny("llama")
    handle = attached(model)
    sites = parameter_items(Roles(model), model)
    for k, name in enumerate(("projection", "dora", "lora")):
        form = FORMS.make(name, {})
        handle.add(handle.build(name, form, sites_for(Roles(model), form), k))
        shove(handle, name, 0.02)
    handle.move("full", {n: None for n in sites if "norm" not in n and "embed" not in n})
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for edit in handle.edits["full"].values():
            edit.parameter.add_(0.02 * torch.randn(edit.parameter.shape, generator=draw))
    delta = handle.delta(sites)
    assert [p.name for p in delta.pieces] == ["projection", "dora", "lora", "full"]
    folder = place / "every-kind"
    delta.save(folder)
    handle.fold()
    wanted = {n: p.detach() for n, p in model.named_parameters() if ".luthier." not in n}
    held = Tuned(Stored(place / "llama"), folder)
    told, exact = OfDelta(base, delta), tiny("llama")
    to_dense(delta, base).apply(exact)
    dense = exact.state_dict()
    for name in sites:
        for found in (held.read(name), told.tuned(name), dense[name]):
            assert torch.allclose(found.float(), wanted[name], atol=1e-6), name
