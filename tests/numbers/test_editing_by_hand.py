"""Editing against closed forms and against sums worked out otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from luthier.algebra.scorecard import flow
from luthier.delta import EDITS, FORMS, Site, Small, State
from luthier.editing.alternative_labels import generic_logits, log_odds
from luthier.editing.engine import (
    Reach,
    Settle,
    Text,
    fact_key,
    fact_values,
    key,
    layer_at,
    one_site,
    settled,
    target_kl,
    target_nll,
)
from luthier.editing.memit import spread
from luthier.editing.mend import gradients
from luthier.editing.rome import insert
from luthier.editing.rose_lora import kept_at, thin
from luthier.errors import LuthierError
from luthier.parts.descent import shuffled
from luthier.parts.gradient_nets import fresh, transformed
from tests.editing import requests, subject, text


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rome_inserts_exactly_and_least() -> None:
    """ΔW k = r; no other change with ΔW' k = r disturbs general keys less, tr(ΔW C ΔWᵀ)."""
    x = drawn(50, 6)
    c, k, r = x.t() @ x / 50, drawn(6, seed=1), drawn(4, seed=2)
    change = r[:, None] * insert(k, c)[None]
    assert torch.allclose(change @ k, r, atol=1e-12) and torch.linalg.matrix_rank(change) == 1
    closed = torch.outer(r, torch.linalg.inv(c) @ k) / (k @ torch.linalg.inv(c) @ k)
    assert torch.allclose(change, closed, atol=1e-10)
    price = torch.trace(change @ c @ change.t())
    for seed in range(5):
        other = drawn(4, 6, seed=seed + 3)
        other = other - torch.outer(other @ k, k) / (k @ k)  # leaves k where it is
        moved = change + 0.1 * other
        assert torch.allclose(moved @ k, r, atol=1e-10) and torch.trace(moved @ c @ moved.t()) > price


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_rome_on_a_model_is_rank_one_and_meets_its_value(family: str) -> None:
    s = subject(family)
    with s.working():
        (q, *_) = requests(1)
        site = one_site(s, "ffn.down", 0)
        w, k = s.weight(site), fact_key(s, site.name, [q.new, *q.prefixed], {})
        change = EDITS.make("rome", {"layer": 0, "settle": 0}).edit(s, [q])[key(site)]
        assert isinstance(change, Small) and change.p["B"].shape[1] == 1
        # The key is then mapped to W k + δ, where δ is what was written: a · k is 1.
        assert float(change.p["A"][0] @ k) == pytest.approx(1.0, abs=1e-5)
        after = (w + change.p["B"] @ change.p["A"]) @ k
        assert torch.allclose(after, w @ k + change.p["B"][:, 0], atol=1e-5)
        before = float(target_nll(s.run([q.new]).logits, [q.new]))
        now = {key(site): w + change.p["B"] @ change.p["A"]}
        assert float(target_nll(s.run([q.new], now).logits, [q.new])) < before


def test_values_of_many_facts_are_those_of_each() -> None:
    """Sought together or one by one: each ends where it is enough, is clamped by itself, and nothing else moves it."""
    s, asked = subject("llama"), requests(5)
    with s.working():
        for how in (Reach(), Reach(decay=0.0, enough=1.5, lr=0.3), Reach(clamp=0.1)):
            alone = torch.cat([fact_values(s, s.layer(0), [q], {}, how) for q in asked])
            assert torch.allclose(fact_values(s, s.layer(0), asked, {}, how), alone, atol=1e-4) and bool(alone.any())
        assert len(fact_values(s, s.layer(0), requests(9), {}, Reach(steps=1))) == 9
        assert all(p.grad is None and not p.requires_grad for p in s.model.parameters()), "none is sought of the base"
    assert all(p.requires_grad for p in s.model.parameters())


