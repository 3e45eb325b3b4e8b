"""Every merge that mergekit has gives mergekit 0.1.5's numbers. The reference is made by tools/mergekit_reference.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.merging.arcee_fusion import importance
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
    apart[on_the_edge(name)] = 0
    worst = float(apart.max())
    assert worst <= 1e-5, worst


def on_the_edge(name: str) -> Tensor | list[int]:
    """Entries of which rounding decides whether they move: of Arcee fusion in 32 bits those whose importance is within two
    hundredths of the limit, as the divergence of two rows that are nearly equal keeps two digits. They are very few."""
    case = CASES[name]
    if case.method != "arcee_fusion" or case.dtype != torch.float32:
        return []
    base, models = inputs(case)
    assert base is not None
    seen = importance(models[0], base)
    low, middle, high = torch.sort(seen.flatten()).values[(torch.tensor([0.25, 0.5, 0.75]) * (seen.numel() - 1)).long()]
    near = (seen / (middle + 1.5 * (high - low)) - 1).abs() < 0.02
    assert near.float().mean() < 0.02
    return near


def test_in_bfloat16_it_is_bit_for_bit(reference: Mapping[str, Tensor]) -> None:
    names = [n for n in CASES if n.endswith("bf16") and not ties_differ(n, reference)]
    assert [n for n in names if not torch.equal(ours(n), reference[n])] == [] and len(names) > 25
