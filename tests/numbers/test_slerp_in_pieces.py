"""SLERP of tensors larger than a piece: the plain formula in float32, piece by piece, bit for bit in every type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.algebra.driver import Crew
from luthier.delta import Stack
from luthier.merging import slerp
from luthier.merging.slerp import Slerp

PIECE = 1000
SHAPES = [(70, 301), (4, 50, 33), (1000,), (1001,), (7,)]


def plain(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The norm of the pieces' norms, the sum of the pieces' sums of products of normalised numbers, then the arc."""
    x, y = a.float().flatten(), b.float().flatten()
    pieces = [slice(i, min(i + PIECE, len(x))) for i in range(0, len(x), PIECE)]
    norms = [torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v[p]) for p in pieces])) for v in (x, y)]
    u, v = (n if n > 1e-8 else torch.ones(()) for n in norms)
    cosine = torch.stack([((x[p] / u) * (y[p] / v)).sum() for p in pieces]).sum().clamp(-1, 1)
    share = torch.tensor(t)
    if cosine.abs() > 0.9995:
        mixed = (1 - share) * x + share * y
    else:
        angle = torch.acos(cosine)
        mixed = torch.sin((1 - share) * angle) / angle.sin() * x + torch.sin(share * angle) / angle.sin() * y
    return mixed.to(a.dtype).view(a.shape)


def pair(shape: tuple[int, ...], noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(len(shape) + shape[0])
    a = 0.02 * torch.randn(shape, generator=g)
    return a.to(dtype), (a + noise * torch.randn(shape, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("noise", [0.0001, 0.002, 0.02])
def test_pieces_are_summed_as_stated(dtype: torch.dtype, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slerp, "PIECE", PIECE)
    monkeypatch.setattr(slerp, "SPAN", 512)
    crew = Crew(3)
    try:
        for shape in SHAPES:
            a, b = pair(shape, noise, dtype)
            for t in (0.0, 0.4, 1.0):
                stack = Stack("w", [b], a)
                out = Slerp(t=t).merge(stack)
                assert torch.equal(out, plain(a, b, t))
                assert stack.notes == {"interpolated linearly": float(noise == 0.0001)}
                assert torch.equal(Slerp(t=t).merge(Stack("w", [b], a, over=crew.over)), out)
    finally:
        crew.close()


def test_nothing_on_either_side_is_a_right_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slerp, "PIECE", PIECE)
    a, _ = pair((70, 301), 0, torch.bfloat16)
    out = Slerp(t=0.5).merge(Stack("w", [torch.zeros_like(a)], a))
    assert torch.allclose(out.float(), a.float() * 0.5**0.5, rtol=2**-8)


def test_the_angle_is_near_that_of_exact_sums() -> None:
    a, b = pair((2048, 1030), 0.002, torch.bfloat16)
    assert a.numel() > 2 * slerp.PIECE
    exact = torch.dot(a.double().flatten(), b.double().flatten()) / a.double().norm() / b.double().norm()
    assert abs(float(Slerp().cosine(a.flatten(), b.flatten())) - float(exact)) < 2e-4
