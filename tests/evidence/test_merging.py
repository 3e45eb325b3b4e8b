"""Evidence of the merging rows: what any faithful implementation shows exactly. `luthier papers ID` names these tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError

G = torch.Generator().manual_seed(0)
BASE = torch.randn(12, 20, generator=G) * 0.02
TUNED = [BASE + torch.randn(12, 20, generator=G) * 0.003 for _ in range(3)]


def stack(method: str, models: list[Tensor], base: Tensor | None = BASE, seed: int = 0, **more: Any) -> Stack:
    each = {k: more.pop(k, [v] * len(models)) for k, v in MERGES[method].each.items()}
    place = {k: more.pop(k) for k in ("layer", "layers", "measured", "name") if k in more}
    assert not more
    generator = torch.Generator().manual_seed(seed)
    origin = None if MERGES[method].base == "unused" else base
    return Stack(place.pop("name", "w"), models, origin, each, generator=generator, **place)


def merged(method: str, models: list[Tensor], settings: dict[str, Any] | None = None, **more: Any) -> Tensor:
    return MERGES.make(method, settings or {}).merge(stack(method, models, **more))


def test_p080_soups() -> None:
    wide = [x.double() for x in TUNED]
    uniform = merged("linear", wide, weight=[1.0] * 3)
    assert torch.equal(uniform, (wide[0] + wide[1] + wide[2]) / 3), "the mean, bit for bit in float64"
    assert torch.equal(merged("linear", [TUNED[0]] * 2), TUNED[0])
    target = torch.tensor([0.6, 0.4, 0.0, 0.0])

    def score(each: Any) -> float:  # of an average; the third model hurts, the fourth hurts more
        w = torch.tensor(each["weight"])
        calls.append(w)
        return -float((w / w.sum() - target).square().sum())

    greedy, learned = MERGES.make("greedy_soup", {}), MERGES.make("learned_soup", {"rounds": 8})
    calls: list[Tensor] = []
    found = greedy.search(4, score)
    assert found == {"weight": [1.0, 1.0, 0.0, 0.0]} and len(calls) == 7
    assert score(found) >= max(score({"weight": row}) for row in torch.eye(4).tolist())
    weights = learned.search(4, score)
    assert score(weights) > score({"weight": [0.25] * 4}) and abs(sum(weights["weight"]) - 1) < 1e-6
    alone = greedy.search(3, lambda each: -sum(each["weight"]))  # every average is worse: one stays
    assert alone == {"weight": [1.0, 0.0, 0.0]}
    soup = merged("greedy_soup", TUNED, weight=[1.0, 1.0, 0.0])
    assert torch.allclose(soup, (TUNED[0] + TUNED[1]) / 2, atol=1e-8) and soup.shape == BASE.shape


def test_p017_model_stock() -> None:
    assert torch.allclose(merged("model_stock", [TUNED[0]] * 2), TUNED[0], atol=1e-7), "equal tunes: t = 1"
    base, e = torch.zeros(2, 2), torch.eye(2)
    assert torch.equal(merged("model_stock", [e[:1].repeat(2, 1), e[1:].repeat(2, 1)], base=base), base), "t = 0"
    for count in (2, 3):
        models = TUNED[:count]
        d = torch.stack([(m - BASE).flatten() for m in models]).double()
        unit = d / d.norm(dim=1, keepdim=True)
        cosine = float((unit @ unit.T)[~torch.eye(count, dtype=torch.bool)].mean())
        t = count * cosine / (1 + (count - 1) * cosine)
        put = stack("model_stock", models)
        out = MERGES.make("model_stock", {}).merge(put)
        assert torch.allclose(out, t * sum(models) / count + (1 - t) * BASE, atol=1e-6)
        assert abs(put.notes["t"] - t) < 1e-5, "t is reported by tensor"


def test_p026_breadcrumbs_keeps_the_middle_band() -> None:
    change = (TUNED[0] - BASE).abs().flatten()
    n = change.numel()
    for density, gamma in ((0.5, 0.1), (0.14, 0.01), (0.95, 0.05)):
        out = merged("breadcrumbs", TUNED[:1], density=[density], gamma=[gamma])
        kept = (out != BASE).flatten()
        order = change.argsort()
        last = n - int(gamma * n)
        first = last - int(density * n)
        assert set(kept.nonzero()[:, 0].tolist()) == set(order[first:last].tolist())
        assert torch.allclose(out.flatten()[kept], TUNED[0].flatten()[kept], atol=1e-8)
    two = merged("breadcrumbs", TUNED[:2], {"lambda_": 0.6}, density=[0.5] * 2, gamma=[0.1] * 2)
    single = [merged("breadcrumbs", [m], density=[0.5], gamma=[0.1]) - BASE for m in TUNED[:2]]
    assert torch.allclose(two, BASE + 0.6 * (single[0] + single[1]), atol=1e-7), "one factor for all"


def test_p268_dare() -> None:
    change, runs, total = TUNED[0] - BASE, 600, torch.zeros_like(BASE)
    plain = torch.zeros_like(BASE)
    for seed in range(runs):
        total += merged("dare_linear", TUNED[:1], density=[0.25], seed=seed) - BASE
        plain += merged("dare_linear", TUNED[:1], {"rescale": False}, density=[0.25], seed=seed) - BASE
    error = (total / runs - change).norm() / change.norm()
    assert error < 1.3 * (3 / runs) ** 0.5, "the mean over seeds is the change itself, within its sampling error"
    shrunk = (plain / runs * change).sum() / change.square().sum()
    assert abs(float(shrunk) - 0.25) < 0.02, "without rescaling a quarter is left"
    big = torch.randn(400, 500, generator=torch.Generator().manual_seed(1))
    kept = (merged("dare_linear", [big], base=torch.zeros_like(big), density=[0.1]) != 0).double().mean()
    assert abs(float(kept) - 0.1) < 0.004
    averaged = merged("dare_linear", TUNED, {"normalize": True}, density=[1.0] * 3)
    assert torch.allclose(averaged, BASE + sum(t - BASE for t in TUNED) / 3, atol=1e-7)
    assert not torch.equal(
        merged("dare_ties", TUNED, density=[0.5] * 3), merged("dare_linear", TUNED, density=[0.5] * 3)
    )


def test_p268_divided_by_the_density_the_mean_is_the_change_also_where_one_entry_holds_much_of_it() -> None:
    runs, base = 300, torch.zeros(5, 20)
    change = torch.randn(5, 20, generator=torch.Generator().manual_seed(2)) * 1e-3
    change[0, 0] = 1.0
    for method, density in (("dare_linear", 0.5), ("dare_ties", 0.1)):
        total = torch.zeros_like(base)
        for seed in range(runs):
            total += merged(method, [change], {"rescale": "by_density"}, base=base, density=[density], seed=seed)
        off = (total / runs - change).abs() / (change.abs() * ((1 / density - 1) / runs) ** 0.5)
        assert off.max() < 4, "every entry within four of its standard errors"
    restored = sum(merged("dare_linear", [change], base=base, density=[0.1], seed=seed) for seed in range(runs)) / runs
    assert restored[0, 0] < 0.2, "where the absolute sum is restored, the largest entry comes out ten times too small"
    assert torch.equal(merged("dare_linear", [change], {"rescale": "by_density"}, base=base, density=[0.0]), base)
    whole = merged("dare_linear", [change], {"rescale": "by_density"}, base=base, density=[1.0])
    assert torch.equal(whole, change), "nothing is dropped and nothing enlarged"
    with pytest.raises(LuthierError, match="'ties', setting 'rescale'"):
        MERGES.make("lines", {"of": "ties", "rescale": "by_density"})


def test_p222_lines() -> None:
    one = TUNED[:1]
    assert torch.allclose(merged("lines", one, {"alpha": 1.0, "beta": 0.0}, layer=2, layers=4), TUNED[0], atol=1e-8)
    assert torch.equal(merged("lines", one, {"alpha": 0.0, "beta": 1.0}, layer=0, layers=4), BASE)
    factors = [
        float(
            ((merged("lines", one, {"alpha": 0.4, "beta": 0.6}, layer=k, layers=4) - BASE) / (TUNED[0] - BASE)).mean()
        )
        for k in range(4)
    ]
    assert factors == pytest.approx([0.4, 0.6, 0.8, 1.0], abs=1e-3)
    for inner, put in (
        ("task_arithmetic", {}),
        ("ties", {"density": [0.4] * 3}),
        ("dare_ties", {"density": [0.4] * 3}),
    ):
        put = {**put, "weight": [0.5] * 3}
        merge: Merge = MERGES.make("lines", {"of": inner, "beta": 0.3})
        whole = stack("lines", TUNED, layer=1, layers=3, **put)
        norms = merge.measure(whole)
        change = merged(inner, TUNED, **put) - BASE
        summed = sum(t - BASE for t in TUNED).abs().sum()
        alpha = float(summed / change.abs().sum() / 3)
        out = merge.merge(stack("lines", TUNED, layer=1, layers=3, measured={"w": norms}, **put))
        assert torch.allclose(out, BASE + (alpha + 0.15) * change, atol=1e-6)
    with pytest.raises(LuthierError, match="makes no change of a base"):
        MERGES.make("lines", {"of": "linear"})


def test_p116_low_rank_experts() -> None:
    merge = MERGES.make("robust_merge", {"keep": 0.5, "compensate": 0.5})
    a = [
        torch.tensor([[4.0, -3.0, 1.0, 0.5], [2.0, 0.1, 0.2, -0.3]]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.4, 0.3, 0.2, 5.0]]),
    ]
    b = [torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[2.0, 1.0], [0.5, -4.0]])]
    out_a, out_b = merge.merge_factors(list(zip(a, b, strict=True)), stack("robust_merge", TUNED[:2]))
    cut = [torch.tensor([[4.0, -3.0, 1.0, 0], [2.0, 0, 0, 0]]), torch.tensor([[0, 2.0, 3.0, 4.0], [0, 0, 0, 5.0]])]
    assert torch.equal(out_a, 2 * (cut[0] + cut[1])), "A: 2 Σ trim(A)"
    # By hand: row scales 8.5/8 and 2.6/2; 10/9 and 5.9/5; the lower one is raised to the upper one (half the ranks).
    scales = [torch.tensor([1.3, 1.3]), torch.tensor([1.18, 1.18])]
    cut_b = [torch.tensor([[0, -2.0], [3.0, 0]]), torch.tensor([[2.0, 0], [0, -4.0]])]
    wanted = sum(2 * s * c for s, c in zip(scales, cut_b, strict=True)) / (scales[0] + scales[1])
    assert torch.allclose(out_b, wanted, atol=1e-6), "B: the scaled sum over the sum of scales"
    free = MERGES.make("robust_merge", {"keep": 1.0})
    same = free.merge_factors([(a[0], b[0])], Stack("w", [], None, {"weight": [1.0]}))
    assert torch.equal(same[0], a[0]) and torch.allclose(same[1], b[0]), "nothing trimmed, one expert: itself"


def test_p317_groups_merged_by_ties() -> None:
    g = torch.Generator().manual_seed(3)
    experts = [torch.randn(12, 4, generator=g) @ torch.randn(4, 20, generator=g) * 0.003 for _ in range(4)]
    groups = [experts[:2], experts[2:]]
    out = [merged("ties", [BASE + d for d in group], density=[0.2] * 2) for group in groups]
    assert sum(x.numel() for x in out) < sum(BASE.numel() for _ in experts), "fewer numbers than the experts have"
    for group, result in zip(groups, out, strict=True):
        trims = []
        for d in ((BASE + d) - BASE for d in group):
            limit = d.abs().flatten().sort(descending=True).values[int(0.2 * d.numel()) - 1]
            trims.append(torch.where(d.abs() >= limit, d, 0))
        sign = torch.where(trims[0] + trims[1] >= 0, 1.0, -1.0)
        agree = torch.stack([t * (t.sign() == sign) for t in trims])
        mean = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
        assert torch.allclose(result, BASE + mean, atol=1e-7)


def test_p403_decouple_then_merge() -> None:
    wanted, asked = [0.4, 1.0, 0.7], []

    def score(each: Any) -> float:
        asked.append(each["weight"])
        return -sum(abs(a - b) for a, b in zip(each["weight"], wanted, strict=True))

    merge = MERGES.make("deme", {"lowest": 0.4, "highest": 1.0, "points": 3})
    assert merge.search(3, score) == {"weight": wanted} and len(asked) == 27
    out = merged("deme", TUNED, weight=wanted)
    assert torch.allclose(out, BASE + sum(w * (t - BASE) for w, t in zip(wanted, TUNED, strict=True)), atol=1e-7)
    assert out.numel() == BASE.numel()
    # Two groups whose gradients oppose each other: each copy has less loss on its own group than joint training has.
    data = [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 0.0, 2.0])]
    loss = lambda w, k: float((w - data[k]).square().sum())  # noqa: E731
    joint = (data[0] + data[1]) / 2
    assert all(loss(data[k], k) < loss(joint, k) for k in (0, 1))
    halves = MERGES.make("deme", {"lowest": 0.0, "points": 5})
    found = halves.search(
        2, lambda e: -sum(loss(e["weight"][0] * data[0] + e["weight"][1] * data[1], k) for k in (0, 1))
    )
    put = merged("deme", data, base=torch.zeros(3), **{k: list(v) for k, v in found.items()})
    assert sum(loss(put, k) for k in (0, 1)) <= sum(loss(joint, k) for k in (0, 1)), "the grid finds the joint optimum"


def test_p412_lo_fi_is_the_mean() -> None:
    wide = [x.double() for x in TUNED]
    assert torch.equal(merged("linear", wide), (wide[0] + wide[1] + wide[2]) / 3)
    stacked = torch.stack(wide)
    assert (merged("linear", wide) - stacked.mean(0)).abs().max() < 1e-16
    target = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(5)).double() * 0.02
    loss = lambda w: float((w - target).square().sum())  # noqa: E731
    assert loss(merged("linear", wide)) <= sum(map(loss, wide)) / 3, "convex: no worse than the nodes are on average"


def test_p430_wise_ft() -> None:
    assert torch.equal(merged("wise_ft", TUNED[:1], {"alpha": 0.0}), BASE)
    assert torch.equal(merged("wise_ft", TUNED[:1], {"alpha": 1.0}), TUNED[0])
    half = merged("wise_ft", TUNED[:1])
    assert torch.allclose(half, (BASE + TUNED[0]) / 2, atol=1e-8)
    far, near = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    inside, shifted = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.4])
    losses = [
        [float((merged("wise_ft", [near], {"alpha": a / 10}, base=far) - t).square().sum()) for t in (inside, shifted)]
        for a in range(11)
    ]
    assert losses[10][0] == 0 and min(range(11), key=lambda a: losses[a][1]) in (4, 5), "a frontier with a best inside"
    with pytest.raises(LuthierError, match="out of range"):
        MERGES.make("wise_ft", {"alpha": 1.5})


def test_p024_ratatouille_averages_runs_from_different_starts() -> None:
    from luthier.delta.registry import MERGES as registry
    from luthier.papers.claims import PACKAGE
    from luthier.plan.stages import load_stages, references

    stages = {s.name: s for s in load_stages(PACKAGE / "recipes" / "ratatouille.yaml")}
    tunes = [s for s in stages.values() if s.verb == "tune"]
    starts = {s.name: list(references(s.settings)) for s in tunes}
    auxiliary = [n for n, found in starts.items() if not found]
    finals = [n for n, found in starts.items() if found]
    assert sorted(f for n in finals for f in starts[n]) == sorted(auxiliary) and len(auxiliary) >= 2
    sources = lambda names: [stages[n].settings["data"]["train"]["path"] for n in names]  # noqa: E731
    assert len(set(sources(finals))) == 1 and len({*sources(auxiliary), *sources(finals)}) == len(auxiliary) + 1
    merge = next(s for s in stages.values() if s.verb == "merge").settings
    assert merge["method"] in registry and list(references(merge)) == finals
    wide = [x.double() for x in TUNED]
    assert torch.equal(merged(merge["method"], wide), (wide[0] + wide[1] + wide[2]) / 3)


def test_p054_slerp() -> None:
    other = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(9)) * 0.02
    assert torch.allclose(merged("slerp", [other], {"t": 0.0}), BASE, atol=1e-8)
    assert torch.allclose(merged("slerp", [other], {"t": 1.0}), other, atol=1e-8)
    same_norm = other * BASE.norm() / other.norm()
    for t in (0.25, 0.5, 0.75):
        assert merged("slerp", [same_norm], {"t": t}).norm() == pytest.approx(float(BASE.norm()), rel=1e-5)
        assert merged("slerp", [3 * same_norm], {"t": t}).norm() != pytest.approx(float(BASE.norm()), rel=1e-2)
    near = BASE + 1e-4 * other
    put = stack("slerp", [near])
    out = MERGES.make("slerp", {}).merge(put)
    assert put.notes == {"interpolated linearly": 1.0} and torch.allclose(out, (BASE + near) / 2, atol=1e-8)
    apart = stack("slerp", [other])
    MERGES.make("slerp", {}).merge(apart)
    assert apart.notes == {"interpolated linearly": 0.0}
