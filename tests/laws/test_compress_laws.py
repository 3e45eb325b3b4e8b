"""Laws of compressions: what a packed change is off by is what its rounding allows, and codes come back exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.attach import attached
from luthier.attach.sites import sites_of
from luthier.attach.weights import module_at
from luthier.bases.roles import Roles
from luthier.delta import COMPRESSIONS, Change, Site, Small, State
from luthier.delta.artefact import Delta, Piece
from luthier.errors import LuthierError
from luthier.parts.packing import (
    entropy,
    pack_bits,
    pack_codes,
    pack_sixths,
    rice_decode,
    rice_encode,
    unpack_bits,
    unpack_codes,
    unpack_signs,
    unpack_sixths,
)
from luthier.parts.rounding import best_step, from_codes, hessian, surgeon, to_codes
from tests.contract.conformance import quiet
from tests.tiny import tiny, tiny_ids

CHANGES = [name for name in COMPRESSIONS if not COMPRESSIONS[name].alone]
"""Compressions of a change, not of a base."""
QUICK = settings(max_examples=25, deadline=None)
SIZES = st.tuples(st.integers(1, 40), st.integers(2, 70), st.integers(0, 99))


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 1e-3


def small(name: str, change: Tensor, inputs: Tensor | None = None, **more: Any) -> tuple[Small, Tensor]:
    """A matrix compressed, and what it stands for."""
    site = Site("w", "ffn.up", 0, "linear", change.shape[1], change.shape[0])
    made = COMPRESSIONS.make(name, more).compress(Change(site, torch.zeros_like(change), change, inputs))
    state = State(site, made.p, made.fixed, lambda: torch.zeros_like(change))
    return made, made.form.delta(state)["weight"]  # pyright: ignore[reportIndexIssue]


@given(SIZES, st.integers(1, 8))
@QUICK
def test_bits_codes_and_sixths_come_back(size: tuple[int, int, int], bits: int) -> None:
    rows, columns, seed = size
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), columns).long(), codes)
    assert pack_codes(codes, bits).numel() == bits * rows * -(-columns // 8)
    ones = codes % 2
    assert torch.equal(unpack_bits(pack_bits(ones), columns).long(), ones)
    assert torch.equal(unpack_signs(pack_bits(ones), columns).long(), 2 * ones - 1)
    sixths = torch.randint(0, 6, (rows, columns), generator=g)
    assert torch.equal(unpack_sixths(pack_sixths(sixths), columns), sixths)


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(0, 99))
@QUICK
def test_golomb_codes_come_back(total: int, share: float, seed: int) -> None:
    positions = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: int(total * share)].sort().values
    unary, low = rice_encode(positions, total)
    assert torch.equal(rice_decode(unary, low, len(positions), total), positions)


@pytest.mark.parametrize("density", [0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_golomb_codes_are_near_the_entropy(density: float) -> None:
    total = 400_000
    taken = torch.rand(total, generator=torch.Generator().manual_seed(1)) < density
    positions = taken.nonzero()[:, 0]
    unary, low = rice_encode(positions, total)
    bits = 8 * (len(unary) + len(low)) / total
    assert entropy(density) * 0.97 < bits < entropy(density) * 1.045


@given(SIZES)
@QUICK
def test_one_bit_scale_is_the_least_squared_error(size: tuple[int, int, int]) -> None:
    change = drawn(*size)
    made, back = small("bitdelta", change)
    alpha = float(made.p["scale"])
    sign = torch.where(change >= 0, 1.0, -1.0)
    assert torch.equal(back, sign * made.p["scale"])
    best = float((change * sign).sum() / sign.square().sum())
    assert abs(alpha - best) <= 1e-5 * best
    error = (change - back).norm()
    assert all(error <= (change - sign * alpha * f).norm() * (1 + 1e-6) for f in (0.5, 0.97, 1.03, 2.0))
    bound = change.norm() ** 2 - change.numel() * alpha**2  # ‖Δ‖² − n α², exactly
    assert float(error**2) == pytest.approx(float(bound), rel=1e-3, abs=1e-12)


@given(SIZES, st.sampled_from([0.05, 0.3, 1.0]))
@QUICK
def test_ternary_keeps_the_largest(size: tuple[int, int, int], density: float) -> None:
    change = drawn(*size)
    made, back = small("compeft", change, density=density)
    kept = back != 0
    assert int(kept.sum()) == max(1, round(change.numel() * density))
    assert bool((back[kept].sign() == change[kept].sign()).all())
    if bool((~kept).any()):
        assert change[kept].abs().min() >= change[~kept].abs().max()
    assert torch.allclose(back[kept].abs(), change.std().expand(int(kept.sum())))


@given(SIZES, st.integers(1, 9))
@QUICK
def test_ternary_keeps_no_entry_that_is_zero(size: tuple[int, int, int], few: int) -> None:
    change = drawn(*size).flatten()
    change[few:] = 0
    change = change.view(size[0], size[1])
    made, back = small("compeft", change, density=1.0)
    assert torch.equal(back != 0, change != 0) and len(made.fixed["index"]) == int(change.count_nonzero())


@given(SIZES, st.integers(1, 8), st.sampled_from([8, 32, 128]))
@QUICK
def test_two_of_four_within_half_a_step(size: tuple[int, int, int], bits: int, group: int) -> None:
    """Without inputs nothing is made good: kept entries are off by half their step at most, or beyond the largest code."""
    change = drawn(*size)
    made, back = small("deltazip", change, bits=bits, group=group)
    rows, columns = change.shape
    wide = torch.nn.functional.pad(back != 0, (0, -columns % 4)).unflatten(1, (-1, 4))
    assert int(wide.sum(2).max()) <= 2
    step = (made.fixed["steps"].float() * made.p["scale"]).repeat_interleave(group, 1)[:, :columns]
    kept = back != 0
    top = step * (2**bits - 1) / 2
    allowed = torch.where(change.abs() > top, change.abs() - top, step / 2) * 1.001 + 1e-9
    assert bool(((change - back).abs() <= allowed)[kept].all())
    assert float((change - back).norm()) <= float(change.norm()) * 1.2


@given(SIZES, st.sampled_from([0.5, 1.0, 2.0]))
@QUICK
def test_mixed_bits_keep_their_budget(size: tuple[int, int, int], budget: float) -> None:
    change = drawn(*size)
    made, back = small("delta-come", change, budget=budget)
    taken = 8 * sum(t.numel() * t.element_size() for t in made.fixed.values())
    one = 8 * (2 * 8 + size[0] + size[1]) + 32  # the strongest direction is always kept
    assert taken <= max(budget * change.numel(), one)
    assert torch.isfinite(back).all()


def test_more_bits_never_hurt() -> None:
    change = drawn(48, 64, 3) + 0.02 * torch.randn(48, 1) @ torch.randn(1, 64)
    for name, key, values in (
        ("deltazip", "bits", [1, 2, 3, 4, 6]),
        ("delta-come", "budget", [0.5, 1, 2, 4]),
        ("svd", "rank", [1, 4, 16, 48]),
    ):
        errors = [float((change - small(name, change, None, **{key: v})[1]).norm()) for v in values]
        assert errors == sorted(errors, reverse=True), (name, errors)


def test_svd_of_full_rank_is_the_change() -> None:
    change = drawn(24, 40, 0)
    assert torch.allclose(small("svd", change, rank=24)[1], change, atol=1e-8)
    kept = 0.9
    made, back = small("svd", change, energy=kept)
    assert 1 - float((change - back).norm() ** 2 / change.norm() ** 2) >= kept - 1e-5
    s = torch.linalg.svdvals(change).square()
    assert len(made.p["A"]) == int((s.cumsum(0) < kept * s.sum()).sum()) + 1


@given(st.integers(4, 40), st.integers(4, 30), st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_surgery_is_no_worse_on_its_inputs(columns: int, rows: int, seed: int) -> None:
    """With a Hessian of the unit matrix it is plain rounding; with correlated inputs the output's error is smaller on the
    whole than plain rounding's."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    step = best_step(w, 3)
    plain = from_codes(to_codes(w, step, 3), step, 3)

    def column(j: int, now: Tensor, d: Tensor) -> Tensor:
        return from_codes(to_codes(now[:, j : j + 1], step, 3), step, 3)[:, 0]

    assert torch.allclose(surgeon(w, torch.eye(columns), column, block=7), plain)
    assert torch.equal(surgeon(w, torch.ones(columns), column), plain)


