"""Every choice of the registry, and the exact forms it leaves behind: what moves, what stays, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.attach import Attached, attached
from luthier.attach.sites import parameter_items
from luthier.bases.roles import Roles
from luthier.choices.engine import Choice, ChoiceContext, Pick, layer_of, layout
from luthier.delta import CHOICES, FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.training.run import build
from luthier.verbs.dry_run import dry_run
from tests.contract.conformance import logits, quiet, same, steps, values
from tests.runs.support import World
from tests.tiny import FAMILIES, tiny, tiny_ids

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "pick": [
        {"granularity": "row", "within": "tensor", "fraction": 0.25, "of": ["attn", "ffn"], "score": "magnitude"},
        {"granularity": "layer", "count": 1, "score": "gradient", "always": ["head"], "of": ["attn", "ffn", "norm"]},
    ],
    "lisa": [{"layers_active": 1, "every": 3}],
    "norm": [{}, {"fraction": 0.3}],
}
"""Settings other than the defaults; a choice that is not named here is tried with its own."""
BASES = ["llama", "gpt2", "bert", "qwen2_moe"]
CASES = [(name, s, f) for name in CHOICES for s in SETTINGS.get(name, [{}]) for f in BASES]
ids = [f"{name}-{f}-{k}" for k, (name, _, f) in enumerate(CASES)]


def left_by(selection: dict[str, Any]) -> set[str]:
    """The forms of what a selection leaves behind: dense for a whole parameter, entries for some of its numbers."""
    return {"dense" if index is None else "entries" for index in selection.values()}


def drawn(name: str, settings: dict[str, Any], model: nn.Module, seed: int = 0, step: int = 0) -> dict[str, Any]:
    """A choice's selection on a model, with gradients of one batch where it needs them."""
    choice: Choice = CHOICES.make(name, settings)
    grads: dict[str, Tensor | None] = {}
    squares: dict[str, Tensor | None] = {}
    if choice.looks:
        for value in model.parameters():
            value.requires_grad_(True)
        logits(model).square().mean().backward()
        grads = {n: v.grad for n, v in model.named_parameters()}
        squares = {n: None if v is None else v.square() for n, v in grads.items()}
        model.zero_grad()
    table = dict(model.named_parameters())
    items = parameter_items(Roles(model), model)
    return choice.select(items, ChoiceContext(seed, step, lambda n: table[n].detach(), grads.get, squares.get))


def moving(name: str, settings: dict[str, Any], family: str) -> tuple[nn.Module, Attached, dict[str, Any]] | None:
    """A model with the choice's parameters moving; None where the choice refuses this base."""
    model = tiny(family)
    if name == "bias" and family == "llama":
        return None
    selection = drawn(name, settings, model)
    handle = attached(model)
    handle.move("moved", selection)
    return model, handle, selection


@pytest.mark.parametrize("name,settings,family", CASES, ids=ids)
def test_only_what_was_chosen_moves_and_all_comes_back(
    name: str, settings: dict[str, Any], family: str, tmp_path: Path
) -> None:
    base_model = tiny(family)
    before, base = values(base_model), quiet(base_model)
    if (made := moving(name, settings, family)) is None:
        return
    model, handle, selection = made
    steps(model, handle, 2)
    after = values(model)
    assert list(after) == list(before)
    moved = 0
    for n, _ in tiny(family).named_parameters():  # of tied parameters, the first name
        changed = (after[n] != before[n]).flatten()
        if n not in selection:
            assert not changed.any(), n
        elif selection[n] is not None:
            outside = torch.ones_like(changed).index_fill(0, selection[n], False)
            assert not changed[outside].any(), n
        moved += int(changed.sum())
    assert moved > 0
    trained = sum(v.numel() for _, v in handle.trained()["moved"])
    wanted = sum(before[n].numel() if i is None else len(i) for n, i in selection.items())
    assert trained == wanted

    tuned = quiet(model)
    with handle.off():
        assert same(values(model), before) and torch.equal(quiet(model), base)
    assert same(values(model), after)

    delta = handle.delta(parameter_items(Roles(tiny(family)), tiny(family)))
    assert {FORMS.name_of(type(piece.form)) for piece in delta.pieces} == left_by(selection)
    assert delta.count() == wanted
    delta.save(tmp_path / "delta")
    other = tiny(family)
    loaded = Delta.load(tmp_path / "delta")
    loaded.apply(other)
    assert same(values(other), after) and torch.equal(quiet(other), tuned)
    changes = dict(loaded.tensors(lambda s: before[f"{s.name}.{s.parameter}"]))
    for n, change in changes.items():
        assert torch.allclose(before[n] + change, after[n], atol=1e-7), n
    loaded.detach(other)
    assert same(values(other), before)

    handle.detach()
    assert same(values(model), before) and all(v.requires_grad for v in model.parameters())


def test_choices_left_every_exact_form() -> None:
    """The forms that only choices make are held to their promises above: the cases meet all of them, run or not."""
    met: set[str] = set()
    for name, settings, family in CASES:
        if family == "gpt2":  # has everything that a choice may ask for, so that none refuses it
            met |= left_by(drawn(name, settings, tiny(family)))
    assert met == {name for name in FORMS if FORMS[name].at == "base"}


