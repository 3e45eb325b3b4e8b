"""A delta received from someone else: its folder may be altered, and its plan may want to run code."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.verbs.audit import audit
from tests.tiny import tiny

MARK: list[str] = []


def touched(example: Any, answer: str) -> bool:
    """A metric that leaves a trace: a received plan must not reach it."""
    MARK.append(answer)
    return True


def made() -> Delta:
    """LoRA on the tiny Llama."""
    model = tiny("llama")
    form = FORMS.make("lora", {})
    handle = attached(model)
    handle.add(handle.build("lora", form, sites_for(Roles(model), form), 0))
    return handle.delta()


def planned(**sections: Any) -> Delta:
    """The delta with a plan in its lineage, as a stranger may have written it."""
    delta = made()
    delta.lineage = {
        "plan": {"base": {"name": "practice"}, "data": {"train": "a.jsonl"}, "delta": ["lora"], **sections}
    }
    return delta


METRIC = f"{__name__}:touched"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Base specs that audit asks for; it goes no further."""
    seen: list[Any] = []

    def load_all(spec: Any, deltas: Any) -> Any:
        seen.append(spec)
        raise LuthierError("far enough")

    monkeypatch.setattr(importlib.import_module("luthier.verbs.audit"), "load_all", load_all)
    return seen


def test_a_received_plan_runs_no_code(tmp_path: Path, loaded: list[Any]) -> None:
    check = {"source": "practice:facts", "metric": METRIC}
    folder = planned(audit={"guards": [check]}, train={"callbacks": ["os:getcwd"]}).save(tmp_path / "d")
    with pytest.raises(LuthierError, match=f"audit.guards.*{METRIC}.*--plan"):
        audit(folder)
    assert not loaded and not MARK
    with pytest.raises(LuthierError, match="far enough"):
        audit(folder, overrides=[f"audit.guards.0.metric={METRIC}"])
    plan = json.loads((folder / "delta.json").read_text())["lineage"]["plan"]
    with pytest.raises(LuthierError, match="far enough"):
        audit(folder, plan=plan)


def test_a_received_plan_trusts_no_code_of_the_base(tmp_path: Path, loaded: list[Any]) -> None:
    base = {"name": "practice", "trust_remote_code": True}
    folder = planned(base=base, audit={"guards": ["practice:facts"]}).save(tmp_path / "d")
    for overrides in ([], ["base.trust_remote_code=true"]):
        with pytest.raises(LuthierError, match="far enough"):
            audit(folder, overrides=overrides)
    assert [spec.trust_remote_code for spec in loaded] == [False, True]