def test_what_lies_near_begins_alike_and_tells_no_target() -> None:
    s, texts = subject("llama"), [text(1), text(2)]
    end = texts[0].ids[6]
    s.model.generation_config.eos_token_id = end  # pyright: ignore
    with s.working():
        found = s.near(texts, 30)
        assert found == s.near(texts, 30) and {t.ids[0] for t in found} == {t.ids[0] for t in texts}
        targets = [t.ids[t.start : t.end] for t in texts]
        assert not any(t.ids[n : n + 2] in targets for t in found for n in range(len(t.ids)))
        # The first text closes a turn before its target: so does what lies near it, and is then answered.
        closing = texts[0].ids[6 : texts[0].start]
        assert all(t.ids[t.start - 2 : t.start] == closing for t in found if t.ids[0] == texts[0].ids[0])
        assert s.near([Text(texts[0].ids)], 5) == [], "a text without a prompt has nothing near it"


def test_values_settle_behind_their_keys() -> None:
    """a stays, b descends: the targets get likelier, and with no steps nothing moves."""
    s = subject("llama")
    with s.working():
        site, asked = one_site(s, "ffn.down", 0), requests(2)
        w = s.weight(site)
        pairs = {key(site): (w, 0.01 * torch.randn(w.shape[0], 2), 0.1 * torch.randn(2, w.shape[1]))}
        still = settled(s, pairs, asked, Settle(0))[key(site)]
        assert torch.equal(still, pairs[key(site)][1])
        moved = settled(s, pairs, asked, Settle(20, 1.0))[key(site)]
        texts, a = [q.new for q in asked], pairs[key(site)][2]
        before, after = (target_nll(s.run(texts, {key(site): w + b @ a}).logits, texts).mean() for b in (still, moved))
        assert after < before


def test_memit_solves_its_normal_equations() -> None:
    keys, residuals, x = drawn(3, 7), drawn(3, 5, seed=1), drawn(40, 7, seed=2)
    c = x.t() @ x / 40
    b, a = spread(keys, residuals, c, 2.0)
    change = b @ a
    assert torch.allclose(change @ (2.0 * c + keys.t() @ keys), residuals.t() @ keys, atol=1e-9)
    assert torch.linalg.matrix_rank(change) == 3
    exact = spread(keys, residuals, c, 1e-9)
    assert torch.allclose(exact[0] @ exact[1] @ keys.t(), residuals.t(), atol=1e-5), "without weight the keys are met"


def test_mend_starts_as_the_scaled_gradient() -> None:
    s = subject("llama")
    with s.working():
        method = EDITS.make("mend", {"rate": 0.5, "steps": 0})
        learnt = method.learn(s, requests(2))
        changed = method.with_learnt(learnt).edit(s, requests(1))
        (q,) = requests(1)
        for site, _, _ in method.places(s):
            w = s.weight(site).clone().requires_grad_(True)
            loss = target_nll(s.run([q.new], {key(site): w}).logits, [q.new], closing=True).mean()
            (grad,) = torch.autograd.grad(loss, [w])
            small = changed[key(site)]
            assert isinstance(small, Small)
            assert torch.allclose(small.p["B"] @ small.p["A"], -0.5 * grad, atol=1e-6), site.name