@pytest.mark.parametrize("name,settings,family", CASES, ids=ids)
def test_the_same_seed_draws_the_same(name: str, settings: dict[str, Any], family: str) -> None:
    if name == "bias" and family == "llama":
        with pytest.raises(LuthierError, match="scale-shift"):
            drawn(name, settings, tiny(family))
        return
    first, second = (drawn(name, settings, tiny(family), seed=5) for _ in range(2))
    assert list(first) == list(second)
    assert all((first[n] is None) == (second[n] is None) for n in first)
    assert all(torch.equal(first[n], second[n]) for n in first if first[n] is not None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_items_are_the_parameters(family: str) -> None:
    model = tiny(family)
    items = parameter_items(Roles(model), model)
    assert {n: s.shape for n, s in items.items()} == {n: tuple(v.shape) for n, v in model.named_parameters()}
    assert {n: s.shape for n, s in parameter_items(Roles(model)).items()} == {n: s.shape for n, s in items.items()}
    CHOICES.make("hft", {}).select(items, ChoiceContext())


def test_tied_parameters_are_one_item() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    items = parameter_items(Roles(model), model)
    assert set(items) == {n for n, _ in model.named_parameters()}


def test_gradients_and_moments_exist_for_entries_only() -> None:
    made = moving("random-entries", {"fraction": 0.02}, "llama")
    assert made is not None
    model, handle, _ = made
    logits(model, tiny_ids()).square().mean().backward()
    assert all(v.grad is None for n, v in model.named_parameters() if "luthier" not in n)
    assert all(v.grad is not None for _, v in handle.trained()["moved"])


@pytest.mark.parametrize(
    "role,granularity,units",
    [
        ("attn.q", "head", 4),
        ("attn.k", "head", 2),
        ("attn.o", "head", 4),
        ("ffn.up", "row", 48),
        ("ffn.up", "column", 32),
    ],
)
def test_units_partition_a_parameter(role: str, granularity: str, units: int) -> None:
    items = parameter_items(Roles(tiny("llama")))
    site = next(s for s in items.values() if s.role == role)
    table = layout(site, granularity, head_dim=8)
    assert table is not None and table.shape[0] == units
    assert sorted(table.flatten().tolist()) == list(range(site.d_in * site.d_out))


@pytest.mark.parametrize("role", ["attn.q", "attn.o"])
def test_heads_that_do_not_divide_a_weight_are_refused(role: str) -> None:
    site = next(s for s in parameter_items(Roles(tiny("llama"))).values() if s.role == role)
    with pytest.raises(LuthierError, match="32 wide, which heads of head_dim 12 do not divide"):
        layout(site, "head", head_dim=12)


def test_rows_are_outputs_in_every_layout() -> None:
    """GPT-2 stores its matrices transposed: a row is an output there too."""
    site = next(s for s in parameter_items(Roles(tiny("gpt2"))).values() if s.role == "ffn.up")
    table = layout(site, "row")
    assert table is not None and table.shape == (site.d_out, site.d_in)
    assert table[1].tolist() == [1 + k * site.d_out for k in range(site.d_in)]


def test_experts_are_slices() -> None:
    model = tiny("qwen2_moe")
    chosen = Pick(granularity="expert", within="tensor", count=1, of=("expert",)).select(
        parameter_items(Roles(model), model), ChoiceContext()
    )
    for name, index in chosen.items():
        size = dict(model.named_parameters())[name][0].numel()
        assert index is not None and len(index) == size and int(index[0]) % size == 0


def test_budget_of_parameters_is_kept() -> None:
    items = parameter_items(Roles(tiny("llama")))
    chosen = Pick(parameters=5000, of=("attn", "ffn")).select(items, ChoiceContext())
    spent = sum(torch.Size(items[n].shape).numel() for n in chosen)
    assert 0 < spent <= 5000


def test_scores_pick_what_they_say() -> None:
    model = tiny("llama")
    items, table = parameter_items(Roles(model), model), dict(model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    context = ChoiceContext(
        weight=lambda n: table[n].detach(), grad=lambda n: torch.arange(table[n].numel()).view_as(table[n])
    )
    entry = {"granularity": "entry", "count": 3, "of": (name,)}
    size = table[name].numel()
    assert Pick(score="gradient", **entry).select(items, context)[name].tolist() == [size - 3, size - 2, size - 1]  # pyright: ignore
    largest = table[name].abs().flatten().topk(3).indices.sort().values
    assert torch.equal(Pick(score="magnitude", **entry).select(items, context)[name], largest)  # pyright: ignore
    smallest = table[name].abs().flatten().topk(3, largest=False).indices.sort().values
    assert torch.equal(Pick(score="magnitude", largest=False, **entry).select(items, context)[name], smallest)  # pyright: ignore


@pytest.mark.parametrize(
    "settings,said",
    [
        ({}, "exactly one of fraction, count and parameters"),
        ({"fraction": 2.0}, "fraction must lie in"),
        ({"count": 1, "score": "gradiant"}, "no score is called 'gradiant'"),
        ({"count": 1, "granularity": "head"}, "needs head_dim"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        CHOICES.make("pick", settings)


def test_too_many_layers_are_told() -> None:
    with pytest.raises(LuthierError, match="the base has 2 layers"):
        drawn("lisa", {"layers_active": 3}, tiny("llama"))


def test_encoder_and_decoder_layers_differ() -> None:
    items = parameter_items(Roles(tiny("t5")))
    assert len({layer_of(n, s) for n, s in items.items()} - {""}) == 4


@pytest.mark.parametrize(
    "name,settings", [(n, s) for n, s, f in CASES if f == "gpt2"], ids=[i for i in ids if "gpt2" in i]
)
def test_a_dry_run_counts_what_a_run_moves(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Without weights, so that which numbers a score would pick stays open; how many does not."""
    world = World(tmp_path)
    plan = world.plan({"choice": name, **settings}, base=str(world.base("gpt2")))
    training = build(plan, tmp_path / "run", progress=False)
    assert dry_run(plan).moved == sum(p.numel() for p in training.loop.optimiser.names.values()) > 0
