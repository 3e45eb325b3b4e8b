"""Evidence of the merging rows: what any faithful implementation shows exactly. `luthier papers ID` names these tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.delta import MERGES, Merge, Stack
from luthier.errors import LuthierError
from luthier.training.averages import SlowWeights
from tests.toys import Net, answers, batches, drawn, fit, merge_nets, mse, net, plus

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


class Shift:
    """A network that knows one map over all inputs, a task that is another, and records of it in which half of the inputs
    hardly vary; where they do vary is the shifted data."""

    def __init__(self) -> None:
        self.task = plus(net(12, 24, 4, seed=100), (0.5, net(12, 24, 4, seed=101)))
        known = self.data(512, 1, torch.ones(12), net(12, 24, 4, seed=100))
        self.base = fit(net(12, 32, 4), lambda n, _: mse(n, *known), 200)
        self.near = torch.tensor([1.0] * 6 + [0.3] * 6)
        self.inside, self.shifted = self.data(1000, 3, self.near), self.data(1000, 4, torch.ones(12))

    def data(self, n: int, seed: int, scale: Tensor, task: Net | None = None, noise: float = 0.0) -> tuple[Tensor, ...]:
        """Inputs and answers of a task, which is the target unless stated."""
        x = drawn(n, 12, seed=seed) * scale
        y = answers(task or self.task, x)
        return x, y + noise * drawn(*y.shape, seed=seed + 5000)

    def losses(self, n: Net) -> tuple[float, float]:
        """On data like those trained on, and on shifted data."""
        return float(mse(n, *self.inside)), float(mse(n, *self.shifted))

    def run(self, records: int, seed: int, start: Net | None = None, steps: int = 60, lr: float = 1e-2) -> Net:
        """Trained on 128 noisy records of the target, in an order of the seed's."""
        data = self.data(128, records, self.near, noise=0.5)
        return fit(start or self.base, batches(*data, seed=seed), steps, lr)


@pytest.fixture(scope="module")
def shift() -> Shift:
    return Shift()


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


def test_p017_model_stock(shift: Shift) -> None:
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
    for records in (20, 21, 22):
        runs = [shift.run(records, seed) for seed in (0, 1)]
        stock = shift.losses(merge_nets("model_stock", runs, shift.base))[1]
        assert stock < min(shift.losses(r)[1] for r in runs), "better than either parent on shifted data"


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