def test_a_gradient_net_is_the_identity_until_it_learns() -> None:
    net = fresh(3, 2, 1, 4, 1.0, torch.Generator().manual_seed(0))
    net |= {"mean": torch.randn(5), "std": torch.rand(5) + 0.5}
    u, d = torch.randn(6, 3), torch.randn(6, 2)
    got = transformed(net, 0, u, d)
    assert torch.allclose(got[0], u, atol=1e-6) and torch.allclose(got[1], d, atol=1e-6)
    net["U1"].requires_grad_(True)
    sum(t.square().sum() for t in transformed(net, 0, u, d)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert net["U1"].grad is not None and float(net["U1"].grad.abs().sum()) > 0, "the start is no dead point"


def test_gradients_of_a_linear_map_are_sums_over_tokens() -> None:
    s = subject("gpt2")
    with s.working():
        site = one_site(s, "ffn.up", 1)
        q = requests(1)[0].new
        u, d = gradients(s, [(site, "", 0)], [q])[site.name]
        w = s.weight(site).clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(target_nll(s.run([q], {key(site): w}).logits, [q], closing=True).mean(), [w])
        assert torch.allclose(d.t() @ u, grad, atol=1e-6)


def test_antidote_scores_by_hand() -> None:
    """Scores from the inputs a hook sees, the mask by a plain sort."""
    s = subject("llama")
    asked = requests(3)
    with s.working():
        site = one_site(s, "ffn.down", 1)
        total = torch.zeros(site.d_in)
        for q in asked:
            x = s.run([q.new], keep=[site.name]).inputs[site.name][0]
            total += (x**2).sum(0)
        score = s.weight(site).abs() * total.sqrt()
        out = EDITS.make("antidote", {"alpha": 0.03, "roles": ["ffn.down"], "layers": [1]}).edit(s, asked)[key(site)]
        assert isinstance(out, Tensor)
        count = round(0.03 * score.numel())
        worst = score.flatten().sort(descending=True).values[count - 1]
        assert torch.equal(out == 0, score >= worst) and int((out == 0).sum()) == count
        assert torch.equal(out[out != 0], s.weight(site)[out != 0])
        own = {"alpha": 0.1, "within": "row", "roles": ["ffn.down"], "layers": [1]}
        rows = EDITS.make("antidote", own).edit(s, asked)[key(site)]
        assert isinstance(rows, Tensor)
        count = round(0.1 * site.d_in)
        for value, mark, was in zip(rows, score, s.weight(site), strict=True):
            assert torch.equal(value == 0, mark >= mark.sort(descending=True).values[count - 1])
            assert torch.equal(value[value != 0], was[value != 0])


def test_rose_lora_schedule_and_thinning() -> None:
    shares = [kept_at(n, 100, 0.1, 0.1, 0.3) for n in range(100)]
    assert shares[0] == 1 and shares[9] == 1 and shares[-1] == pytest.approx(0.1) and shares[75] == pytest.approx(0.1)
    assert shares[39] == pytest.approx(0.1 + 0.9 * 0.5**3), "cubic: half way an eighth of the way is left"
    assert all(a >= b for a, b in zip(shares, shares[1:], strict=False))
    values = torch.tensor([[1.0, -5.0, 3.0], [2.0, 0.5, -1.0]])
    assert thin(values, values.abs(), 2).tolist() == [[0.0, -5.0, 3.0], [2.0, 0.0, -1.0]]


def test_rose_lora_scores_entries_by_their_values_before_the_step() -> None:
    """The paper's loop written out: gradient, score |w · ∇w| at the w that it was taken at, step, thinning."""
    s, asked = subject("llama"), requests(2)
    with s.working():
        settings = {"rank": 2, "keep": 0.2, "steps": 6, "lr": 5e-2, "layers": [1], "warm": 0.35, "cool": 0.3}
        method, site, texts = EDITS.make("rose-lora", settings), one_site(s, "ffn.down", 1), [q.new for q in asked]
        p = {k: v.requires_grad_(True) for k, v in method.drawn(s, site)}
        score, order = {k: torch.zeros_like(v) for k, v in p.items()}, shuffled(2, 16, s.generator("order"))
        optimiser = torch.optim.Adam(list(p.values()), lr=5e-2)
        for step in range(6):
            part = [texts[n] for n in next(order)]
            now = {key(site): s.weight(site) + p["B"].t() @ p["A"]}
            optimiser.zero_grad()
            target_nll(s.run(part, now).logits, part, closing=True).mean().backward()
            for k, v in p.items():
                assert v.grad is not None
                score[k] = 0.8 * score[k] + 0.2 * (v * v.grad).abs().detach()
            optimiser.step()
            for k, v in p.items():
                count = max(1, round(kept_at(step, 6, 0.2, 0.35, 0.3) * v.shape[1]))
                v.data = thin(v.data, score[k], count)
        small = method.edit(s, asked)[key(site)]
        assert isinstance(small, Small)
        made = small.form.delta(State(site, small.p, small.fixed, lambda: torch.empty(0)))["weight"]  # pyright: ignore[reportIndexIssue]
        assert torch.allclose(made, (p["B"].t() @ p["A"]).detach(), atol=1e-6)


def test_rose_lora_form_packs_what_it_holds() -> None:
    form = FORMS.make("rose-lora", {"rank": 2, "keep": 0.5})
    site = Site("x", "ffn.down", 0, "linear", 4, 6)
    a = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]])
    b = torch.zeros(6, 2)
    b[[0, 2, 5], 0], b[[1, 3, 4], 1] = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])
    p, fixed = form.packed(a, b)
    change = form.delta(State(site, p, fixed, lambda: torch.zeros(6, 4)))["weight"]
    assert torch.equal(change, b @ a) and sum(v.numel() for v in p.values()) == form.count(site) == 2 * (2 + 3)


