"""Moves on numbers that fit on paper, and the rule of speculative sampling by full enumeration."""

from __future__ import annotations

import itertools
import math

import torch

from luthier.delta import MOVES
from luthier.moving.engine import divergence, nucleus
from luthier.parts.speculation import accept, acceptance, draw, residual


def logits(*shares: float) -> torch.Tensor:
    return torch.tensor([[math.log(s) for s in shares]])


L, E, B = logits(0.5, 0.25, 0.25), logits(0.2, 0.6, 0.2), logits(0.4, 0.3, 0.3)


def test_proxy() -> None:
    """p ∝ p_L · e / b: 0.5 · 0.5, 0.25 · 2, 0.25 · ⅔."""
    out = MOVES.make("proxy", {}).fuse(L, [(E, B)]).exp()
    want = torch.tensor([[0.25, 0.5, 1 / 6]])
    assert torch.allclose(out, want / want.sum())
    twice = MOVES.make("proxy", {"alpha": 2.0}).fuse(L, [(E, B)]).exp()
    want = torch.tensor([[0.125, 1.0, 1 / 9]])
    assert torch.allclose(twice, want / want.sum())


def test_emulated_fine_tuning_mixes_and_restricts() -> None:
    other = logits(0.8, 0.1, 0.1)
    out = MOVES.make("emulated-fine-tuning", {"mix": (0.25, 0.75)}).fuse(L, [(E, B), (other, B)]).exp()
    want = torch.tensor(
        [[0.5 * 0.5**0.25 * 2**0.75, 0.25 * 2**0.25 * (1 / 3) ** 0.75, 0.25 * (2 / 3) ** 0.25 * (1 / 3) ** 0.75]]
    )
    assert torch.allclose(out, want / want.sum())
    # The expert's nucleus of 0.5 is its second token: there the fused odds, elsewhere its own, then normalised.
    narrow = MOVES.make("emulated-fine-tuning", {"top_p": 0.5}).fuse(L, [(E, B)]).exp()
    fused = 0.5 / (0.25 + 0.5 + 1 / 6)
    want = torch.tensor([[0.2, fused, 0.2]])
    assert torch.allclose(narrow, want / want.sum())


def test_nucleus() -> None:
    assert nucleus(logits(0.5, 0.3, 0.2), 0.5).tolist() == [[True, False, False]]
    assert nucleus(logits(0.2, 0.5, 0.3), 0.6).tolist() == [[False, True, True]]
    assert nucleus(logits(0.2, 0.5, 0.3), 1e-9).tolist() == [[False, True, False]]


def test_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert math.isclose(float(divergence(p, q)), 0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel_tol=1e-5)


def test_dynamic_fusion_finds_the_factor() -> None:
    """Two tokens, an even large model and small base: the tilt by α is a logit of 2αc; so α is 1 where base = large."""
    even, expert = logits(0.5, 0.5), logits(0.9, 0.1)
    out = MOVES.make("dynamic-fusion", {}).fuse(even, [(expert, even)])
    assert torch.allclose(out.exp(), torch.tensor([[0.9, 0.1]]), atol=1e-5)
    # From a large model at 0.8 the same divergence of 0.368 nats is not reached by α = 0.5; the bound holds.
    out = MOVES.make("dynamic-fusion", {"most": 0.5}).fuse(even, [(expert, even)]).exp()
    assert torch.allclose(out, torch.tensor([[0.75, 0.25]]), atol=1e-4)


def test_drafts_are_distributed_as_the_target_exactly() -> None:
    """Two drafted tokens over four, enumerated: P(kept, next) of the rule gives p(x₁) p(x₂ | x₁) for every start."""
    g = torch.Generator().manual_seed(0)
    size = 4
    p1, q1 = (torch.rand(size, generator=g).double() for _ in range(2))
    p2, q2 = (torch.rand(size, size, generator=g).double() for _ in range(2))
    p1[2], q1[3] = 0.0, 0.0
    p1, q1, p2, q2 = (t / t.sum(-1, keepdim=True) for t in (p1, q1, p2, q2))
    found = torch.zeros(size, size).double()
    for a, b in itertools.product(range(size), range(size)):
        drawn = q1[a] * q2[a, b]
        first, second = acceptance(p1, q1)[a], acceptance(p2[a], q2[a])[b]
        found[a, b] += drawn * first * second
        found[a] += drawn * first * (1 - second) * residual(p2[a], q2[a])
        found += (drawn * (1 - first) * residual(p1, q1))[:, None] * p2  # the next round starts with the target's own
    assert torch.allclose(found, p1[:, None] * p2, atol=1e-12)


def test_accept_follows_the_uniforms() -> None:
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])
    q = torch.tensor([[0.4, 0.6], [0.5, 0.5]])
    assert accept(p, q, [0, 1], torch.tensor([0.49, 0.99, 0.7])) == (2, 0)
    assert accept(p, q, [0, 1], torch.tensor([0.51, 0.0, 0.7])) == (0, 1)  # the residual has the second token alone
    assert accept(p[:1], q[:0], [], torch.tensor([0.1])) == (0, 0)
    assert [draw(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]), u) for u in (0.0, 0.49, 0.51, 0.999999999)] == [1, 1, 3, 3]