def test_p026_outliers_of_many_tasks_add_up() -> None:
    """Tasks with inputs of their own, each change with one entry in a hundred a large outlier: from one task's change to
    eight's, accuracy falls by less with breadcrumbs than with plain task arithmetic, by the same factor."""
    falls = {"task_arithmetic": 0.0, "breadcrumbs": 0.0}
    for seed in (0, 1, 2):
        directions = drawn(8, 8, seed=seed)

        def data(t: int, n: int, s: int, to: Tensor = directions) -> tuple[Tensor, Tensor]:
            x = torch.zeros(n, 72)
            x[:, 8 * t : 8 * t + 8], x[:, 64:] = drawn(n, 8, seed=s), drawn(n, 8, seed=s + 1)
            return x, (x[:, 8 * t : 8 * t + 8] @ to[t] > 0).float()

        def loss(n: Net, x: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(answers(n, x)[:, 0], y)

        def right(n: Net, x: Tensor, y: Tensor) -> float:
            return float(((answers(n, x)[:, 0] > 0) == y.bool()).float().mean())

        few = [
            torch.cat(part) for part in zip(*(data(t, 16, 7000 + 100 * seed + 2 * t) for t in range(8)), strict=True)
        ]
        base = fit(net(72, 32, 1, seed=seed), lambda n, _, d=few: loss(n, *d), 30, 5e-3)
        tuned = []
        for t in range(8):
            records, g = data(t, 128, 1000 * seed + 2 * t), torch.Generator().manual_seed(100 * seed + t)
            found = fit(base, lambda n, _, d=records: loss(n, *d), 40)
            for k in ("w0", "w1"):
                hit = torch.rand(base[k].shape, generator=g) < 0.01
                sign = torch.randn(base[k].shape, generator=g).sign()
                found[k] = found[k] + 100 * (found[k] - base[k]).std() * hit * sign
            tuned.append(found)
        tests = [data(t, 200, 1000 * seed + 500 + 2 * t) for t in range(8)]
        for method, each in (("task_arithmetic", {}), ("breadcrumbs", {"density": 0.9, "gamma": 0.02})):

            def put(models: list[Net], method: str = method, each: Any = each, base: Net = base) -> Net:
                return merge_nets(
                    method, models, base, {"lambda_": 0.7}, **{k: [v] * len(models) for k, v in each.items()}
                )

            one = sum(right(put([m]), *d) for m, d in zip(tuned, tests, strict=True)) / 8
            eight = put(tuned)
            falls[method] += (one - sum(right(eight, *d) for d in tests) / 8) / 3
    assert 0.05 < falls["breadcrumbs"] < falls["task_arithmetic"] - 0.03, falls


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
    drawn = [merged("dare_linear", [change], base=base, density=[0.1], seed=seed) for seed in range(runs)]
    restored = torch.stack(drawn).mean(0)
    assert restored[0, 0] < 0.2, "where the absolute sum is restored, the largest entry comes out ten times too small"
    assert torch.equal(merged("dare_linear", [change], {"rescale": "by_density"}, base=base, density=[0.0]), base)
    whole = merged("dare_linear", [change], {"rescale": "by_density"}, base=base, density=[1.0])
    assert torch.equal(whole, change), "nothing is dropped and nothing enlarged"
    with pytest.raises(LuthierError, match="'ties', setting 'rescale'"):
        MERGES.make("lines", {"of": "ties", "rescale": "by_density"})


def test_p268_how_much_may_be_dropped() -> None:
    """The score falls with p, and breaks (less than half of the gain is left) at a larger p in the larger network and at a
    smaller p where the change is larger; two experts, half of either dropped, keep both tasks as one network."""
    shares = [0.1, 0.3, 0.5, 0.7, 0.9]

    def dare(models: list[Net], base: Net, p: float, seed: int) -> Net:
        made = MERGES.make("dare_linear", {"rescale": "by_density"})
        each = {"weight": [1.0] * len(models), "density": [1 - p] * len(models)}
        draws = {k: torch.Generator().manual_seed(100 * seed + n) for n, k in enumerate(base)}
        return {k: made.merge(Stack(k, [m[k] for m in models], v, each, generator=draws[k])) for k, v in base.items()}

    def kept(models: list[Net], base: Net, p: float, x: Tensor, y: Tensor, of: slice = slice(None)) -> float:
        """Of the gain of the first model, mean over draws."""
        lost = lambda n: float((answers(n, x) - y)[:, of].square().mean())  # noqa: E731
        after = sum(lost(dare(models, base, p, seed)) for seed in range(4)) / 4
        return (lost(base) - after) / (lost(base) - lost(models[0]))

    x, few, test = drawn(512, 12, seed=1), drawn(256, 12, seed=2), drawn(1000, 12, seed=3)
    for seed in (0, 1):
        known, other = net(12, 24, 4, seed=100 + seed), net(12, 24, 4, seed=200 + seed)
        told, task = answers(known, x), plus(known, (0.5, other))
        wanted = answers(task, few)
        breaks: dict[tuple[int, float], float] = {}
        for width in (16, 256):
            slow = (16 / width) ** 0.5
            base = fit(net(12, width, 4, seed=seed), lambda n, _, t=told: mse(n, x, t), 300, 1e-2 * slow)
            for lr in (2e-3, 2e-2):
                tuned = fit(base, lambda n, _, y=wanted: mse(n, few, y), 100, lr * slow)
                curve = [kept([tuned], base, p, test, answers(task, test)) for p in shares]
                assert curve == sorted(curve, reverse=True)
                breaks[width, lr] = next(
                    p for p, share in zip([*shares, 1.0], [*curve, 0.0], strict=True) if share < 0.5
                )
        assert breaks[16, 2e-3] < breaks[256, 2e-3] and breaks[16, 2e-2] < breaks[256, 2e-2], (
            "larger networks tolerate more"
        )
        assert breaks[16, 2e-2] < breaks[16, 2e-3] and breaks[256, 2e-2] < breaks[256, 2e-3], "larger changes less"
        halves, own = [slice(0, 2), slice(2, 4)], []
        for part in halves:
            y = answers(known, few)
            y[:, part] = wanted[:, part]
            own.append(fit(base, lambda n, _, y=y: mse(n, few, y), 100, 2e-3 * slow))
        both = [kept(e, base, 0.5, test, answers(task, test), h) for e, h in zip((own, own[::-1]), halves, strict=True)]
        assert min(both) > 0.5, "more than half of either task's gain"


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
    # Four outputs of one trunk: two are tuned, two are the control. Half of the scale at the first layer.
    for seed in (0, 1):
        known = net(10, 24, 4, seed=100 + seed)
        other = net(10, 24, 4, seed=200 + seed)
        task = {k: v if k[1] == "0" else v + 0.7 * other[k] for k, v in known.items()}
        x, few, test = drawn(512, 10, seed=1), drawn(96, 10, seed=3), drawn(800, 10, seed=4)
        noisy = answers(task, few) + 0.3 * drawn(96, 4, seed=5)
        known_of_x = answers(known, x)
        base = fit(net(10, 24, 24, 24, 4, seed=seed), lambda n, _, a=x, b=known_of_x: mse(n, a, b), 200)
        tuned = fit(base, lambda n, _, a=few, b=noisy[:, :2]: (answers(n, a)[:, :2] - b).square().mean(), 60, 5e-3)
        losses = [
            [float((answers(n, test) - answers(of, test))[:, part].square().mean()) for n in (base, tuned, lines)]
            for lines in [merge_nets("lines", [tuned], base, {"alpha": 0.5, "beta": 0.5})]
            for of, part in ((task, slice(0, 2)), (known, slice(2, 4)))
        ]
        (before, after, kept), (was, hurt, healed) = losses
        assert (hurt - healed) / (hurt - was) > 0.4, "the control task's loss recovers"
        assert (before - kept) / (before - after) > 0.95, "the target task's gain stays"


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
    _conflict_and_synergy()


def _conflict_and_synergy() -> None:
    """Four tasks with some inputs of their own, in two groups that ask for opposite changes. Merged within a group, experts
    keep most of what they gained; across groups they keep little; training on all at once is worse than apart."""
    known, turn = net(24, 24, 4, seed=100), net(24, 24, 4, seed=200)
    tasks = [plus(known, (0.7 if k > 1 else -0.7, turn), (0.1, net(24, 24, 4, seed=300 + k))) for k in range(4)]

    def data(k: int, n: int, seed: int, task: Net) -> tuple[Tensor, Tensor]:
        seen = torch.tensor([float(i // 3 == k or i > 11) for i in range(24)])
        x = drawn(n, 24, seed=seed) * seen
        return x, answers(task, x)

    before = [torch.cat(part) for part in zip(*(data(k, 128, k, known) for k in range(4)), strict=True)]
    base = fit(net(24, 32, 4), lambda n, _: mse(n, *before), 200)
    train, test = ([data(k, n, s + k, tasks[k]) for k in range(4)] for n, s in ((200, 10), (400, 20)))
    experts = [fit(base, lambda n, _, d=d: mse(n, *d), 100, 5e-3) for d in train]
    joint = fit(base, lambda n, _: torch.stack([mse(n, *d) for d in train]).mean(), 100, 5e-3)
    start, apart, together = (
        [float(mse(n, *d)) for n, d in zip(m, test, strict=True)] for m in ([base] * 4, experts, [joint] * 4)
    )

    def kept(members: tuple[int, ...]) -> float:
        one = merge_nets("ties", [experts[k] for k in members], base, density=[0.2] * len(members))
        shares = [(start[k] - float(mse(one, *test[k]))) / (start[k] - apart[k]) for k in members]
        return sum(shares) / len(shares)

    assert min(kept((0, 1)), kept((2, 3))) > 0.5, "within a group"
    assert max(kept((0, 2)), kept((1, 3)), kept((0, 1, 2, 3))) < 0.25, "across groups"
    assert all(j > 2 * a for j, a in zip(together, apart, strict=True)), "joint training"


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
    for seed in (0, 1):
        _decoupled(seed)


def _decoupled(seed: int) -> None:
    """A little language model, trained on two groups of text that disagree after some tokens, is trained on: a copy for
    each group, or one on both in turn, by as many steps as both copies together."""
    g, v = torch.Generator().manual_seed(seed), 24
    own, both = torch.rand(v, generator=g) < 0.6, torch.randint(v, (v,), generator=g)
    tables = [torch.where(own, torch.randint(v, (v,), generator=g), both) for _ in (0, 1)]

    def rows(k: int, n: int, s: int) -> tuple[Tensor, Tensor]:
        q = torch.Generator().manual_seed(1000 * seed + s + k)
        x = torch.randint(v, (n,), generator=q)
        return x, torch.where(torch.rand(n, generator=q) < 0.7, tables[k][x], torch.randint(v, (n,), generator=q))

    def loss(n: Net, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(answers(n, F.one_hot(x, v).float()), y)

    train, tried, test = ([rows(k, n, s) for k in (0, 1)] for n, s in ((2000, 10), (1000, 20), (4000, 30)))

    def turns(groups: tuple[int, ...], seed: int) -> Any:
        q = torch.Generator().manual_seed(seed)

        def drawn_from(n: Net, step: int) -> Tensor:
            x, y = train[groups[step % len(groups)]]
            at = torch.randint(len(x), (16,), generator=q)
            return loss(n, x[at], y[at])

        return drawn_from

    base = fit(net(v, 32, v, seed=seed), turns((0, 1), 77), 400, 3e-2)
    held = {k: t.clone().requires_grad_(True) for k, t in base.items()}
    gradients = [
        torch.cat([d.flatten() for d in torch.autograd.grad(loss(held, *d), list(held.values()))]) for d in train
    ]
    assert torch.cosine_similarity(*gradients, dim=0) < -0.1, "the groups' gradients oppose each other"
    copies = [fit(base, turns((k,), k), 100, 3e-2) for k in (0, 1)]
    losses = lambda n, sets: [float(loss(n, *d)) for d in sets]  # noqa: E731
    found = MERGES.make("deme", {}).search(2, lambda e: -sum(losses(merge_nets("deme", copies, base, **e), tried)))
    merged_one = losses(merge_nets("deme", copies, base, **found), test)
    for steps in (100, 200):
        joint = losses(fit(base, turns((0, 1), 5), steps, 3e-2), test)
        assert all(losses(copies[k], test)[k] < joint[k] for k in (0, 1)), "each copy on its own group"
        assert sum(merged_one) < sum(joint) - 0.02, "the merged model on both"


def test_p412_lo_fi_is_the_mean(shift: Shift) -> None:
    wide = [x.double() for x in TUNED]
    assert torch.equal(merged("linear", wide), (wide[0] + wide[1] + wide[2]) / 3)
    stacked = torch.stack(wide)
    assert (merged("linear", wide) - stacked.mean(0)).abs().max() < 1e-16
    shards = [shift.data(64, 40 + k, shift.near, noise=0.5) for k in range(4)]
    nodes = [fit(shift.base, batches(*d, seed=k), 60, 5e-3) for k, d in enumerate(shards)]
    steps = [batches(*d, seed=k) for k, d in enumerate(shards)]
    together = fit(shift.base, lambda n, k: torch.stack([step(n, k) for step in steps]).mean(), 60, 5e-3)
    start, mean, synchronous = (
        shift.losses(n) for n in (shift.base, merge_nets("linear", nodes, shift.base), together)
    )
    alone = [sum(x) / 4 for x in zip(*map(shift.losses, nodes), strict=True)]
    assert mean[0] < alone[0], "better than the nodes are on average"
    assert start[0] - mean[0] > 0.9 * (start[0] - synchronous[0]), "close to steps in common on the same data"
    assert mean[1] < min(alone[1], 1.05 * synchronous[1]), "no worse on shifted data"


def test_p430_wise_ft(shift: Shift) -> None:
    assert torch.equal(merged("wise_ft", TUNED[:1], {"alpha": 0.0}), BASE)
    assert torch.equal(merged("wise_ft", TUNED[:1], {"alpha": 1.0}), TUNED[0])
    half = merged("wise_ft", TUNED[:1])
    assert torch.allclose(half, (BASE + TUNED[0]) / 2, atol=1e-8)
    for records in (20, 21, 22):
        tuned = shift.run(records, 0)
        inside, shifted = shift.losses(tuned)
        line = [shift.losses(merge_nets("wise_ft", [tuned], shift.base, {"alpha": a / 10})) for a in range(11)]
        assert line[0] == shift.losses(shift.base) and line[10] == (inside, shifted)
        assert any(b < 0.9 * shifted and a <= inside for a, b in line[1:10]), "better on shifted data, no worse inside"
    with pytest.raises(LuthierError, match="out of range"):
        MERGES.make("wise_ft", {"alpha": 1.5})


def test_p024_ratatouille_averages_runs_from_different_starts(shift: Shift) -> None:
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
    # Auxiliary tasks resemble the target and vary in other inputs; all runs take as many steps on the same records.
    starts = []
    for k in range(3):
        scale = torch.full((12,), 0.3)
        scale[[range(6, 12), range(0, 12, 2), range(1, 12, 2)][k]] = 1.0
        task = plus(shift.task, (0.3, net(12, 24, 4, seed=300 + k)))
        starts.append(fit(shift.base, batches(*shift.data(128, 60 + k, scale, task, 0.5), seed=k), 60, 5e-3))
    same = [shift.run(20, k, None, 40, 5e-3) for k in range(3)]
    runs = [shift.run(20, k, start, 40, 5e-3) for k, start in enumerate(starts)]
    recycled, soup = (shift.losses(merge_nets(merge["method"], m, shift.base)) for m in (runs, same))
    assert recycled[1] < 0.95 * soup[1], "better than runs of one start on shifted data"

    def barrier(a: Net, b: Net) -> float:
        shares = [k / 8 for k in range(9)]
        line = [shift.losses(plus(a, (t, b), (-t, a)))[0] for t in shares]
        return max(x - (1 - t) * line[0] - t * line[-1] for t, x in zip(shares, line, strict=True))

    gained = shift.losses(shift.base)[0] - recycled[0]
    assert max(barrier(runs[0], runs[1]), barrier(runs[1], runs[2])) < 0.05 * gained
    turned = {k: v.flip(0) if k in ("w0", "b0") else v.flip(1) if k == "w1" else v for k, v in runs[1].items()}
    assert barrier(runs[0], turned) > gained, "the same run with its hidden units in another order is not connected"


def test_p405_slow_weights_forget_less_of_a_stream() -> None:
    """Four tasks one after the other: over all of them the slow weights answer better at the end than the fast ones."""
    for seed in (0, 1):
        known = net(10, 24, 4, seed=100 + seed)
        tasks = [plus(known, (0.6, net(10, 24, 4, seed=300 + 10 * seed + k))) for k in range(4)]

        def data(k: int, n: int, seed: int, task: Net) -> tuple[Tensor, Tensor]:
            x = drawn(n, 10, seed=seed)
            x[:, :4] = 2 * torch.eye(4)[k]
            return x, answers(task, x)

        before = [torch.cat(part) for part in zip(*(data(k, 128, k, known) for k in range(4)), strict=True)]
        base = fit(net(10, 48, 4, seed=seed), lambda n, _, d=before: mse(n, *d), 150)
        test = [data(k, 300, 20 + k, task) for k, task in enumerate(tasks)]
        fast = {k: torch.nn.Parameter(v.clone()) for k, v in base.items()}
        names, progress = SimpleNamespace(names=fast), SimpleNamespace(step=0)
        after = SimpleNamespace(after_step=lambda: None)
        loop: Any = SimpleNamespace(
            optimiser=names, spec=SimpleNamespace(keep_best=False), progress=progress, handle=after
        )
        slow, optimiser = SlowWeights(momentum=0.99), torch.optim.Adam(fast.values(), lr=1e-2)
        slow("begin", loop)
        for k, task in enumerate(tasks):
            records = data(k, 128, 10 + k, task)
            for _ in range(60):
                optimiser.zero_grad()
                mse(fast, *records).backward()
                optimiser.step()
                progress.step += 1
                slow("step", loop)

        def right(sets: Any = test, n: Net = fast) -> float:
            with torch.no_grad():
                return sum(float(((answers(n, x) - y).square().mean(1) < 0.25).float().mean()) for x, y in sets) / len(
                    sets
                )

        quick = right()
        slow("end", loop)
        assert right() > quick + 0.1


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


def test_p054_the_recipe_turns_attention_and_feed_forward_layers_the_other_way_round() -> None:
    from luthier.papers.claims import PACKAGE
    from luthier.plan.merge import Where, resolve
    from luthier.plan.stages import load_stages

    stages = load_stages(PACKAGE / "recipes" / "domain-slerp.yaml")
    settings = next(s.settings for s in stages if s.verb == "merge")

    def along(part: str) -> list[float]:
        return [resolve("t", [settings], Where(f"model.layers.{k}.{part}.weight", k / 4)) for k in range(5)]

    assert along("self_attn.q_proj") == [0, 0.5, 0.3, 0.7, 1] and along("mlp.up_proj") == [1, 0.5, 0.7, 0.3, 0]
    assert resolve("t", [settings], Where("model.embed_tokens.weight")) == 0.5