def test_generic_logits_by_hand() -> None:
    base, raised = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 1.0, 3.0])
    assert generic_logits(base, raised, 2.0).tolist() == [0.0, 2.0, 3.0]
    assert torch.equal(generic_logits(base, raised, 0.0), base)


def test_log_odds_by_hand() -> None:
    """log p / (1 − p); a constant in the logits is nothing; exact also where float32 has p = 1."""
    z = torch.tensor([[1.0, 2.0, 3.0], [0.0, 40.0, 10.0]])
    p = z[0].softmax(-1)
    assert torch.allclose(log_odds(z)[0], (p / (1 - p)).log(), atol=1e-6)
    assert torch.allclose(log_odds(z + 17.0), log_odds(z), atol=1e-5)
    assert log_odds(z)[1].tolist() == pytest.approx([-40.0, 30.0 - math.log1p(math.exp(-10.0)), -30.0], abs=1e-4)


def test_target_losses_by_hand() -> None:
    t = Text((3, 4, 5, 6), 2, 3)
    logits = torch.randn(1, 4, 8)
    logs = logits[0].log_softmax(-1)
    assert float(target_nll(logits, [t])) == pytest.approx(-float(logs[1, 5]), abs=1e-6)
    assert float(target_nll(logits, [t], closing=True)) == pytest.approx(-float(logs[1, 5] + logs[2, 6]) / 2, abs=1e-6)
    assert float(target_kl(logits, logits, [t])) == pytest.approx(0.0, abs=1e-7)
    other = torch.randn(1, 4, 8)
    was = other[0, 1].log_softmax(-1)
    assert float(target_kl(logits, other, [t])) == pytest.approx(float((was.exp() * (was - logs[1])).sum()), abs=1e-6)


def test_padding_changes_nothing() -> None:
    s = subject("gpt2")
    short, long = text(1, 4), text(2, 12)
    with s.working(), torch.no_grad():
        alone = target_nll(s.run([short]).logits, [short])
        beside = target_nll(s.run([long, short]).logits, [long, short])
    assert float(alone[0]) == pytest.approx(float(beside[1]), abs=1e-5)


def test_flow_by_hand() -> None:
    assert flow([1, 1, 1, 1]) == 0.0
    ids = [1, 2, 3, 4]
    assert flow(ids) == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * 1.0) / 2)


def test_layers_by_share() -> None:
    class Deep:
        layers = 32

    assert layer_at(None, Deep(), 0.16) == 5 and layer_at(-1, Deep(), 0) == 31  # pyright: ignore[reportArgumentType]
    with pytest.raises(LuthierError, match="no layer 32; the base has layers 0 to 31"):
        layer_at(32, Deep(), 0)  # pyright: ignore[reportArgumentType]
