"""One test a row of the papers table: what any faithful implementation shows exactly. `luthier papers ID` names them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import luthier
from luthier.attach import Attached, attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.roles import Roles
from luthier.choices.engine import ChoiceContext
from luthier.delta import CHOICES, FORMS, Site, State
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.plan.stages import load_stages
from tests.tiny import tiny, tiny_ids

IDS, RECIPES = tiny_ids(2, 10), Path(luthier.__file__).parent / "recipes"


def with_form(name: str, family: str = "llama", **settings: Any) -> tuple[Any, Attached, Roles]:
    model = tiny(family)
    roles, handle = Roles(model), attached(model)
    form = FORMS.make(name, settings)
    handle.add(handle.build(name, form, sites_for(roles, form)), train=True)
    return model, handle, roles


def values(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".luthier." not in n}


def train(model: Any, handle: Attached, steps: int = 3, lr: float = 0.02) -> torch.optim.Optimizer:
    parameters = [p for rows in handle.trained().values() for _, p in rows]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        logits = model(input_ids=IDS, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimiser.step()
        handle.after_step()
        optimiser.zero_grad()
    return optimiser


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def moved(before: dict[str, Tensor], model: Any) -> set[str]:
    return {n for n, v in values(model).items() if not torch.equal(v, before[n])}


def choose(name: str, model: Any, step: int = 0, seed: int = 0, **settings: Any) -> dict[str, Tensor | None]:
    items = parameter_items(Roles(model), model)
    context = ChoiceContext(seed=seed, step=step, weight=lambda n: model.get_parameter(n).detach())
    return CHOICES.make(name, settings).select(items, context)


def close(a: Tensor, b: Tensor, allowed: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= allowed * float(b.abs().max())


def test_p110_lora() -> None:
    model = tiny()
    base, before = logits(model), values(model)
    model, handle, _ = with_form("lora", rank=4, alpha=8)
    assert torch.equal(logits(model), base)
    train(model, handle)
    assert not moved(before, model)
    tuned = logits(model)
    assert not close(tuned, base, 1e-3)
    numbers = sum(p.numel() for _, p in handle.trained()["lora"])
    sites = handle.pieces["lora"].sites.values()
    assert numbers == handle.pieces["lora"].count() == sum(4 * (s.d_in + s.d_out) for s in sites)
    handle.fold()
    assert close(logits(model), tuned)
    folded = values(model)
    subtracted = {
        f"{q.state.site.name}.weight": folded[f"{q.state.site.name}.weight"] - q.form.delta(q.state)["weight"]
        for q in handle.placed["lora"]
    }
    assert any(not torch.equal(v.detach(), before[n]) for n, v in subtracted.items()), "subtracting is not undoing"
    handle.unfold()
    assert not moved(before, model)


def test_p159_rank_stabilised_scale() -> None:
    for rank in (1, 4, 16):
        form, site = FORMS.make("lora", {"rank": rank, "alpha": 8, "scaling": "rslora"}), None
        _, handle, _ = with_form("lora", rank=rank, alpha=8, scaling="rslora")
        site = next(iter(handle.pieces["lora"].sites.values()))
        assert form.at_site(site) == (rank, 8 / rank**0.5)


def test_p175_dora() -> None:
    base = logits(tiny())
    model, handle, _ = with_form("dora", rank=4)
    assert close(logits(model), base)
    before = values(model)
    train(model, handle)
    assert not moved(before, model)
    for q in handle.placed["dora"]:
        magnitude = [v for v in q.state.p.values() if v.dim() == 1]
        assert [v.shape[0] for v in magnitude] == [q.state.site.d_out]
    tuned = logits(model)
    handle.fold()
    assert close(logits(model), tuned)


def test_p224_scale_and_shift() -> None:
    base = logits(tiny("gpt2"))
    model, handle, _ = with_form("scale-shift", "gpt2")
    assert torch.equal(logits(model), base)
    before = values(model)
    train(model, handle)
    assert not moved(before, model)
    assert all(p.dim() == 1 for _, p in handle.trained()["scale-shift"])
    tuned = logits(model)
    handle.fold()
    assert close(logits(model), tuned)


def test_p224_shift_needs_a_bias_to_fold() -> None:
    model, handle, _ = with_form("scale-shift", "llama")
    train(model, handle)
    before = values(model)
    try:
        handle.fold()
    except LuthierError as e:
        assert "bias" in str(e) and not moved(before, model)
    else:
        raise AssertionError("a shift cannot fold into a linear map without a bias")


def test_p089_half_fine_tuning() -> None:
    model = tiny("llama", num_hidden_layers=4, num_key_value_heads=4)
    roles, handle = Roles(model), attached(model)
    items = parameter_items(roles, model)
    selection = choose("hft", model)
    assert set(selection.values()) == {None}
    by_layer = {n: [items[k].role for k in selection if items[k].layer == n] for n in range(4)}
    ffn = []
    for chosen in by_layer.values():
        assert sum(r.startswith("attn.") for r in chosen) == 2 and sum(r.startswith("norm") for r in chosen) == 1
        ffn.append(sum(r.startswith("ffn.") for r in chosen))
    assert sorted(ffn) == [1, 1, 2, 2]
    block = [k for k, s in items.items() if s.layer is not None]
    numel = {k: model.get_parameter(k).numel() for k in block}
    assert 2 * sum(numel[k] for k in block if k in selection) == sum(numel.values())
    assert all(k in selection for k, s in items.items() if s.role in ("embed", "head"))
    before = values(model)
    handle.move("hft", selection)
    optimiser = train(model, handle)
    assert moved(before, model) == set(selection)
    assert sum(v["exp_avg"].numel() for v in optimiser.state.values()) == sum(
        model.get_parameter(k).numel() for k in selection
    )


def test_p193_lisa() -> None:
    model = tiny("llama", num_hidden_layers=4)
    items, seen = parameter_items(Roles(model), model), set()
    handle = attached(model)
    for window in range(12):
        selection = choose("lisa", model, step=5 * window, layers_active=1, every=5)
        layers = {items[k].layer for k in selection} - {None}
        assert len(layers) == 1 and {"embed", "head"} <= {items[k].role for k in selection}
        assert {k for k, s in items.items() if s.layer in layers} <= set(selection)
        seen |= layers
        if window < 2:
            before = values(model)
            for edit in handle.edits.get("lisa", {}).values():
                edit.train(False)
            handle.move("lisa", selection)
            optimiser = train(model, handle, steps=2)
            assert moved(before, model) == set(selection)
            active = sum(model.get_parameter(k).numel() for k in selection)
            assert sum(v["exp_avg"].numel() for v in optimiser.state.values()) == active
    assert seen == {0, 1, 2, 3}


def test_p221_biases_only() -> None:
    model = tiny("gpt2")
    handle, before = attached(model), values(model)
    handle.move("bias", choose("bias", model))
    train(model, handle)
    assert moved(before, model) == {n for n in before if n.endswith(".bias")}
    try:
        choose("bias", tiny("llama"))
    except LuthierError as e:
        assert "bias" in str(e)
    else:
        raise AssertionError("a base without biases must be refused")


def test_p141_norms_only() -> None:
    for family, gains_only in (("gpt2", False), ("llama", True)):
        model = tiny(family)
        handle, before = attached(model), values(model)
        handle.move("norm", choose("norm", model))
        train(model, handle)
        changed = moved(before, model)
        norms = {k for k, s in parameter_items(Roles(model), model).items() if s.role.startswith("norm")}
        assert changed == norms and gains_only == all(n.endswith(".weight") for n in changed)


def test_p444_deep_prefix() -> None:
    model, handle, roles = with_form("prefix", length=3)
    before = values(model)
    train(model, handle)
    assert not moved(before, model)
    numbers = sum(p.numel() for _, p in handle.trained()["prefix"])
    assert numbers == roles.layer_count * 2 * 3 * roles.n_kv_heads * roles.head_dim == handle.pieces["prefix"].count()
    tuned = logits(model)
    for q in handle.placed["prefix"]:
        kept = {k: v.detach().clone() for k, v in q.state.p.items()}
        with torch.no_grad():
            for v in q.state.p.values():
                v.zero_()
        assert not torch.equal(logits(model), tuned), f"zeroing the prefix of {q.state.site.name} changed nothing"
        with torch.no_grad():
            for k, v in kept.items():
                q.state.p[k].copy_(v)
    assert torch.equal(logits(model), tuned)


def test_p246_adapters_serial_and_parallel() -> None:
    for placement in ("serial", "parallel"):
        base = logits(tiny())
        model, handle, _ = with_form("adapter", width=8, placement=placement)
        assert torch.equal(logits(model), base)
        before = values(model)
        train(model, handle)
        assert not moved(before, model) and not close(logits(model), base, 1e-3)
        assert sum(p.numel() for _, p in handle.trained()["adapter"]) == handle.pieces["adapter"].count()


def test_p221_added_biases_where_the_base_has_none() -> None:
    base = logits(tiny())
    model, handle, _ = with_form("bias")
    before = values(model)
    assert torch.equal(logits(model), base)
    train(model, handle)
    assert not moved(before, model) and not close(logits(model), base, 1e-3)
    assert sum(p.numel() for _, p in handle.trained()["bias"]) == handle.pieces["bias"].count()
    try:
        handle.fold()
    except LuthierError as e:
        assert "attention_bias" in str(e)
    else:
        raise AssertionError("a bias cannot fold where there is none")


def test_p159_a_step_is_as_large_at_every_rank() -> None:
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 256, generator=g), torch.randn(64, 128, generator=g)
    site = Site("w", "ffn.up", 0, "linear", 256, 128)

    def first_step(rank: int, scaling: str) -> tuple[float, float]:
        form = FORMS.make("lora", {"rank": rank, "alpha": 8.0, "scaling": scaling})
        p = {k: v.requires_grad_() for k, v in form.build(site, torch.Generator().manual_seed(1))[0].items()}
        state, still = State(site, p, {}, lambda: torch.zeros(128, 256)), torch.zeros(64, 128)
        (form.change(x, still, state) * target).sum().backward()
        gradient = p["B"].grad
        with torch.no_grad():
            p["B"] -= gradient
            along = -(form.change(x, still, state) * target).sum() / target.norm()
        return float(gradient.norm()), float(along)

    ranks = (4, 16, 64, 256)
    for number in (0, 1):  # gradient norm, and how far the output moves along the wanted direction
        flat, shrinking = ([first_step(r, s)[number] for r in ranks] for s in ("rslora", "standard"))
        assert max(flat) < 1.6 * min(flat)
        assert all(a > 1.6 * b for a, b in zip(shrinking, shrinking[1:], strict=False))


def test_p123_adapters_and_norms_only() -> None:
    base = logits(tiny("gpt2"))
    model, handle, roles = with_form("adapter", "gpt2", width=4)
    assert torch.equal(logits(model), base)
    handle.move("norm", choose("norm", model))
    before = values(model)
    train(model, handle)
    assert moved(before, model) == {k for k, s in parameter_items(roles, model).items() if s.role.startswith("norm")}
    d, m = roles.hidden, 4
    assert handle.pieces["adapter"].count() == roles.layer_count * 2 * (2 * m * d + m + d)
    first = handle.delta(parameter_items(roles, model))
    tuned = logits(model)
    handle.detach()
    assert torch.equal(logits(model), base)
    other, second, _ = with_form("adapter", "gpt2", width=4)
    train(other, second, lr=0.1)
    delta = second.delta()
    delta.apply(model)
    assert torch.equal(logits(model), logits(other))
    delta.detach(model)
    first.apply(model)
    assert torch.equal(logits(model), tuned)


def test_p246_one_setting_swaps_the_adapter_and_the_grid_of_placements_runs(tmp_path: Path) -> None:
    """The recipe's own grid, on a tiny model: what changes from run to run is `delta` alone."""
    stages = load_stages(RECIPES / "llm-adapters.yaml")
    grid = {s.name: dict(s.settings["delta"]) for s in stages}
    kinds = {k: [f"{k}-{place}" for place in ("attn", "mlp", "both")] for k in ("series", "parallel", "lora")}
    assert list(grid) == [*sum(kinds.values(), []), "prefix"]
    assert len({str({k: v for k, v in s.settings.items() if k not in ("delta", "train")}) for s in stages}) == 1
    base, sites = logits(tiny()), {}
    for name, spec in grid.items():
        model = tiny()
        roles, handle, before = Roles(model), attached(model), values(model)
        own = {k: v for k, v in spec.items() if k not in ("form", "sites", "lr")}
        form = FORMS.make(spec["form"], own)
        handle.add(handle.build(name, form, sites_for(roles, form, spec.get("sites"))), train=True)
        assert torch.equal(logits(model), base) or name == "prefix"
        train(model, handle)
        tuned, piece = logits(model), handle.pieces[name]
        assert not moved(before, model) and not close(tuned, base, 1e-3)
        sites[name] = {s.role for s in piece.sites.values()}
        delta = handle.delta()
        held = [v.numel() for table in delta.pieces[0].p.values() for v in table.values()]
        assert (
            [p.name for p in delta.pieces] == [name]
            and sum(held) == piece.count()
            and not any(delta.pieces[0].fixed.values())
        )
        other = tiny()
        Delta.load(delta.save(tmp_path / name)).apply(other)
        assert torch.equal(logits(other), tuned)
    for attn, mlp, both in kinds.values():
        assert sites[both] == sites[attn] | sites[mlp]
        assert all(r.startswith("attn.") for r in sites[attn]) and all(r.startswith("ffn.") for r in sites[mlp])


