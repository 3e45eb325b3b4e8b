"""Log-probabilities whose backward pass writes over the logits: the same gradients as plain cross-entropy, whatever made them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from luthier.parts.logprobs import _fresh, token_logprobs
from luthier.training.view import HeadSelector, View
from tests.tiny import tiny, tiny_ids

HEADS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "plain": (lambda z: z, True),
    "view of a view": (lambda z: z.view(1, *z.shape).squeeze(0), True),
    "tanh": (torch.tanh, False),
    "soft cap": (lambda z: torch.tanh(z / 3) * 3, False),
    "exp in place": (lambda z: z.mul(0.1).exp_(), False),
    "softmax": (lambda z: torch.softmax(z, -1), False),
    "sigmoid": (torch.sigmoid, False),
}
"""What comes after the matrix product, and whether the logits' memory may then be reused."""
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", CLOSE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_cross_entropys(head: str, bias: bool, dtype: torch.dtype) -> None:
    after, reused = HEADS[head]
    torch.manual_seed(0)
    layer = nn.Linear(16, 300, bias=bias).to(dtype)
    x, targets = torch.randn(1, 270, 16).to(dtype), torch.randint(300, (270,))
    results = []
    for plain in (True, False):
        layer.zero_grad()
        h = x.clone().requires_grad_()
        logits = after(layer(h)).view(-1, 300)
        if not plain:
            assert _fresh(logits.grad_fn) is reused
        chosen = -cross_entropy(logits.float(), targets, reduction="none") if plain else token_logprobs(logits, targets)
        chosen.sum().backward()
        results.append([chosen.detach(), h.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        assert float((a.float() - b.float()).norm() / a.float().norm()) < CLOSE[dtype]


def test_a_kept_tensor_is_whole() -> None:
    layer = nn.Linear(4, 9)
    for keep in (True, False):
        logits = layer(torch.randn(5, 4))
        before = logits.detach().clone()
        token_logprobs(logits, torch.arange(5), keep=keep).sum().backward()
        assert torch.equal(logits.detach(), before) is keep


def test_backward_twice() -> None:
    layer = nn.Linear(4, 9)
    total = token_logprobs(layer(torch.randn(5, 4)), torch.arange(5), keep=True).sum()
    total.backward(retain_graph=True)
    once = layer.weight.grad.clone()  # pyright: ignore
    total.backward()
    assert torch.allclose(layer.weight.grad, 2 * once)  # pyright: ignore


def test_a_runs_own_logits_are_written_over() -> None:
    """As a run sees them, through the selector: their memory becomes the gradient's."""
    model, ids = tiny("llama").requires_grad_(True), tiny_ids(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": (ids % 3 > 0).float()}
    view = View(model, batch, HeadSelector(model.get_output_embeddings()))  # pyright: ignore
    assert _fresh(view.logits.grad_fn)
    before = view.logits.detach().clone()
    view.logprobs.sum().backward()
    assert not torch.equal(view.logits.detach(), before)


@pytest.mark.parametrize("dtype", CLOSE, ids=["fp32", "bf16"])
def test_a_model_with_a_soft_cap(dtype: torch.dtype) -> None:
    """Gemma 2 as a run sees it: the selector, the head, the cap, then the loss."""
    ids = tiny_ids(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": (ids % 3 > 0).float()}
    grads = []
    for plain in (True, False):
        model = tiny("gemma2", final_logit_softcapping=0.05).to(dtype).train()
        view = View(model, batch, HeadSelector(model.get_output_embeddings()))
        if plain:
            loss = cross_entropy(view.logits.float(), view.targets, reduction="sum")
        else:
            loss = -view.logprobs.sum()
        loss.backward()
        grads.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < CLOSE[dtype]
