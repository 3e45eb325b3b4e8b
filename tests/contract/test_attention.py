"""Attention block by block: the library's numbers and gradients, and everything that is not its case left to the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.parts import attention
from luthier.training.fast import slow_down, speed_up
from tests.contract.conformance import shove
from tests.tiny import tiny, tiny_ids

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}


def drawn(length: int, *, heads: int = 6, kv: int = 2, width: int = 8, out: int = 8, batch: int = 2) -> list[Tensor]:
    """q, k, v as a model hands them on: positions before heads in memory."""
    g = torch.Generator().manual_seed(length)
    shapes = [(batch, length, heads, width), (batch, length, kv, width), (batch, length, kv, out)]
    return [torch.randn(s, generator=g).transpose(1, 2) for s in shapes]


def pulled(function: Any, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The function's output [B, T, H, D], then the gradients of q, k, v under one that is no constant."""
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in given)
    out = function(q, k, v)
    out.backward(torch.sin(torch.arange(out.numel()).view(out.shape)).to(dtype))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.causal_attention(q, k, v, 0.3)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "length", [2, attention.BLOCK - 1, attention.BLOCK, attention.BLOCK + 1, 3 * attention.BLOCK + 7]
)
def test_the_same_numbers_and_gradients(length: int, dtype: torch.dtype) -> None:
    wanted = pulled(library, drawn(length), torch.float32)
    for found, truth in zip(pulled(ours, drawn(length), dtype), wanted, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        assert float((found.float() - truth).norm()) <= CLOSE[dtype] * float(truth.norm())


@pytest.mark.parametrize(("heads", "kv", "out"), [(4, 4, 8), (4, 1, 8), (6, 3, 5)])
def test_heads_that_share_keys_and_values_of_another_width(heads: int, kv: int, out: int) -> None:
    given = drawn(70, heads=heads, kv=kv, out=out)
    for found, truth in zip(pulled(ours, given, torch.float32), pulled(library, given, torch.float32), strict=True):
        assert torch.allclose(found, truth, atol=1e-5)


def test_no_position_sees_a_later_one() -> None:
    q, k, v = drawn(150)
    before = ours(q, k, v)
    k[:, :, 100:], v[:, :, 100:] = 1e4, 1e4
    assert torch.equal(before[:, :100], ours(q, k, v)[:, :100]) and not torch.equal(before, ours(q, k, v))


def test_under_autocast() -> None:
    """In autocast's type, as the library's; gradients have the inputs' own."""
    found = []
    for function in (ours, library):
        q, k, v = (x.requires_grad_() for x in drawn(70))
        with torch.autocast("cpu", torch.bfloat16):
            out = function(q, k, v)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append([x.grad for x in (q, k, v)])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm()) <= CLOSE[torch.bfloat16] * float(theirs.norm())


def test_gradients_of_gradients_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(5))
    (grad,) = torch.autograd.grad(ours(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("length", "more", "taken"),
    [
        (8, {}, True),
        (8, {"scaling": 0.2, "dropout": 0.0, "sliding_window": None}, True),
        (attention.LONGEST, {}, True),
        (attention.LONGEST + 1, {}, False),
        (1, {}, False),
        (8, {"is_causal": False}, False),
        (8, {"dropout": 0.5}, False),
        (8, {"mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, False),
        (8, {"keys": 12}, False),
        (8, {"position_bias": torch.zeros(1, 1, 8, 8)}, False),
        (8, {"dtype": torch.float64}, False),
    ],
)
def test_what_is_taken(length: int, more: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but its own case gets what the library's function gives, asked in the same words."""
    calls: list[int] = []
    own = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *given: (calls.append(1), own(*given))[1])
    dtype, keys, mask = more.pop("dtype", torch.float32), more.pop("keys", length), more.pop("mask", None)
    q, (_, k, v) = drawn(length)[0].to(dtype), (x.to(dtype) for x in drawn(keys))
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # pyright: ignore
    found = []
    for name in ("sdpa", attention.blocked()):
        torch.manual_seed(0)
        found.append(ALL_ATTENTION_FUNCTIONS[name](module, q, k, v, mask, **more)[0])
    assert bool(calls) is taken and torch.allclose(found[0], found[1], atol=1e-6)


def answers(model: torch.nn.Module) -> Tensor:
    return model(input_ids=tiny_ids(2, 150)).logits.detach()


@pytest.mark.parametrize("first", ["prefix", "speed"])
def test_with_extra_keys(first: str) -> None:
    """A deep prefix beside it, whichever came first, gives the numbers of the prefix alone; taken back, the base's."""
    plain = tiny("llama", max_position_embeddings=256)
    base, name = answers(plain), plain.config._attn_implementation
    found = []
    for order in (("prefix",), ("prefix", "speed") if first == "prefix" else ("speed", "prefix")):
        model = tiny("llama", max_position_embeddings=256)
        handle = attached(model)
        for step in order:
            if step == "speed":
                speed_up(model)
            else:
                form = FORMS.make("prefix", {"length": 3})
                handle.add(handle.build("prefix", form, sites_for(Roles(model), form, None), seed=1))
                shove(handle, "prefix")
        found.append(answers(model))
    assert torch.allclose(found[0], found[1], atol=1e-5) and not torch.allclose(found[0], base, atol=1e-3)
    slow_down(model)
    handle.detach()
    assert model.config._attn_implementation == name and torch.equal(answers(model), base)
