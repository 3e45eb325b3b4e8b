"""Laws of merging: endpoints, order, scale, a model with itself, no change at all; exact counts of what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.errors import LuthierError
from luthier.parts import trims
from luthier.parts.draws import Coin
from luthier.parts.trims import band, kth, spans

FEW = settings(max_examples=25, deadline=None)
SEEDS, SHARES = st.integers(0, 10**6), st.floats(0, 1, width=32)


def drawn(seed: int, count: int, shape: tuple[int, ...] = (5, 7)) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g) * 0.02
    return base, [base + torch.randn(shape, generator=g) * 0.003 for _ in range(count)]


def merge(
    method: str, base: Tensor | None, models: list[Tensor], each: Any = None, seed: int = 0, **put: Any
) -> Tensor:
    cls = MERGES[method]
    own = {k: (each or {}).get(k, [v] * len(models)) for k, v in cls.each.items()}
    generator = torch.Generator().manual_seed(seed)
    place = {k: put.pop(k) for k in ("layer", "layers", "measured") if k in put}
    return MERGES.make(method, put).merge(Stack("w", models, base, own, generator=generator, **place))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-7, rtol=1e-5)


@FEW
@given(seed=SEEDS)
def test_endpoints(seed: int) -> None:
    base, (model,) = drawn(seed, 1)
    assert close(merge("slerp", base, [model], t=0.0), base) and close(merge("slerp", base, [model], t=1.0), model)
    assert torch.equal(merge("wise_ft", base, [model], alpha=0.0), base)
    assert torch.equal(merge("wise_ft", base, [model], alpha=1.0), model)
    assert torch.equal(merge("nearswap", base, [model], t=0.0), base)
    assert close(merge("nearswap", base, [model], t=1.0), model)
    assert torch.equal(merge("passthrough", None, [model]), model)


@FEW
@given(seed=SEEDS, share=SHARES)
def test_wise_ft_is_a_straight_line(seed: int, share: float) -> None:
    base, (model,) = drawn(seed, 1)
    assert close(merge("wise_ft", base, [model], alpha=share), base + share * (model - base))


@FEW
@given(seed=SEEDS, gamma=SHARES, layer=st.integers(0, 4))
def test_lines_single_task(seed: int, gamma: float, layer: int) -> None:
    base, (model,) = drawn(seed, 1)
    out = merge("lines", base, [model], alpha=gamma, beta=1 - gamma, layer=layer, layers=5)
    assert close(out, base + (gamma + (1 - gamma) * layer / 4) * (model - base))
    assert close(merge("lines", base, [model], alpha=1.0, beta=0.0, layer=layer, layers=5), model)
    assert torch.equal(merge("lines", base, [model], alpha=0.0, beta=1.0, layer=0, layers=5), base)
    assert close(merge("lines", base, [model], alpha=0.0, beta=1.0, layer=4, layers=5), model)
    assert torch.equal(merge("lines", base, [model], alpha=gamma, layer=layer, layers=5), out), "β is 1 − α by default"
    norms = {"w": MERGES.make("lines", {}).measure(Stack("w", [model], base, {"weight": [1.0]}))}
    assert close(merge("lines", base, [model], measured=norms, layer=layer, layers=5), model)


def test_lines_takes_as_many_models_as_the_merge_it_names() -> None:
    base, models = drawn(0, 2)
    with pytest.raises(LuthierError, match="'slerp' takes 1 models, got 2 at w"):
        merge("lines", base, models, of="slerp", alpha=1.0)
    with pytest.raises(LuthierError, match="'model_stock' takes at least 2 models, got 1 at w"):
        merge("lines", base, models[:1], of="model_stock", alpha=1.0)


ORDERLESS = ["linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "multislerp", "karcher", "sce"]


@pytest.mark.parametrize("method", [*ORDERLESS, "model_stock", "ram", "ramplus_tl"])
@FEW
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_order_does_not_matter(method: str, seed: int, order: list[int]) -> None:
    base, models = drawn(seed, 3)
    each = {"weight": [0.2, 0.5, 0.7], "density": [0.3, 0.6, 0.9], "gamma": [0.1, 0.0, 0.2]}
    turned = {k: [v[i] for i in order] for k, v in each.items()}
    origin = None if MERGES[method].base == "unused" else base
    one, other = merge(method, origin, models, each), merge(method, origin, [models[i] for i in order], turned)
    assert torch.allclose(one, other, atol=2e-6)


ITSELF = [
    "linear",
    "ties",
    "nuslerp",
    "multislerp",
    "karcher",
    "sce",
    "model_stock",
    "ram",
    "greedy_soup",
    "learned_soup",
]


@pytest.mark.parametrize("method", ITSELF)
@FEW
@given(seed=SEEDS)
def test_a_model_with_itself_is_itself(method: str, seed: int) -> None:
    base, (model,) = drawn(seed, 1)
    origin = None if MERGES[method].base == "unused" else base
    put = {"epsilon": 0.0} if method == "ram" else {}
    assert torch.allclose(merge(method, origin, [model, model.clone()], **put), model, atol=2e-6)


CHANGES = [n for n in MERGES if MERGES[n].base == "needed" and MERGES[n].models[1] is None and n != "lines"]


@pytest.mark.parametrize("method", CHANGES)
@FEW
@given(seed=SEEDS)
def test_no_change_gives_the_base(method: str, seed: int) -> None:
    base, _ = drawn(seed, 1)
    each = {"density": [0.5] * 3}
    assert torch.equal(merge(method, base, [base.clone() for _ in range(3)], each), base)


@FEW
@given(seed=SEEDS, place=st.integers(0, 2), kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_multislerp_where_a_model_has_changed_nothing(seed: int, place: int, kind: torch.dtype) -> None:
    base, models = drawn(seed, 3)
    base, models = base.to(kind), [m.to(kind) for m in models]
    assert torch.equal(merge("multislerp", base, [base.clone()] * 3), base)
    zero = torch.zeros_like(base)
    assert torch.equal(merge("multislerp", None, [zero, zero, zero]), zero)
    models[place] = base.clone()
    out = merge("multislerp", base, models)
    assert torch.isfinite(out).all() and not torch.equal(out, base)


@FEW
@given(seed=SEEDS, factor=st.floats(-2, 2, width=32))
def test_task_arithmetic_scales(seed: int, factor: float) -> None:
    base, models = drawn(seed, 2)
    one = merge("task_arithmetic", base, models, {"weight": [0.4, 0.6]})
    scaled = merge("task_arithmetic", base, models, {"weight": [0.4, 0.6]}, lambda_=factor)
    assert close(scaled, base + factor * (one - base))


@FEW
@given(seed=SEEDS)
def test_model_stock_between_base_and_mean(seed: int) -> None:
    base = torch.zeros(6)
    e = torch.eye(6)
    assert torch.equal(merge("model_stock", base, [e[0], e[1]]), base), "orthogonal changes give the base"
    base, models = drawn(seed, 2)
    d1, d2 = ((m - base).flatten().double() for m in models)
    cosine = float(d1 @ d2 / d1.norm() / d2.norm())
    t = 2 * cosine / (1 + cosine)
    assert torch.allclose(
        merge("model_stock", base, models), t * (models[0] + models[1]) / 2 + (1 - t) * base, atol=1e-6
    )


@FEW
@given(seed=SEEDS, size=st.sampled_from([1, 1e-3, 1e-6, 1e-9, 1e-12]), rows=st.booleans())
def test_model_stock_of_changes_of_any_size(seed: int, size: float, rows: bool) -> None:
    _, (change,) = drawn(seed, 1)
    change = change * size
    same = merge("model_stock", torch.zeros_like(change), [change, change.clone()], filter_wise=rows)
    assert torch.allclose(same, change, rtol=1e-4, atol=0), "equal models give t = 1"
    half = change.bfloat16()
    same = merge("model_stock", torch.zeros_like(half), [half, half.clone()], filter_wise=rows)
    assert torch.allclose(same, half, rtol=2e-2, atol=0), "in 16 bits too"


def test_della_of_a_single_number() -> None:
    base, model = torch.tensor(1.0), torch.tensor(3.0)
    for seed in range(20):
        out = merge("della", base, [model], {"density": [0.5]}, seed=seed)
        assert out.shape == () and float(out) in (1.0, 3.0)


@FEW
@given(
    seed=SEEDS,
    n=st.integers(1, 3000),
    levels=st.sampled_from([0, 3, 50]),
    kind=st.sampled_from(["f4", "bf16", "f2", "f8"]),
    data=st.data(),
)
def test_bands_keep_exactly_what_ranks_in_them(seed: int, n: int, levels: int, kind: str, data: st.DataObject) -> None:
    dtype = {"f4": torch.float32, "bf16": torch.bfloat16, "f2": torch.float16, "f8": torch.float64}[kind]
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x = ((x * levels).round() / levels if levels else x).to(dtype)
    first = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(first + 1, n))
    for most in (trims.SMALL, 0):  # by a sort, and in the order of the entries
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trims, "SMALL", most)
            thin = band(lambda a, b: x[a:b], n, first, last, lambda w: torch.sort(w).indices[first:last])
        out, again = x.clone(), x.clone()
        thin.apply(0, out)
        for a, b in reversed(list(spans(n, 97))):  # in any order and pieces
            thin.apply(a, again[a:b])
        assert torch.equal(out, again)
        order = x.float().abs().sort().values
        wanted = torch.cat([torch.zeros(n - last + first), order[first:last]]).sort().values
        assert torch.equal(out.float().abs().sort().values, wanted)
        kept = out != 0
        assert torch.equal(out[kept], x[kept])


@FEW
@given(seed=SEEDS, n=st.integers(1, 2000), data=st.data())
def test_kth_is_the_sorted_one(seed: int, n: int, data: st.DataObject) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(0, n - 1))
    ((bits, below, equal),) = kth(lambda a, b: x[a:b], n, [rank])
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert value == x.abs().sort().values[rank] and below == int((x.abs() < value).sum())
    assert equal == int((x.abs() == value).sum())


def test_coins_fall_as_often_as_stated_and_again_alike() -> None:
    n = 1 << 20
    for density in (0.1, 0.5, 0.77, 1 / 3, 3e-5):
        coin, out, again = (
            Coin(density, torch.Generator().manual_seed(1)),
            torch.ones(n),
            torch.ones(n, dtype=torch.bfloat16),
        )
        for a, b in spans(n):
            coin.apply(a, out[a:b])
        for a, b in ((1001, n), (0, 64), (64, 1001)):  # in any order and pieces
            coin.apply(a, again[a:b])
        assert torch.equal(out, again.float())
        assert abs(float(out.sum()) - density * n) < 5 * (n * density * (1 - density)) ** 0.5
