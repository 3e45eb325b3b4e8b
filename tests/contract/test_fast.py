"""Fused blocks and the pruned last layer, on every decoder: the loss and all gradients of the model as it was written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.training.fast import Pruner, slow_down, speed_up
from luthier.training.feed import in_blocks
from luthier.training.view import HeadSelector, View
from tests.contract.conformance import shove
from tests.tiny import FAMILIES, NATURAL, tiny, tiny_ids

CAUSAL = [name for name in FAMILIES if NATURAL.get(name, "causal") == "causal"]
FUSED = {
    **dict.fromkeys(["llama", "mistral", "qwen2"], (5, 2)),
    "qwen3": (9, 2),
    "phi3": (5, 0),
    **dict.fromkeys(["mixtral"], (5, 0)),
    "qwen2_moe": (5, 2),
    "qwen3_moe": (9, 0),
}
"""Family -> norms and feed-forwards that are fused; none elsewhere, where the formulas are others."""
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}
"""Families whose last layer is left whole."""
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


def batch() -> dict[str, Any]:
    """Two rows of unequal length, padded on the right, with loss on some tokens of each, the last one among them. Of the tiny
    experts' routers none stands so near a tie that the rounding of bfloat16 decides."""
    ids = tiny_ids(2, 11, seed=1)
    weights = torch.zeros(2, 11)
    weights[0, 6:] = 1.0
    weights[1, 3:7] = 0.5
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "weights": weights}


def learnt(model: nn.Module, selector: HeadSelector | None, given: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch, dropout at rest."""
    model.zero_grad()
    view = View(model, given or batch(), selector)
    loss = -(view.logprobs * view.weights).sum()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> None:
    assert list(found) == list(wanted) and wanted
    whole = torch.cat([g.float().flatten() for g in wanted.values()]).norm()
    for name, grad in wanted.items():
        gap = float((found[name].float() - grad.float()).norm())
        assert gap <= share * max(float(grad.float().norm()), 1e-2 * float(whole)), name


def everything(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(True)


def lora(model: nn.Module) -> None:
    handle, form = attached(model), FORMS.make("lora", {"rank": 3})
    handle.add(handle.build("lora", form, sites_for(Roles(model), form, None), seed=1), train=True)
    shove(handle, "lora")


@pytest.mark.parametrize(
    ("moving", "dtype"),
    [(everything, torch.float32), (everything, torch.bfloat16), (lora, torch.float32)],
    ids=["all-fp32", "all-bf16", "lora-fp32"],
)
@pytest.mark.parametrize("family", CAUSAL)
def test_the_same_numbers(family: str, moving: Callable[[nn.Module], None], dtype: torch.dtype) -> None:
    plain = tiny(family).to(dtype)
    moving(plain)
    loss, grads = learnt(plain, None)
    model = tiny(family).to(dtype)
    moving(model)
    roles = Roles(model)
    selector = HeadSelector(model.get_output_embeddings())
    done = speed_up(model)
    pruner = Pruner(roles, model, selector)
    got, found = learnt(model, selector)
    assert got == pytest.approx(loss, rel=CLOSE[dtype])
    alike(found, grads, CLOSE[dtype])
    assert (done["norms"], done["feed_forwards"]) == FUSED.get(family, (0, 0))
    assert bool(pruner.hooks) == (family not in EXPERTS)


@pytest.mark.parametrize("family", CAUSAL)
def test_whole_blocks(family: str) -> None:
    """Positions, and those that reach the head, filled up to a multiple: the same loss and gradients."""
    loss, grads = learnt(tiny(family), None)
    model = tiny(family)
    selector = HeadSelector(model.get_output_embeddings(), block=8)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    Pruner(Roles(model), model, selector)
    given = in_blocks(batch() | {"position_ids": torch.arange(11).expand(2, 11)}, 8)
    assert given["input_ids"].shape == given["weights"].shape == given["position_ids"].shape == (2, 12)
    assert given["attention_mask"].sum() == batch()["attention_mask"].sum() and seen == []
    got, found = learnt(model, selector, given)
    assert seen == [16] and got == pytest.approx(loss, rel=1e-5)  # 9 supervised tokens
    alike(found, grads, 2e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_it_is_taken_back(family: str) -> None:
    """No forward, no hook stays; the numbers are bit for bit those of the model as it came, also of a copy."""
    model = tiny(family)
    plain = learnt(tiny(family), None)
    selector = HeadSelector(model.get_output_embeddings())
    done = speed_up(model)
    pruner = Pruner(Roles(model), model, selector)
    learnt(model, selector)
    assert slow_down(model) == sum(done.values())
    pruner.remove()
    selector.hook.remove()
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert slow_down(model) == 0
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loss, grads = learnt(twin, None)
    assert loss == plain[0] and all(torch.equal(grads[n], g) for n, g in plain[1].items())


def test_another_formula_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that adds one to its weight, and a feed-forward with another activation, are tried and left alone."""
    model = tiny("llama", hidden_act="relu")
    norm = model.model.norm
    own = norm.forward
    monkeypatch.setattr(type(norm), "forward", lambda self, x: own.__func__(self, x) * 1.01)
    assert speed_up(model) == {"norms": 0, "feed_forwards": 0, "attention": 1}
