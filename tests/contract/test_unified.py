"""The design space as one form: every promise at its other places, and adapter, LoRA and prefix as points of it (P187)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.attach import Attached, attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.errors import LuthierError
from tests.contract.conformance import CHECKS, Case, quiet, shove
from tests.tiny import tiny

SCALED: dict[str, Any] = {"insertion": "parallel", "scaling": 4.0, "width": 5}
CASES = [
    Case("unified", "llama", SCALED, ["ffn.module"]),
    Case("unified", "gpt2", SCALED, ["attn.module", "ffn.module"]),
    Case("unified", "t5", SCALED, ["ffn.module"]),
    Case("unified", "qwen3", {"function": "gelu", "width": 3}, ["attn.module", "ffn.module"]),
    Case("unified", "gpt2", {"function": "linear", "insertion": "parallel", "width": 4}, ["attn.qkv"]),
    Case("unified", "llama", {"function": "softmax", "insertion": "parallel", "width": 3}),
    Case("unified", "gpt2", {"function": "softmax", "insertion": "parallel", "width": 2}),
    Case("adapter", "llama", {"placement": "parallel", "scaling": 4.0}, ["ffn.module"]),
    Case("adapter", "gpt_neox", {"width": 6}, ["attn.module", "ffn.down"]),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_form(case: Case, check: str) -> None:
    CHECKS[check](case)


def on(name: str, sites: list[str], **settings: Any) -> tuple[Any, Attached]:
    """A form on a tiny Llama, pushed off its start."""
    model = tiny("llama")
    form, handle = FORMS.make(name, settings), attached(model)
    handle.add(handle.build("p", form, sites_for(Roles(model), form, sites), seed=3))
    shove(handle, "p", 0.3)
    return model, handle


def copied(handle: Attached, other: Attached, names: dict[str, str]) -> None:
    """The numbers of one piece into another: name there -> name here, transposed where that fits."""
    with torch.no_grad():
        for a, b in zip(handle.placed["p"], other.placed["p"], strict=True):
            for there, here in names.items():
                value: Tensor = a.state.p[here]
                b.state.p[there].copy_(value if value.shape == b.state.p[there].shape else value.t())


@pytest.mark.parametrize(
    "name,sites,settings,same,names",
    [
        ("adapter", ["attn.o", "ffn.down"], {"width": 5, "activation": "relu"}, {}, {"D": "down", "U": "up"}),
        (
            "adapter",
            ["ffn.module"],
            {"width": 5, "activation": "relu", "placement": "parallel", "scaling": 4.0},
            {"insertion": "parallel", "scaling": 4.0},
            {"D": "down", "U": "up"},
        ),
        (
            "lora",
            ["attn.q", "attn.v"],
            {"rank": 5, "alpha": 15.0},
            {"function": "linear", "insertion": "parallel", "scaling": 3.0},
            {"D": "A", "U": "B"},
        ),
        (
            "prefix",
            ["attention"],
            {"length": 5, "shift_positions": False},
            {"function": "softmax", "insertion": "parallel"},
            {"D": "keys", "U": "values"},
        ),
    ],
    ids=["adapter", "scaled parallel adapter", "lora", "prefix"],
)
def test_points_of_the_space(
    name: str, sites: list[str], settings: dict[str, Any], same: dict[str, Any], names: dict[str, str]
) -> None:
    """One form with four settings gives what four forms give, at the same sites and with the same numbers."""
    model, handle = on(name, sites, **settings)
    if name == "adapter":  # the published one has no biases
        with torch.no_grad():
            for q in handle.placed["p"]:
                q.state.p["c"].zero_()
                q.state.p["e"].zero_()
    one, other = on("unified", sites, width=5, **same)
    copied(handle, other, names)
    base = quiet(tiny("llama"))
    wanted = quiet(model)
    assert float((wanted - base).abs().max()) > 0.01 * float(base.abs().max())
    assert torch.allclose(quiet(one), wanted, atol=1e-6)


def test_what_each_insertion_reads() -> None:
    """At a whole module: its input (the norm's output) or what it gives."""
    for insertion in ("parallel", "sequential"):
        model, handle = on("unified", ["ffn.module"], width=4, insertion=insertion)
        seen: dict[str, Tensor] = {}
        block = model.model.layers[0].mlp
        block.register_forward_hook(lambda m, args, out, seen=seen: seen.update(x=args[0], h=out))
        block.down_proj.register_forward_hook(lambda m, args, out, seen=seen: seen.update(y=out))
        quiet(model)
        p = handle.placed["p"][0].state.p
        z = seen["x"] if insertion == "parallel" else seen["y"]
        assert torch.allclose(seen["h"], seen["y"] + (z @ p["D"].t()).relu() @ p["U"], atol=1e-6)


def test_whole_modules_are_found_or_refused() -> None:
    form = FORMS.make("unified", SCALED)
    sites = sites_for(Roles(tiny("llama")), form, ["attn.module", "ffn.module", "attn.q"], layers=[1])
    assert [s.name.partition("layers.1.")[2] for s in sites] == ["self_attn", "mlp", "self_attn.q_proj"]
    for family in ("opt", "bert", "mixtral"):
        with pytest.raises(LuthierError, match="no feed-forward module of this base; state its parts"):
            sites_for(Roles(tiny(family)), form, ["ffn.module"])
    with pytest.raises(LuthierError, match="softmax is parallel"):
        FORMS.make("unified", {"function": "softmax"})
