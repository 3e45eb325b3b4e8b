"""Laws of putting deltas on a model and taking them off: what stays is what was put on alone, and the base comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.fingerprint import fingerprint
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from tests.contract.conformance import quiet, shove
from tests.tiny import tiny

QUICK = settings(max_examples=12, deadline=None)
OVER = {"one": ["q_proj"], "two": ["q_proj", "k_proj"], "three": ["k_proj", "v_proj"]}
"""Exact pieces and whose weights they move: each of two meets the one before."""


def moved(name: str, model: PreTrainedModel | None = None, dtype: torch.dtype = torch.float32) -> Delta:
    """An exact delta that moves the weights of OVER[name] of the first layer."""
    model = model or tiny("llama").to(dtype)
    sites = parameter_items(Roles(model))
    names = [n for n in sites if ".layers.0." in n and any(part in n for part in OVER[name])]
    handle = attached(model)
    for edit in handle.move(name, dict.fromkeys(names), None):
        g = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            edit.parameter.add_(0.1 * torch.randn(edit.parameter.shape, generator=g).to(dtype))
    return handle.delta({n: sites[n] for n in names})


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@given(st.permutations(list(OVER)))
@QUICK
def test_exact_pieces_come_off_in_any_order(order: list[str]) -> None:
    deltas = {name: moved(name) for name in OVER}
    model, left = tiny("llama"), list(OVER)
    for delta in deltas.values():
        delta.apply(model)
    for name in order:
        deltas[name].detach(model)
        left.remove(name)
        alone = tiny("llama")
        for other in left:
            deltas[other].apply(alone)
        assert alike(weights(model), weights(alone))
    assert alike(weights(model), weights(tiny("llama")))


def test_all_come_off_at_once() -> None:
    model = tiny("llama")
    for name in OVER:
        moved(name).apply(model)
    attached(model).detach()
    assert alike(weights(model), weights(tiny("llama")))


def low_rank(model: PreTrainedModel, name: str = "low") -> None:
    handle, form = attached(model), FORMS.make("lora", {"rank": 2})
    handle.add(handle.build(name, form, sites_for(Roles(model), form)))
    shove(handle, name, 0.05)


def test_a_folded_model_is_not_folded_again_and_off_is_the_base() -> None:
    model = tiny("llama")
    base = quiet(model)
    moved("one").apply(model)
    low_rank(model)
    handle, put_on = attached(model), weights(model)
    tuned = quiet(model)
    handle.fold()
    folded = quiet(model)
    assert torch.allclose(folded, tuned, atol=1e-5) and not torch.allclose(folded, base, atol=1e-3)
    with pytest.raises(LuthierError, match="before folding it again"):
        handle.fold()
    with pytest.raises(LuthierError, match="unfold it"), handle.off(keep=("low",)):
        pass
    with handle.off():
        assert torch.equal(quiet(model), base)
        with handle.off():
            assert torch.equal(quiet(model), base)
    assert torch.equal(quiet(model), folded)
    handle.unfold()
    assert alike(weights(model), put_on) and torch.equal(quiet(model), tuned)


def test_another_base_is_refused_whatever_is_on_the_model() -> None:
    foreign = moved("three")
    foreign.base["fingerprint"] = fingerprint(tiny("llama", num_hidden_layers=4))
    model = tiny("llama")
    moved("one").apply(model)
    with pytest.raises(LuthierError, match="load the right base"):
        foreign.apply(model)
    own = moved("three")
    own.base["fingerprint"] = fingerprint(tiny("llama"))
    own.apply(model)  # the fingerprint is of the base, not of what stands on it


def test_a_parameter_that_moved_in_a_wider_type_goes_back_to_its_own() -> None:
    model = tiny("llama").to(torch.bfloat16)
    handle = attached(model)
    names = [n for n in parameter_items(Roles(model)) if "q_proj" in n]
    for edit in handle.move("full", dict.fromkeys(names[:1])):
        edit.parameter.data.add_(0.1)
    for edit in handle.move("some", {names[1]: torch.arange(5)}):
        edit.trained.data.add_(0.1)
    handle.after_step()
    assert {model.get_parameter(n).dtype for n in names[:2]} == {torch.float32}
    handle.detach()
    assert alike(weights(model), weights(tiny("llama").to(torch.bfloat16)))


def test_a_delta_that_fails_in_the_middle_leaves_nothing() -> None:
    good, bad = moved("one"), moved("two")
    bad.pieces[0].name = "two"
    key = next(iter(bad.pieces[0].p))
    bad.pieces[0].p[key]["bits"] = bad.pieces[0].p[key]["bits"][:-1]
    model = tiny("llama")
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        Delta([*good.pieces, *bad.pieces]).apply(model, strict=False)
    assert alike(weights(model), weights(tiny("llama")))
    good.apply(model)
