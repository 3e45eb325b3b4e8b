"""Forms and choices against numbers worked out by hand or with plain linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for, sites_of
from luthier.bases.roles import Roles
from luthier.choices.engine import ChoiceContext, Items, layer_of
from luthier.delta import CHOICES, FORMS, Site, State
from luthier.errors import LuthierError
from luthier.parts.lowrank import row_norms
from tests.tiny import tiny

SITE = Site("m", "attn.q", 0, "linear", 2, 2)
W = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [-1.0]])
X = torch.tensor([[1.0, 1.0]])


def test_lora_by_hand() -> None:
    """s = 4 / 1, BA = [[1, 2], [-1, -2]]: ΔW = [[4, 8], [-4, -8]], so x = (1, 1) gains (12, -12)."""
    form = FORMS.make("lora", {"rank": 1, "alpha": 4.0})
    s = State(SITE, {"A": A, "B": B}, {}, lambda: W)
    assert form.delta(s)["weight"].tolist() == [[4, 8], [-4, -8]]
    assert form.change(X, X @ W.t(), s).tolist() == [[12, -12]]
    assert FORMS.make("lora", {"rank": 4, "alpha": 8.0, "scaling": "rslora"}).at_site(SITE) == (4, 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["alone", "x given", "bias trains", "weight trains", "two", "dropout"])
def test_lora_gives_the_gradients_of_its_formula(case: str, dtype: torch.dtype) -> None:
    """Whether x's gradient is made in one go with the base's, or must not be because others train or read: what autograd
    makes of x Wᵀ + b + s x Aᵀ Bᵀ, in float32. bfloat16 differs by its rounding."""
    torch.manual_seed(0)
    module = nn.Linear(6, 5).to(dtype)
    handle = attached(model := nn.ModuleList([module]))
    sites = [Site("0", "attn.q", 0, "linear", 6, 5)]
    form = FORMS.make("lora", {"rank": 2, "dropout": 0.5 if case == "dropout" else 0.0})
    names = ("one", "other") if case == "two" else ("one",)
    for k, name in enumerate(names):
        handle.add(handle.build(name, form, sites, seed=k), train=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        nn.init.normal_(p, std=0.5)
    module.bias.requires_grad_(case == "bias trains")
    module.weight.requires_grad_(case == "weight trains")
    base = [p for p in (module.weight, module.bias) if p.requires_grad]
    x = torch.randn(3, 4, 6, dtype=dtype, requires_grad=case != "x given")
    told = torch.randn(3, 4, 5, dtype=dtype)
    handle.ctx.training = case == "dropout"
    wanted_of = [*trained.values(), *base, *([x] if x.requires_grad else [])]
    torch.manual_seed(1)
    got = torch.autograd.grad(module(x), wanted_of, told)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5).float() if case == "dropout" else x.float()
    y = F.linear(x.float(), module.weight.float(), module.bias.float())
    for name in names:
        a, b = (next(p for n, p in trained.items() if name in n and n.endswith(part)) for part in "AB")
        y = y + 2 * dropped @ a.t() @ b.t()
    plain = torch.autograd.grad(y, wanted_of, told.float())
    for mine, wanted in zip(got, plain, strict=True):
        assert mine.dtype == wanted.dtype
        assert float((mine - wanted).norm()) <= (1e-5 if dtype == torch.float32 else 0.02) * float(wanted.norm())


def test_dora_by_hand() -> None:
    """s = 1: W + BA = [[4, 6], [-1, 0]] with norms √52 and 1; m = (10, 3): W' = [[40, 60]/√52, [-3, 0]]."""
    form = FORMS.make("dora", {"rank": 1, "alpha": 1.0})
    bias = torch.tensor([0.5, -0.5])
    p, fixed = {"A": A, "B": B, "m": torch.tensor([10.0, 3.0])}, {"w2": W.square().sum(1)}
    s = State(SITE, p, fixed, lambda: W, bias)
    wanted = torch.tensor([[40 / 52**0.5, 60 / 52**0.5], [-3.0, 0.0]])
    assert torch.allclose(W + form.delta(s)["weight"], wanted, atol=1e-6)
    y = X @ W.t() + bias
    assert torch.allclose(y + form.change(X, y, s), X @ wanted.t() + bias, atol=1e-6)
    assert form.count(SITE) == 2 + 2 + 2


def test_dora_norm_is_detached() -> None:
    """The gradient of B is that of the low-rank path times m / ‖·‖, with the norm held fixed."""
    form = FORMS.make("dora", {"rank": 1, "alpha": 1.0})
    b, m = B.clone().requires_grad_(), torch.tensor([10.0, 3.0])
    s = State(SITE, {"A": A, "B": b, "m": m}, {"w2": W.square().sum(1)}, lambda: W)
    form.change(X, X @ W.t(), s).sum().backward()
    ratio = m / torch.tensor([52**0.5, 1.0])
    assert b.grad is not None and torch.allclose(b.grad[:, 0], ratio * 3)  # x Aᵀ = 3


