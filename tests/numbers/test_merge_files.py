"""Merge files of the field: slices, gradients, filters, types and tied heads give the tensors that mergekit writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.verbs.merge import merge
from tests.numbers.merge_files import CASES, facts, make, placed

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "merge_files.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make(folder)
    return folder


def test_every_case_is_stored() -> None:
    assert list(STORED["cases"]) == list(CASES) and STORED["mergekit"] == "0.1.5"


@pytest.mark.parametrize("name", CASES)
def test_same_tensors_as_mergekit(name: str, models: Path, tmp_path: Path) -> None:
    merge(placed(CASES[name], models), out=tmp_path / "out", sync=False)
    got, want = facts(tmp_path / "out"), STORED["cases"][name]
    assert got.keys() == want.keys()
    for tensor, (dtype, shape, total, rows) in want.items():
        assert got[tensor][:2] == [dtype, shape], tensor
        assert got[tensor][3] == pytest.approx(rows, abs=1e-5), tensor
        assert got[tensor][2] == pytest.approx(total, abs=1e-5 * max(1, len(rows) ** 0.5 * 16)), tensor
