"""Every merge that mergekit has gives mergekit 0.1.5's numbers. The reference is made by tools/mergekit_reference.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.merging.arcee_fusion import importance, limit
from tests.numbers.merge_cases import CASES, ROWS, inputs, tied

FILE = Path(__file__).parent / "mergekit.safetensors"


@pytest.fixture(scope="module")
def reference() -> Mapping[str, Tensor]:
    with safe_open(FILE, "pt") as f:
        assert f.metadata()["mergekit"] == "0.1.5"
        return {k: f.get_tensor(k) for k in f.keys()}


def ties_differ(name: str, reference: Mapping[str, Tensor]) -> bool:
    """Whether equal numbers fall in or out by a sort that orders them differently on this processor."""
    by_size = CASES[name].method.startswith(("ties", "breadcrumbs", "della", "sce")) and not name.endswith("fp32")
    return by_size and not torch.equal(torch.argsort(tied(), descending=True).to(torch.int16), reference["argsort"])


def ours(name: str) -> Tensor:
    case = CASES[name]
    base, models = inputs(case)
    merge = MERGES.make(case.method, dict(case.settings))
    each = {k: list(case.each.get(k, [v] * case.models)) for k, v in type(merge).each.items()}
    generator = torch.Generator().manual_seed(0)
    out = merge.merge(Stack("w", models, None if case.baseless else base, each, generator=generator))
    assert type(merge).widens or out.dtype == case.dtype
    return out


def test_every_case_is_there(reference: Mapping[str, Tensor]) -> None:
    assert set(reference) == set(CASES) | {"argsort"} and len(CASES) > 200
    assert set(ROWS) <= set(MERGES) and len(ROWS) == 20


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, reference: Mapping[str, Tensor]) -> None:
    """Within 1e-5 everywhere, which in 16 bits means bit for bit but where a value lies on the edge of rounding."""
    if ties_differ(name, reference):
        pytest.skip("this processor's sort orders equal numbers differently from that of the reference")
    wanted, got = reference[name], ours(name)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    apart = (got.double() - wanted.double()).abs()
    if CASES[name].method == "arcee_fusion" and name.endswith("fp32"):
        apart = edges_aside(name, apart, got)
    worst = float(apart.max())
    assert worst <= 1e-5, worst


def edges_aside(name: str, apart: Tensor, got: Tensor) -> Tensor:
    """Differences but for entries of which rounding decides whether they move: the divergence of two rows that are nearly
    equal keeps two digits in 32 bits, and theirs lies within two hundredths of the limit. They are one in fifty at most, and
    have the value of one model or the other."""
    base, (model,) = inputs(CASES[name])
    assert base is not None
    seen = importance(model, base)
    near = (seen / limit(seen) - 1).abs() < 0.02
    assert near.float().mean() < 0.02
    assert bool(((got == base) | ((got - model).abs() < 1e-7))[near].all())
    return apart.masked_fill(near, 0)


@pytest.mark.parametrize("seed", range(4))
def test_norms_round_as_torchs_own_in_float16(seed: int) -> None:
    """multislerp's formula written plainly, on tensors of which the norms lie near the edge of rounding."""
    g = torch.Generator().manual_seed(seed)
    base = (torch.randn(200, 300, generator=g) * 0.5).half()
    models = [base + (torch.randn(200, 300, generator=g) * 0.05).half() for _ in range(3)]
    weights = torch.tensor([0.3, 0.9, 0.4], dtype=torch.float16)
    w, d = weights / weights.sum(), (torch.stack(models) - base).view(3, -1)
    norms = torch.norm(d, dim=-1, keepdim=True)
    units = d / (norms + 1e-8)
    mean = (units * w[:, None]).sum(0)
    mean = mean / torch.norm(mean)
    aside = ((units - (units * mean).sum(-1, keepdim=True) * mean) * w[:, None]).sum(0)
    angle = torch.norm(aside) + 1e-8
    out = (mean * angle.cos() + aside * (angle.sin() / angle)) * (norms[:, 0] * w).sum()
    got = MERGES.make("multislerp", {}).merge(Stack("w", models, base, {"weight": [0.3, 0.9, 0.4]}))
    assert torch.equal(got, out.view(base.shape) + base)


def test_in_bfloat16_it_is_bit_for_bit(reference: Mapping[str, Tensor]) -> None:
    names = [n for n in CASES if n.endswith("bf16") and not ties_differ(n, reference)]
    assert [n for n in names if not torch.equal(ours(n), reference[n])] == [] and len(names) > 25
