"""Every form of the registry against every promise, on several architectures. A new file in forms/ is tested by being there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import forms
from luthier.bases.roles import Roles
from luthier.delta import FORMS, No
from luthier.errors import LuthierError
from tests.contract.conformance import CHECKS, Case, default_cases
from tests.tiny import tiny

TRAINED = [name for name in FORMS if FORMS[name].at != "base"]
"""Forms that are built and trained; the others are what choices leave behind and are held to theirs in test_choices."""

MORE = [
    Case("lora", "llama", {"rank": 2, "scaling": "rslora"}, ["embed", "head"]),
    Case("lora", "qwen2_moe", {"rank": 2}, ["expert", "attn"]),
    Case("lora", "opt", {"ranks": {"attn.q": 3, "*.0.*": 5}, "alphas": {"attn": 4.0}}),
    Case("dora", "opt", {"rank": 4, "scaling": "rslora"}),
    Case("adapter", "llama", {"placement": "parallel", "width": 5, "activation": "relu", "scaling": 4.0}),
    Case("adapter", "bert", {"placement": "parallel"}),
    Case("scale-shift", "llama", {"shift": False}),
    Case("scale-shift", "gemma", {"shift": False}),
    Case("scale-shift", "gpt2", {}, ["attn.qkv", "ffn", "norm.ffn"]),
    Case("bias", "gpt2", {}, ["attn.qkv", "ffn"]),
    Case("ia3", "opt", {"inputs": ["attn.o"]}, ["attn.o", "attn.k"]),
    Case("prefix", "gemma2", {"length": 3}),
    Case("prefix", "opt", {"length": 2}),
    Case("prefix", "qwen3", {"length": 2, "inner": 5}),
    Case("prefix", "phi", {"length": 2, "shift_positions": False}),
    Case("prompt", "opt", {"length": 3}),
    Case("prompt", "gemma", {"length": 1}),
    Case("sparse", "llama", {"entries": 9, "by": "largest"}),
    Case("signs", "llama", {}, ["embed", "head"]),
    Case("sparsifier", "llama", {"rank": 5}, ["embed", "attn.o", "ffn.down"]),
    Case("pat", "llama", {"rank": 5, "keep": 0.5, "steps": 100}, ["embed", "attn.o", "ffn.down"]),
    Case("factored", "llama", {"factor": 1.5, "penalty_weight": 0.0}, ["attn"]),
    Case("ternary", "llama", {"density": 0.3}, ["embed", "head"]),
    Case("two-four", "llama", {"bits": 4, "group": 20}, ["embed", "ffn"]),
    Case("mixed-bits", "llama", {"bits": (4, 2), "directions": (3,), "budget": 3.0}, ["embed", "attn"]),
]
CASES = [case for name in TRAINED for case in default_cases(name)] + MORE


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_form(case: Case, check: str) -> None:
    CHECKS[check](case)


def test_every_form_meets_every_check() -> None:
    """Counts the parametrised cases of the file against the registry and the files, whatever part of it is run where."""
    marks: list[pytest.Mark] = test_form.pytestmark  # pyright: ignore[reportFunctionMemberAccess]
    over = {m.args[0]: list(m.args[1]) for m in marks}
    met = {(case.form, check) for case in over["case"] for check in over["check"]}
    assert met == {(name, check) for name in FORMS if FORMS[name].at != "base" for check in CHECKS}
    files = {f"luthier.forms.{path.stem}" for path in Path(forms.__path__[0]).glob("[!_]*.py")}
    files.remove("luthier.forms.engine")
    assert {FORMS[name].__module__ for name in FORMS} == files
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("family,form", [("bloom", "prefix")])
def test_refused_places(family: str, form: str) -> None:
    """Where a base has no such place the piece is refused by name and the model is as before."""
    model = tiny(family)
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(LuthierError, match="use another form"):
        Case(form, family).on(model)
    assert [n for n, _ in model.named_modules()] == names


def test_default_sites_follow_the_base() -> None:
    """A default role that a base lacks is passed over; a stated one is an error."""
    case = Case("adapter", "mixtral")
    assert {s.role for s in case.where(case.model())} == {"attn.o"}
    with pytest.raises(LuthierError, match="matches no part"):
        Case("adapter", "mixtral", {}, ["ffn.down"]).where(case.model())


def test_patterns_that_meet_another_kind_are_refused() -> None:
    model = tiny("llama")
    assert all(s.kind == "linear" for s in Case("dora", "llama", {}, ["all"]).where(model))
    with pytest.raises(LuthierError, match="cannot go on"):
        Case("dora", "llama", {}, ["attn", "norm"]).on(model)


def test_one_prefix_site_for_each_layer() -> None:
    model = tiny("llama", num_hidden_layers=4)
    sites = Case("prefix", "llama").where(model)
    assert [s.layer for s in sites] == [0, 1, 2, 3] and Roles(model).layer_count == 4


LORA: Any = FORMS["lora"]
FAULTS: dict[str, dict[str, Callable[..., Any] | bool | No | str]] = {
    "identity": {"change": lambda self, x, y, s: LORA.change(self, x, y, s) + 1e-3},
    "moves": {"change": lambda self, x, y, s: y * 0},
    "folds": {"delta": lambda self, s: {"weight": LORA.delta(self, s)["weight"] * 1.01}},
    "counts": {"count": lambda self, site: LORA.count(self, site) + 1},
    "gradients": {"change": lambda self, x, y, s: LORA.change(self, x.detach(), y, s).detach()},
    "saves": {"change": lambda self, x, y, s: LORA.change(self, x, y, s) * (1 if s.p["A"].requires_grad else 2)},
    "base_unchanged": {"change": lambda self, x, y, s: s.W().mul_(1.001) is not None and LORA.change(self, x, y, s)},
    "bf16": {"build": lambda self, site, g: ({k: v.bfloat16() for k, v in LORA.build(self, site, g)[0].items()}, {})},
    "scales": {"onto": lambda self, total, x, y, scale, s: total + LORA.change(self, x, y, s)},
    "padded": {"change": lambda self, x, y, s: LORA.change(self, x, y, s) * x.shape[1]},
    "packed": {"change": lambda self, x, y, s: LORA.change(self, x.cumsum(1), y, s)},
    "generates": {"change": lambda self, x, y, s: LORA.change(self, x.roll(1, 1), y, s)},
}
"""Check -> what a LoRA with one fault does otherwise."""


@pytest.mark.parametrize("check", FAULTS)
def test_the_suite_sees_a_broken_form(check: str) -> None:
    """Each fault is caught by the check that it breaks."""
    faults = {"onto": FORMS["scale-shift"].onto} | FAULTS[check]
    FORMS._found["broken"] = dataclasses.dataclass(frozen=True)(type("Broken", (LORA,), faults))
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            CHECKS[check](Case("broken", "llama", {"rank": 4}))
    finally:
        del FORMS._found["broken"]
