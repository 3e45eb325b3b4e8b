"""A delta received from someone else: its folder may be altered, and its plan may want to run code."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

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


def header_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "delta.json").read_text(encoding="utf-8"))


def rewritten(folder: Path, *path: Any, value: Any) -> None:
    """Sets one place of delta.json."""
    header = header_of(folder)
    here: Any = header
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    (folder / "delta.json").write_text(json.dumps(header), encoding="utf-8")


SITE = "model.layers.0.self_attn.q_proj"
ALTERED = {
    # what is changed -> (place in delta.json, value, what the line says)
    "text format": (["format"], "one", "format"),
    "base a list": (["base"], [], "base"),
    "pieces a table": (["pieces"], {}, "pieces"),
    "a piece a number": (["pieces", 0], 3, "pieces.0"),
    "settings a list": (["pieces", 0, "settings"], [], "settings"),
    "an unknown setting": (["pieces", 0, "settings"], {"rnk": 1}, "rnk"),
    "an unknown form": (["pieces", 0, "form"], "loar", "lora"),
    "a scale of text": (["pieces", 0, "scale"], "2", "scale"),
    "no number as scale": (["pieces", 0, "scale"], float("nan"), "scale"),
    "sites a list": (["pieces", 0, "sites"], [], "sites"),
    "an unknown site key": (["pieces", 0, "sites", SITE, "d_inn"], 4, "d_inn"),
    "a site's width of text": (["pieces", 0, "sites", SITE, "d_in"], "wide", "d_in"),
    "a site a list": (["pieces", 0, "sites", SITE], [], SITE),
    "an unnamed site": (["pieces", 0, "sites"], {}, "model.layers.0"),
    "seals a list": (["seals"], [], "seals"),
    "a seal of text": (["seals"], {"a": "x"}, "seals"),
    "lineage a list": (["lineage"], [], "lineage"),
    "a plan of text": (["lineage", "plan"], "plan.yaml", "plan"),
    "a digest of numbers": (["digest"], 7, "digest"),
    "a file outside": (["files"], {"../x": "0"}, "../x"),
    "a file at the root": (["files"], {"/etc/hostname": "0"}, "/etc/hostname"),
    "a file that is not there": (["files"], {"vocab.txt": "0"}, "vocab.txt"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_header_is_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    place, value, said = ALTERED[name]
    folder = made().save(tmp_path / "d")
    Delta.load(folder)
    rewritten(folder, *place, value=value)
    with pytest.raises(LuthierError) as e:
        Delta.load(folder)
    assert str(folder) in str(e.value) and said in str(e.value) and "\n" not in str(e.value), e.value


@pytest.mark.parametrize("text", ["[]", "3", "", "{", "[" * 100_000])
def test_a_header_that_is_no_table_is_one_line(text: str, tmp_path: Path) -> None:
    folder = made().save(tmp_path / "d")
    (folder / "delta.json").write_text(text)
    with pytest.raises(LuthierError, match="delta.json"):
        Delta.load(folder)


def probed() -> Delta:
    delta = made()
    delta.probes = {"tokens": torch.arange(9), "meta": torch.tensor([1, 0, 5])}
    delta.files = {"tokenizer.json": b"{}", "more/words.txt": b"a b"}
    return delta


def test_probes_and_files_travel_and_are_held_to_their_digests(tmp_path: Path) -> None:
    folder = probed().save(tmp_path / "d")
    back = Delta.load(folder)
    assert torch.equal(back.probes["tokens"], torch.arange(9)) and back.files == probed().files
    whole = (folder / "probes.safetensors").read_bytes()
    for broken in (whole[:40], b"", whole[:-1] + b"\1"):
        (folder / "probes.safetensors").write_bytes(broken)
        with pytest.raises(LuthierError, match="probes.safetensors is truncated or altered"):
            Delta.load(folder)
    (folder / "probes.safetensors").unlink()
    with pytest.raises(LuthierError, match="probes.safetensors is missing"):
        Delta.load(folder)
    (folder / "probes.safetensors").write_bytes(whole)
    (folder / "tokenizer.json").write_bytes(b"{ }")
    with pytest.raises(LuthierError, match="tokenizer.json is altered"):
        Delta.load(folder)


def test_probes_without_a_stated_digest_are_read_and_a_cut_file_is_told(tmp_path: Path) -> None:
    """Folders written before the digest was."""
    folder = probed().save(tmp_path / "d")
    header = header_of(folder)
    del header["probes_digest"], header["files"]
    (folder / "delta.json").write_text(json.dumps(header))
    assert set(Delta.load(folder).probes) == {"tokens", "meta"}
    (folder / "probes.safetensors").write_bytes(b"cut")
    with pytest.raises(LuthierError, match="probes.safetensors is not a whole safetensors file"):
        Delta.load(folder)


def test_saving_over_another_delta_leaves_nothing_of_it(tmp_path: Path) -> None:
    folder = probed().save(tmp_path / "d")
    (folder / "notes.txt").write_text("mine")
    made().save(folder)
    kept = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert kept == {"delta.json", "delta.safetensors", "README.md", "notes.txt"}
    back = Delta.load(folder)
    assert not back.probes and not back.files