def test_dora_drops_the_same_inputs_in_both_terms() -> None:
    """W x + b, and to it (m/‖·‖ − 1) W x̃ and m/‖·‖ s B A x̃ of one x̃: dropped entries are 0, the others doubled."""
    form = FORMS.make("dora", {"rank": 1, "alpha": 1.0, "dropout": 0.5})
    p, bias = {"A": A, "B": B, "m": torch.tensor([10.0, 3.0])}, torch.tensor([0.5, -0.5])
    s = State(SITE, p, {"w2": W.square().sum(1)}, lambda: W, bias)
    s.ctx.training = True
    x = torch.ones(64, 2)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    assert {0.0, 2.0} == set(dropped.flatten().tolist())
    ratio = p["m"] / torch.tensor([52**0.5, 1.0])
    torch.manual_seed(0)
    change = form.change(x, x @ W.t() + bias, s)
    assert torch.allclose(change, (ratio - 1) * (dropped @ W.t()) + ratio * (dropped @ A.t() @ B.t()), atol=1e-5)


def test_lora_on_an_embedding_starts_as_the_authors_do() -> None:
    """A zero and B normal: the first step of a token is as large in a large vocabulary as in a small one."""
    for words in (10, 10_000):
        site = Site("e", "embed", None, "embedding", words, 64)
        p, _ = FORMS.make("lora", {"rank": 8}).build(site, torch.Generator().manual_seed(0))
        assert not p["A"].any() and 0.9 < float(p["B"].std()) < 1.1


def test_lora_refuses_dropout_where_it_could_not_act() -> None:
    """Fused experts are changed in their weight: there is no x of theirs to drop."""
    model = tiny("qwen3_moe")
    form = FORMS.make("lora", {"rank": 2, "dropout": 0.1})
    with pytest.raises(LuthierError, match="dropout cannot act on the fused experts of .*set it to 0"):
        attached(model).build("piece", form, sites_of(Roles(model), ["attn.q", "expert"]), 0)
    attached(model).build("piece", form, sites_of(Roles(model), "attn.q"), 0)


@pytest.mark.parametrize("cancel", [False, True])
def test_row_norms_without_the_product(cancel: bool) -> None:
    g = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(shape, generator=g) for shape in ((40, 30), (4, 30), (40, 4)))
    if cancel:  # rows where W_i is almost −s·B_i A, to a part in ten thousand
        w[:20] = -2.0 * b[:20] @ a * (1 + 1e-4)
    exact = (w.double() + 2.0 * (b.double() @ a.double())).norm(dim=1)
    found = row_norms(w, w.square().sum(1), a, b, 2.0)
    assert torch.allclose(found.double(), exact, rtol=1e-3)


def half_of_block(selection: dict[str, object], items: Items) -> tuple[int, int]:
    sizes = {n: torch.Size(s.shape).numel() for n, s in items.items() if layer_of(n, s)}
    return sum(v for n, v in sizes.items() if n in selection), sum(sizes.values())


@pytest.mark.parametrize("seed", range(5))
def test_hft_moves_exactly_half_of_the_layers(seed: int) -> None:
    """Without grouped heads, and over an even number of layers, the chosen matrices hold exactly half of the numbers."""
    model = tiny("llama", num_hidden_layers=4, num_key_value_heads=4)
    items = parameter_items(Roles(model), model)
    chosen = CHOICES.make("hft", {}).select(items, ChoiceContext(seed))
    moved, total = half_of_block(chosen, items)
    assert 2 * moved == total
    by: dict[tuple[object, str], int] = {}
    for n in chosen:
        kind = items[n].role.partition(".")[0]
        by[items[n].layer, kind] = by.get((items[n].layer, kind), 0) + 1
    assert all(by[layer, "attn"] == 2 and by[layer, "norm"] == 1 for layer in range(4))
    assert sorted(by[layer, "ffn"] for layer in range(4)) == [1, 1, 2, 2]
    outside = {items[n].role for n in chosen if items[n].layer is None}
    assert outside == {"embed", "head"}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_hft_halves_fused_models_too(family: str) -> None:
    model = tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    items = parameter_items(Roles(model), model)
    chosen = CHOICES.make("hft", {}).select(items, ChoiceContext(1))
    sizes = {n: torch.Size(s.shape).numel() for n, s in items.items() if s.layer is not None and len(s.shape) == 2}
    assert 2 * sum(v for n, v in sizes.items() if n in chosen) == sum(sizes.values())


@pytest.mark.parametrize("odd,wanted", [("down", [1, 1, 2]), ("up", [1, 2, 2])])
def test_hft_with_an_odd_number_of_layers(odd: str, wanted: list[int]) -> None:
    items = parameter_items(Roles(tiny("llama", num_hidden_layers=3)))
    chosen = CHOICES.make("hft", {"odd": odd}).select(items, ChoiceContext())
    counts = [sum(items[n].layer == k and items[n].role.startswith("ffn") for n in chosen) for k in range(3)]
    assert sorted(counts) == wanted