def successors(step: int, by: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Rows of six tokens of a ring of 17, and what follows the last one in steps of `by`."""
    x = torch.randint(3, 20, (rows, 6), generator=torch.Generator().manual_seed(step))
    return x, (x[:, -1] + by - 3) % 17 + 3


def loss_on(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(input_ids=x, use_cache=False).logits[:, -1], y)


def learn(model: Any, numbers: list[Any], by: int, steps: int, lr: float, after: Any = None) -> None:
    optimiser = torch.optim.Adam(numbers, lr=lr)
    for step in range(steps):
        optimiser.zero_grad()
        loss_on(model, *successors(1000 * by + step, by)).backward()
        optimiser.step()
        if after is not None:
            after()


def test_p141_a_fisher_chosen_share_of_the_norms_beats_a_random_one() -> None:
    """A model that has learnt to count by ones is told to count by twos; each arm at the better of two rates."""
    knows = tiny()
    learn(knows.requires_grad_(True), list(knows.parameters()), 1, 200, 3e-3)
    knows.requires_grad_(False)
    items = parameter_items(Roles(knows), knows)
    norms = {n: knows.get_parameter(n).requires_grad_(True) for n, s in items.items() if s.role.startswith("norm")}
    squares = dict.fromkeys(norms, torch.tensor(0.0))
    for row in range(64):
        knows.zero_grad()
        loss_on(knows, *successors(9000 + row, 2, 1)).backward()
        squares = {n: squares[n] + p.grad.square() / 64 for n, p in norms.items()}  # pyright: ignore

    def ends(by: str, seed: int = 0) -> float:
        found = []
        for lr in (0.03, 0.1):
            model = copy.deepcopy(knows).requires_grad_(False)
            choice = CHOICES.make("norm", {"fraction": 0.1, "by": by})
            handle = attached(model)
            handle.move("norm", choice.select(items, ChoiceContext(seed=seed, square=squares.get)))
            rows = [p for _, p in handle.trained()["norm"]]
            assert sum(p.numel() for p in rows) == 16
            learn(model, rows, 2, 60, lr, handle.after_step)
            with torch.no_grad():
                found.append(float(loss_on(model, *successors(8000, 2, 256))))
        return min(found)

    drawn = [ends("random", seed) for seed in range(3)]
    assert ends("fisher") < min(drawn)
