"""The worked examples of docs/add-a-method.md, put into the registry as they stand and held to every promise."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from luthier.attach.sites import parameter_items
from luthier.bases.roles import Roles
from luthier.choices.engine import ChoiceContext
from luthier.delta import CHOICES, FORMS, MERGES, Registry, Stack
from luthier.delta.artefact import Delta
from tests.contract.conformance import CHECKS, Case, default_cases, quiet
from tests.tiny import tiny

DOCS = Path(__file__).parents[2] / "docs"


def blocks() -> list[str]:
    """The Python blocks of the page."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / "add-a-method.md").read_text(encoding="utf-8"), re.S | re.M)


def entered(block: str, registry: Registry, folder: Path) -> Iterator[str]:
    """Imports a block as a module of its own; gives the name it entered, and takes it out again."""
    before = set(registry)
    path = folder / "example_method.py"
    path.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("example_method", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_method"] = module
    try:
        spec.loader.exec_module(module)
        (name,) = set(registry) - before
        yield name
    finally:
        for name in set(registry) - before:
            del registry._found[name]
        sys.modules.pop("example_method", None)


@pytest.fixture
def form(tmp_path: Path) -> Iterator[str]:
    """The example form, in the registry for one test."""
    yield from entered(blocks()[0], FORMS, tmp_path)


@pytest.mark.parametrize("check", CHECKS)
def test_the_example_form_keeps_every_promise(form: str, check: str) -> None:
    for case in default_cases(form):
        CHECKS[check](Case(case.form, case.family, {"rank": 8}))


def test_the_page_names_every_check() -> None:
    text = (DOCS / "add-a-method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \| [a-z0-9`]", text.split("What the suite then checks")[1], re.M)
    assert {name for row in rows for name in row.split(", ")} - {"check"} == set(CHECKS)


def test_the_example_form_is_one_screen(form: str) -> None:
    assert len(blocks()[0].splitlines()) <= 60 and form == "vectors"


def test_the_example_choice(tmp_path: Path) -> None:
    for name in entered(blocks()[1], CHOICES, tmp_path):
        model = tiny("llama")
        table = dict(model.named_parameters())
        chosen = CHOICES.make(name, {}).select(
            parameter_items(Roles(model), model), ChoiceContext(weight=lambda n, t=table: t[n].detach())
        )
        index = chosen["model.layers.0.mlp.up_proj.weight"]
        rows = table["model.layers.0.mlp.up_proj.weight"].abs().mean(1)
        assert len(chosen) == 14 and index is not None
        assert set((index // 32).tolist()) == set(rows.topk(5).indices.tolist())


def test_the_example_merge(tmp_path: Path) -> None:
    for name in entered(blocks()[2], MERGES, tmp_path):
        base, a, b = torch.zeros(2, 2), torch.tensor([[1.0, -2], [0, 3]]), torch.tensor([[-4.0, 1], [0, 2]])
        stack = Stack("w", [a, b], base, {"weight": [1.0, 0.5]})
        merged = MERGES.make(name, {"strength": 2.0}).merge(stack)
        assert merged.tolist() == [[-4.0, -4.0], [0.0, 6.0]]
        assert not base.any() and len(blocks()[2].splitlines()) <= 60


def test_the_format_page_names_what_is_written(tmp_path: Path) -> None:
    """Every key of delta.json, of a piece and of a site stands on the page, and the tensors' names are as it says."""
    text = (DOCS / "delta-format.md").read_text(encoding="utf-8")
    model = tiny("llama")
    delta = Case("lora", "llama").on(model).delta()
    delta.pieces[0].name = "lora"
    delta.save(tmp_path / "d")
    header = json.loads((tmp_path / "d" / "delta.json").read_text(encoding="utf-8"))
    piece = header["pieces"][0]
    for key in [*header, *piece, *next(iter(piece["sites"].values()))]:
        assert f"`{key}`" in text, key
    named = re.findall(r"`(lora/[\w./]+)`", text)
    assert named and all(name in {n for n, _ in delta._flat()} for name in named)
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"delta.json", "delta.safetensors", "README.md"}
    assert quiet(model).isfinite().all() and Delta.load(tmp_path / "d").count() == delta.count()


def test_the_proof_page_names_what_exists() -> None:
    """All 25 pains have a row; every module and every test in them is there, and no row lacks a test but the one that says so."""
    text = (DOCS / "proof.md").read_text(encoding="utf-8")
    rows = {int(n): line for n, line in re.findall(r"^\| (\d+) (\|.*)$", text, re.M)}
    assert sorted(rows) == list(range(1, 26))
    for number, row in rows.items():
        named = re.findall(r"`([\w/.]+\.py)(?:::(\w+))?`", row)
        tests = [(path, test) for path, test in named if path.startswith("tests/")]
        assert len(named) > len(tests), f"row {number} names no module"
        assert tests or (number == 18 and "waits" in row), f"row {number} names no test"
        for path, test in named:
            file = DOCS.parent / path
            assert file.is_file(), f"row {number}: {path}"
            if path.startswith("tests/"):
                assert test, f"row {number}: {path} names no test"
                assert re.search(rf"^def {test}\(", file.read_text(encoding="utf-8"), re.M), f"row {number}: {test}"
