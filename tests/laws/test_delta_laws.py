"""Laws of deltas: sums do not depend on order, parts add up to the whole, and exact differences undo themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS, No
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.parts.bits import INTEGER, decode, encode
from tests.contract.conformance import quiet, shove
from tests.tiny import tiny

ADDING = [name for name in FORMS if FORMS[name].at == "weight"]
QUICK = settings(max_examples=10, deadline=None)


def delta_of(name: str, seed: int = 0) -> Delta:
    """A delta of one form on the tiny Llama, its numbers off their start."""
    model = tiny("llama")
    form = FORMS.make(name, {})
    handle = attached(model)
    handle.add(handle.build(f"{name}{seed}", form, sites_for(Roles(model), form), seed))
    shove(handle, f"{name}{seed}", 0.02 * (seed + 1))
    return handle.delta()


def tuned(delta: Delta) -> torch.Tensor:
    """Logits of the base with the delta on it."""
    model = tiny("llama")
    delta.apply(model)
    return quiet(model)


@given(st.sampled_from(ADDING), st.sampled_from(ADDING), st.integers(0, 3), st.integers(4, 7))
@QUICK
def test_changes_of_weights_add_in_any_order(first: str, second: str, a: int, b: int) -> None:
    x, y = delta_of(first, a), delta_of(second, b)
    assert torch.allclose(tuned(x + y), tuned(y + x), atol=1e-5)


@given(st.sampled_from(sorted(n for n in FORMS if FORMS[n].at != "base")), st.floats(-2, 2, allow_nan=False))
@QUICK
def test_scaling(name: str, factor: float) -> None:
    d = delta_of(name)
    if isinstance(FORMS[name].scales, No):
        if factor != 1:
            with pytest.raises(LuthierError, match="cannot be scaled"):
                factor * d
        return
    assert torch.allclose(tuned(0 * d), quiet(tiny("llama")), atol=1e-6)
    assert torch.equal(tuned(1 * d), tuned(d))
    assert torch.allclose(tuned(factor * (2 * d)), tuned((2 * factor) * d), atol=1e-5)


def weights(site: object) -> torch.Tensor:
    """The tiny Llama's weight at a site."""
    return tiny("llama").get_submodule(site.name).weight.detach()  # pyright: ignore


@given(
    st.sampled_from(ADDING), st.sets(st.sampled_from(["attn.q", "attn.k", "attn.v", "attn.o"]), min_size=1, max_size=3)
)
@QUICK
def test_parts_add_up_to_the_whole(name: str, kept: set[str]) -> None:
    """A partition of the sites: the changes of both parts together are the change of the whole, and so are the logits."""
    d = delta_of(name)
    rest = {"attn.q", "attn.k", "attn.v", "attn.o", "ffn"} - kept
    one, other = d.only(*sorted(kept)), d.only(*sorted(rest))
    whole = dict(d.tensors(weights))
    parts = {**dict(one.tensors(weights)), **dict(other.tensors(weights))}
    assert set(parts) == set(whole) and all(torch.equal(parts[n], whole[n]) for n in whole)
    assert one.count() + other.count() == d.count()
    assert torch.allclose(tuned(one + other), tuned(d), atol=1e-5)


@given(st.sampled_from(ADDING), st.floats(-1.5, 1.5, allow_nan=False))
@QUICK
def test_tensors_are_linear(name: str, factor: float) -> None:
    d = delta_of(name)
    for (n, a), (m, b) in zip(d.tensors(weights), (factor * d).tensors(weights), strict=True):
        assert n == m and torch.allclose(a * factor, b, atol=1e-6)


BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16, torch.float64: 64}


@given(st.data(), st.sampled_from(sorted(INTEGER, key=str)))
@settings(max_examples=200, deadline=None)
def test_differences_of_bit_patterns_are_exact(data: st.DataObject, dtype: torch.dtype) -> None:
    """Any two bit patterns, NaNs with payloads, both zeros, infinities and subnormals among them."""
    bits = BITS[dtype]
    pattern = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    special = [
        v.view(INTEGER[dtype]).item() for v in torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    ]
    rows = st.lists(
        st.tuples(pattern | st.sampled_from(special), pattern | st.sampled_from(special)), min_size=1, max_size=8
    )
    pairs = torch.tensor(data.draw(rows), dtype=INTEGER[dtype])
    tuned_, base = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    back = decode(encode(tuned_.view(dtype), base.view(dtype)), base.view(dtype), dtype)
    assert torch.equal(back.view(INTEGER[dtype]), tuned_)


def test_differences_from_a_narrower_base_are_exact() -> None:
    """A bf16 base widens to float32 exactly, so the difference taken in float32 gives the tuned values bit for bit."""
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        for v in model.parameters():
            v.copy_(v.to(torch.bfloat16))
    base = model.get_parameter(name).detach().clone()
    wanted = base + torch.randn(base.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    difference = encode(wanted, base.to(torch.bfloat16))
    assert torch.equal(decode(difference, base.to(torch.bfloat16), torch.float32), wanted)


def test_adding_deltas_of_other_bases_is_refused() -> None:
    a, b = delta_of("lora"), delta_of("lora", 1)
    a.base, b.base = {"fingerprint": "one"}, {"fingerprint": "two"}
    with pytest.raises(LuthierError, match="different bases"):
        a + b


def test_arithmetic_keeps_the_files_and_says_what_it_was_made_of(tmp_path: Path) -> None:
    one, two = delta_of("lora", 1), delta_of("ia3", 2)
    one.files, two.files = {"t.json": b"1", "c.jinja": b"x"}, {"t.json": b"2", "d": b"y"}
    assert (2 * one).files == one.only("attn.q").files == one.files
    assert (one + two).files == {"t.json": b"1", "c.jinja": b"x", "d": b"y"}
    assert (one + two).lineage == {"parents": [], "made_by": "add"}
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    assert one.id == Delta.load(tmp_path / "one").id != two.id
    assert one.toward(two, 0.5).lineage == {"parents": [one.id, two.id], "made_by": "add"}


def test_adding_deltas_with_other_tokens_is_refused() -> None:
    one, two = delta_of("lora", 1), delta_of("lora", 2)
    one.base["new_tokens"], two.base["new_tokens"] = ["<a>"], ["<a>", "<b>"]
    assert (one + two).base["new_tokens"] == (two + one).base["new_tokens"] == ["<a>", "<b>"]
    two.base["new_tokens"] = ["<b>"]
    with pytest.raises(LuthierError, match="add other tokens"):
        one + two
