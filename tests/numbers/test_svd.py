"""Partial singular value decompositions against full ones, and trimmed products against the best of their rank."""

from __future__ import annotations

import pytest
import torch

from luthier.parts.svd import enough, svd_to, trimmed, truncated_svd


def matrix(spectrum: torch.Tensor, d_out: int = 320, d_in: int = 480, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with these singular values."""
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(d_out, len(spectrum), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(d_in, len(spectrum), generator=g, dtype=torch.float64))
    return ((u * spectrum.double()) @ v.t()).float()


N = torch.arange(1, 321).float()
SPECTRA = {"steep": 0.9**N, "slow": N**-0.5, "flat": 1 + 0.1 * (321 - N) / 320}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_no_worse_than_the_best_of_its_rank(name: str, rank: int) -> None:
    m = matrix(SPECTRA[name])
    u, s, vh = truncated_svd(m, rank)
    full = torch.linalg.svdvals(m)
    best, got = float(full[rank:].square().sum()), float((m - (u * s) @ vh).square().sum())
    assert got <= best * 1.003 + 1e-9
    assert u.shape == (320, rank) and s.shape == (rank,) and vh.shape == (rank, 480)
    assert torch.allclose(u.t() @ u, torch.eye(rank), atol=1e-4)
    if name != "flat":
        assert torch.allclose(s, full[:rank], rtol=3e-3)


def test_wide_and_low_wants() -> None:
    m = matrix(0.9**N)
    assert torch.allclose(truncated_svd(m, 320)[1], torch.linalg.svdvals(m), atol=1e-5)
    low = torch.randn(300, 3) @ torch.randn(3, 400)
    u, s, vh = truncated_svd(low, 8)
    assert torch.allclose((u * s) @ vh, low, atol=1e-3 * float(low.abs().max()))
    assert float(s[3:].max()) < 1e-4 * float(s[0])
    u, s, vh = truncated_svd(torch.zeros(200, 300), 4)
    assert not s.any() and torch.isfinite(u).all() and torch.isfinite(vh).all()


def test_the_same_matrix_gives_the_same_factors() -> None:
    m = matrix(N**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(truncated_svd(m, 8), truncated_svd(m, 8), strict=True))


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_is_met_by_the_fewest_directions(energy: float) -> None:
    m = matrix(0.95**N)
    full = torch.linalg.svdvals(m).square()
    u, s, vh = svd_to(m, energy=energy)
    kept = 1 - float((m - (u * s) @ vh).square().sum() / full.sum())
    assert kept >= energy - 1e-4
    assert abs(len(s) - (int((full.cumsum(0) < energy * full.sum()).sum()) + 1)) <= 1


def test_ratio_and_bounds() -> None:
    m = matrix(0.5**N)
    assert len(svd_to(m, ratio=0.1)[1]) == 4  # 1, 0.5, 0.25, 0.125 of the largest
    assert len(svd_to(m, ratio=0.1, rank=2)[1]) == 2
    assert len(svd_to(m, rank=5)[1]) == 5
    assert enough(torch.tensor([0.0, 0.0]), 0.9, None) == 1


def test_trimming_a_product_is_trimming_its_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(12, 60, generator=g), torch.randn(50, 12, generator=g)
    whole = b @ a
    same_a, same_b = trimmed(a, b)
    assert torch.allclose(same_b @ same_a, whole, atol=1e-4)
    new_a, new_b = trimmed(a, b, rank=5)
    assert new_a.shape == (5, 60) and new_b.shape == (50, 5)
    best = torch.linalg.svdvals(whole)[5:].square().sum()
    assert torch.isclose((whole - new_b @ new_a).square().sum(), best, rtol=1e-4)
    stack_a, stack_b = torch.stack([a, 2 * a]), torch.stack([b, b])
    ta, tb = trimmed(stack_a, stack_b, rank=5)
    assert torch.allclose(tb @ ta, torch.stack([new_b @ new_a, 2 * new_b @ new_a]), atol=1e-3)
