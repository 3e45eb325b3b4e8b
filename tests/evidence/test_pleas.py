"""Evidence of PLeaS (P111): permuted copies, least squares against averaging, and units kept apart."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from luthier.algebra.pleas import average, match, shared, solve
from luthier.errors import LuthierError
from luthier.parts.assignment import assign

Layers = tuple[Tensor, Tensor]
N, HIDDEN, OUT = 6, 10, 4


def network(seed: int) -> Layers:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(HIDDEN, N, generator=g), torch.randn(OUT, HIDDEN, generator=g)


def features(w: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.relu(x @ w[0].T)
    return hidden, hidden @ w[1].T


X = torch.randn(400, N, generator=torch.Generator().manual_seed(9))


def test_assignment_is_the_best_of_all() -> None:
    for seed in range(20):
        s = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
        best = max(permutations(range(5)), key=lambda p: sum(float(s[i, j]) for i, j in enumerate(p)))
        assert assign(s).tolist() == list(best)
    big = torch.randn(150, 150, generator=torch.Generator().manual_seed(3))
    assert sorted(assign(big).tolist()) == list(range(150))
    with pytest.raises(ValueError, match="square"):
        assign(torch.zeros(2, 3))


def test_p111_pleas() -> None:
    a, order = network(0), torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1))
    copy = (a[0][order], a[1][:, order])
    blocks = match(features(a, X)[0], features(copy, X)[0])
    first, second = average(a[0], copy[0], blocks, shared(N)), average(a[1], copy[1], shared(OUT), blocks)
    assert torch.equal(first, a[0]) and torch.equal(second, a[1]), "a permuted copy merges to the network itself"

    b = network(2)
    errors = {}
    for keep in (1.0, 0.5):
        blocks = match(features(a, X)[0], features(b, X)[0], keep)
        assert blocks.width == HIDDEN + round((1 - keep) * HIDDEN)
        start = average(a[1], b[1], shared(OUT), blocks)
        (ha, ya), (hb, yb) = features(a, X), features(b, X)
        solved = solve((ha, hb), (ya, yb), shared(OUT), blocks, start)
        errors[keep] = [_error(w, (ha, hb), (ya, yb), blocks) for w in (start, solved)]
        assert errors[keep][1] < 0.9 * errors[keep][0], "least squares have less feature error than averaging"
    assert errors[0.5][1] < errors[1.0][1], "more units, less error"

    blocks = match(features(a, X)[0], features(b, X)[0], 0.0)
    apart = match(features(a, X)[1], features(b, X)[1], 0.0)
    assert blocks.width == 2 * HIDDEN and apart.width == 2 * OUT
    whole = (average(a[0], b[0], blocks, shared(N)), average(a[1], b[1], apart, blocks))
    out = features(whole, X)[1]
    assert torch.allclose(out[:, :OUT], features(a, X)[1][:, apart.alone_a], atol=1e-5), "all apart: both models"
    assert torch.allclose(out[:, OUT:], features(b, X)[1][:, apart.alone_b], atol=1e-5)
    with pytest.raises(LuthierError, match="match equal widths"):
        match(X, X[:, :3])


def _error(w: Tensor, inputs: Layers, outputs: Layers, blocks: object) -> float:
    from luthier.algebra.pleas import placed

    pairs = zip(inputs, outputs, "ab", strict=True)
    return sum(float((placed(h, blocks, k) @ w.T - y).square().sum()) for h, y, k in pairs)  # pyright: ignore