def test_lisa_windows() -> None:
    """One draw holds for a whole window; each has γ layers with embeddings and head; in time every layer has its turn."""
    items = parameter_items(Roles(tiny("llama", num_hidden_layers=6)))
    lisa = CHOICES.make("lisa", {"layers_active": 2, "every": 5})
    seen = []
    for step in range(100):
        chosen = lisa.select(items, ChoiceContext(seed=3, step=step))
        layers = {items[n].layer for n in chosen} - {None}
        assert len(layers) == 2 and {items[n].role for n in chosen if items[n].layer is None} == {"embed", "head"}
        assert all((items[n].layer in layers) == (n in chosen) for n in items if items[n].layer is not None)
        seen.append(layers)
    assert all(seen[k] == seen[5 * (k // 5)] for k in range(100))
    assert len({tuple(sorted(s)) for s in seen}) > 3 and set().union(*seen) == set(range(6))


@pytest.mark.parametrize("family,heads", [("llama", 2), ("gpt2", 4)])
def test_prefix_counts_as_the_paper_does(family: str, heads: int) -> None:
    """layers · 2 · L · kv_heads · head_dim."""
    form = FORMS.make("prefix", {"length": 7})
    sites = sites_for(Roles(tiny(family)), form)
    assert sum(form.count(s) for s in sites) == 2 * 2 * 7 * heads * 8


def test_prefix_is_a_gated_addition_to_attention() -> None:
    """P187: with a prefix, attention is (1 − λ) · attention without it + λ · attention on the prefix alone."""
    from luthier.attach import attached

    model = tiny("llama", num_hidden_layers=1)
    ids = torch.arange(3, 9)[None]
    taken = {}
    o = model.model.layers[0].self_attn.o_proj
    o.register_forward_pre_hook(lambda m, args: taken.update(x=args[0].detach()))
    form = FORMS.make("prefix", {"length": 3, "shift_positions": False, "spread": 1.0})
    with torch.no_grad():
        model(ids)
        plain = taken["x"]
        handle = attached(model)
        handle.add(handle.build("p", form, sites_for(Roles(model), form)))
        model(ids)
    with_prefix = taken["x"]
    attn, hidden = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    cos, sin = model.model.rotary_emb(hidden, torch.arange(6)[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q = attn.q_proj(hidden).view(1, 6, 4, 8).transpose(1, 2)
    k = attn.k_proj(hidden).view(1, 6, 2, 8).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    (state,) = [placed.state for placed in handle.placed["p"]]
    pk, pv = form.extra(state)
    own = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * attn.scaling
    own = own.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    extra = (q @ pk[None].repeat_interleave(2, 1).transpose(-1, -2)) * attn.scaling
    gate = extra.exp().sum(-1) / (extra.exp().sum(-1) + own.exp().sum(-1))
    on_prefix = (extra.softmax(-1) @ pv[None].repeat_interleave(2, 1)).transpose(1, 2).reshape(1, 6, 32)
    gate = gate.transpose(1, 2).repeat_interleave(8, -1)
    assert torch.allclose(with_prefix, (1 - gate) * plain + gate * on_prefix, atol=1e-6)


def test_soft_prompt_equals_embeddings_put_before() -> None:
    """The prompt on the model gives what the model gives for embeddings with the prompt before them."""
    from luthier.attach import attached

    model = tiny("gpt2")
    ids = torch.arange(3, 9)[None]
    form = FORMS.make("prompt", {"length": 4})
    with torch.no_grad():
        handle = attached(model)
        piece = handle.build("p", form, sites_for(Roles(model), form))
        embeds = torch.cat([piece.p[""]["embeddings"][None], model.get_input_embeddings()(ids)], 1)
        wanted = model(inputs_embeds=embeds).logits[:, 4:]
        handle.add(piece)
        assert torch.allclose(model(ids).logits, wanted, atol=1e-6)


def test_sparse_count_and_choice_of_entries() -> None:
    site = Site("m", "attn.q", 0, "linear", 4, 3)
    form = FORMS.make("sparse", {"entries": 2, "by": "largest"})
    w = torch.zeros(3, 4)
    w[1, 2], w[2, 0] = -5.0, 3.0
    p, fixed = form.build(site, torch.Generator().manual_seed(0))
    p, fixed = form.start(State(site, p, fixed, lambda: w))
    assert fixed["index"].tolist() == [6, 8] and form.count(site) == 2
    change = form.delta(State(site, {"values": torch.tensor([1.0, -2.0])}, fixed, lambda: w))["weight"]
    assert change[1, 2] == 1 and change[2, 0] == -2 and int((change != 0).sum()) == 2
    assert FORMS.make("sparse", {"fraction": 0.5}).count(site) == 6