def test_surgery_helps_on_correlated_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=g) @ torch.randn(8, 64, generator=g) + 0.1 * torch.randn(400, 64, generator=g)
    w = torch.randn(32, 64, generator=g)
    step = best_step(w, 2)

    def column(j: int, now: Tensor, d: Tensor) -> Tensor:
        return from_codes(to_codes(now[:, j : j + 1], step, 2), step, 2)[:, 0]

    plain = from_codes(to_codes(w, step, 2), step, 2)
    better = surgeon(w, hessian(x, 64), column)
    assert ((w - better) @ x.t()).norm() < 0.7 * ((w - plain) @ x.t()).norm()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_no_inputs_to_round_by(broken: float) -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    x[3, 2] = broken
    with pytest.raises(LuthierError, match="not finite"):
        hessian(x, 4)
    assert torch.equal(hessian(torch.zeros(9, 4), 4), torch.ones(4))


def packed_delta(name: str, seed: int, by: float = 0.05) -> Delta:
    """A compressed random change of the tiny Llama's matrices."""
    model = tiny()
    method = COMPRESSIONS.make(name, {})
    pieces: list[Piece] = []
    for n, site in enumerate(sites_of(Roles(model), "linear")):
        change = drawn(site.d_out, site.d_in, 100 * seed + n) * 1e3 * by
        made = method.compress(Change(site, module_at(model, site.name).weight.detach(), change))  # pyright: ignore
        at = next((p for p in pieces if p.form == made.form), None)
        if at is None:
            pieces.append(at := Piece(f"{name}{seed}-{len(pieces)}", made.form, {}, {}, {}))
        at.sites[site.name], at.p[site.name], at.fixed[site.name] = site, made.p, made.fixed
    return Delta(pieces)


@pytest.mark.parametrize("name", CHANGES)
def test_a_mixed_batch_is_each_tenant_alone(name: str) -> None:
    """Many deltas over one base: a row of the batch gives what its own model, folded, gives; base rows give the base."""
    tenants = {k: packed_delta(name, k) for k in (1, 2)}
    ids = tiny_ids(5, 9)
    owner = [1, 2, 0, 2, 1]
    folded = {0: quiet(tiny(), ids)}
    for k, delta in tenants.items():
        model = tiny()
        delta.apply(model).fold()
        folded[k] = quiet(model, ids)
        assert not torch.allclose(folded[k], folded[0], atol=1e-3)
    model = tiny()
    handle = (tenants[1] + tenants[2]).apply(model)
    rows = {p.name: [i for i, o in enumerate(owner) if o == k] for k, d in tenants.items() for p in d.pieces}
    with handle.routed(rows):
        mixed = quiet(model, ids)
    for i, k in enumerate(owner):
        assert torch.allclose(mixed[i], folded[k][i], atol=2e-5, rtol=1e-4)
    assert not handle.rows and handle is attached(model)


@pytest.mark.parametrize("name", CHANGES)
def test_two_compressed_deltas_add_and_average(name: str) -> None:
    """Packed changes keep the algebra of deltas: half of each is the mean of the dense changes."""
    a, b = packed_delta(name, 1), packed_delta(name, 2)
    model = tiny()
    both = 0.5 * a + 0.5 * b
    both.apply(model)
    wanted = tiny()
    mean: dict[str, Tensor] = {}
    for delta in (a, b):
        for key, value in delta.tensors():
            mean[key] = mean.get(key, 0) + 0.5 * value
    with torch.no_grad():
        for key, value in mean.items():
            wanted.get_parameter(key).add_(value)
    assert torch.allclose(quiet(model), quiet(wanted), atol=2e-5, rtol=1e-4)


def test_few_positions_take_the_lookup_and_agree() -> None:
    made, back = small("bitdelta", drawn(37, 53, 0))
    site = Site("w", "ffn.up", 0, "linear", 53, 37)
    state = State(site, made.p, made.fixed, lambda: back)
    for n in (1, 3, 8, 9, 40):
        x = torch.randn(n, 53)
        assert torch.allclose(made.form.change(x, x, state), x @ back.t(), atol=1e-5)  # pyright: ignore
    x = torch.randn(2, 3, 53, dtype=torch.bfloat16)
    got = made.form.change(x, x, state)
    assert got is not None and got.dtype == torch.bfloat16 and got.shape == (2, 3, 37)
