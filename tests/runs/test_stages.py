"""A plan as a chain: stages hand their folders on, what is done is not run again, and what is wrong is one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.plan.stages import is_chain, load_stages, references, resolved
from luthier.verbs.stages import run_stages

RUN: dict[str, Any] = {
    "base": "practice",
    "data": {"train": {"path": "practice:sorting", "limit": 40}, "max_length": 96},
    "delta": {"form": "lora", "rank": 2},
    "train": {"steps": 2, "batch_size": 4, "lr": 1e-3},
    "audit": {"enabled": False},
}
AUDIT = {"target": ["practice:sorting"], "items": 4, "drift_tokens": 64, "samples": 1}
CHAIN = {
    "stages": [
        {"name": "first", "tune": RUN},
        {"name": "second", "tune": {**RUN, "delta": {"form": "lora", "rank": 2, "start_from": "@first"}}},
        {"name": "measured", "audit": {"delta": "@second", **AUDIT}},
    ]
}


def test_a_chain_runs_hands_on_and_resumes(tmp_path: Path) -> None:
    done = run_stages(CHAIN, out=tmp_path, progress=False)
    assert [row["name"] for row in done.stages] == ["first", "second", "measured"]
    assert done.stages[2]["verdict"] == done.report["audit"]["verdict"]["line"]
    header = json.loads((tmp_path / "second" / "delta.json").read_text(encoding="utf-8"))
    assert str(tmp_path / "first") in json.dumps(header["lineage"])
    with pytest.raises(LuthierError, match="--resume"):
        run_stages(CHAIN, out=tmp_path, progress=False)
    stamp = (tmp_path / "first" / "delta.json").stat().st_mtime_ns
    again = run_stages(CHAIN, out=tmp_path, progress=False, resume=True, overrides=["measured.items=5"])
    assert (tmp_path / "first" / "delta.json").stat().st_mtime_ns == stamp, "a stage that was done ran again"
    assert again.report["audit"]["target"][0]["n"] == 5, "a stage whose settings changed did not run again"
    run_stages(CHAIN, out=tmp_path, progress=False, resume=True, overrides=["first.train.lr=2e-3"])
    header = json.loads((tmp_path / "first" / "delta.json").read_text(encoding="utf-8"))
    assert header["lineage"]["plan"]["train"]["lr"] == 2e-3
    rows = json.loads((tmp_path / "stages.json").read_text(encoding="utf-8"))
    assert rows[1]["seconds"] != done.stages[1]["seconds"], "a stage that stands on a changed one did not run again"


def test_what_does_not_stand_on_a_changed_stage_stays_done_whatever_is_cut_short(tmp_path: Path) -> None:
    chain = {"stages": [{"name": name, "tune": RUN} for name in ("one", "two")]}
    run_stages(chain, out=tmp_path, progress=False)
    stamp = (tmp_path / "two" / "delta.json").stat().st_mtime_ns
    run_stages(chain, out=tmp_path, progress=False, resume=True, overrides=["one.train.lr=2e-3"])
    with pytest.raises(LuthierError, match="stage 'one'"):  # begun anew, and broken off before it wrote anything
        run_stages(chain, out=tmp_path, progress=False, resume=True, overrides=["one.base=nowhere"])
    last = run_stages(chain, out=tmp_path, progress=False, resume=True)
    assert [row["name"] for row in last.stages] == ["one", "two"]
    assert (tmp_path / "two" / "delta.json").stat().st_mtime_ns == stamp, "a stage that was done ran again"


def test_a_folder_that_the_chain_did_not_write_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "notes.txt").write_text("mine")
    with pytest.raises(LuthierError, match="second is there and not empty"):
        run_stages(CHAIN, out=tmp_path, progress=False)
    assert (tmp_path / "second" / "notes.txt").exists() and not (tmp_path / "stages.json").exists()


def test_overrides_reach_one_stage_or_all_of_a_verb() -> None:
    stages = load_stages(CHAIN, ["tune.train.steps=3", "second.train.lr=1e-4"])
    assert [s.settings["train"]["steps"] for s in stages[:2]] == [3, 3]
    assert [s.settings["train"]["lr"] for s in stages[:2]] == [1e-3, 1e-4]
    assert is_chain(CHAIN) and not is_chain(RUN)


def test_references_are_found_and_replaced() -> None:
    settings = {"models": ["@a", {"model": "@b/checkpoint"}], "note": "no @reference", "n": 1}
    assert list(references(settings)) == ["a", "b"]
    folders = {"a": Path("/x/a"), "b": Path("/x/b")}
    assert resolved(settings, folders) == {"models": ["/x/a", {"model": "/x/b/checkpoint"}], "note": "no @reference", "n": 1}  # fmt: skip


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([], "must be a list"),
        (["tune"], "write {name: first"),
        ([{"name": "a", "tuen": RUN}], "did you mean 'tune'"),
        ([{"name": "a"}], "exactly one verb"),
        ([{"name": "a", "tune": RUN, "audit": {}}], "exactly one verb"),
        ([{"name": "tune", "tune": RUN}], "no verb's name"),
        ([{"name": "a", "tune": RUN}, {"name": "a", "tune": RUN}], "is taken"),
        ([{"name": "a", "audit": {"delta": "@b"}}], "names no earlier stage"),
        ([{"name": "a", "tune": {**RUN, "trian": {}}}], "stage 'a'"),
        ([{"name": "a", "tune": 3}], "not a table"),
    ],
)
def test_what_is_wrong_is_one_line(rows: list[Any], problem: str) -> None:
    with pytest.raises(LuthierError, match=problem) as e:
        load_stages({"stages": rows})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("verb", "settings", "said"),
    [
        ("merge", {"models": ["@first"], "method": "ties", "density": 2}, "density 2 is out of range"),
        ("merge", {"models": ["@first"], "method": "ties", "densty": 0.5}, "did you mean 'density'"),
        ("merge", {"models": ["@first"], "method": "tise"}, "did you mean 'ties'"),
        ("merge", {"models": ["@first"], "method": "lines", "beta": "x"}, "setting 'beta'"),
        ("compress", {"delta": "@first", "method": "compeft", "density": 0}, "density must lie in"),
        ("compress", {"delta": "@first", "methd": "compeft"}, "methd"),
        ("edit", {"base": "practice", "records": "practice:edits", "method": "rome", "steps": -1}, "at least 0"),
        ("port", {"delta": "@first", "onto": "practice", "scale": "x"}, "setting 'scale'"),
        ("assemble", {"large": "practice", "expert": "@first", "method": "prxy"}, "did you mean 'proxy'"),
        ("diff", {"base": "practice"}, "states no tuned"),
        ("audit", {"delta": "@first", "target": ["practice:sorting"], "items": 0}, "audit.items"),
        ("audit", {"delta": "@first"}, "names nothing to measure"),
    ],
)
def test_what_a_later_stage_cannot_have_is_told_before_anything_runs(
    verb: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    chain = {"stages": [{"name": "first", "tune": RUN}, {"name": "then", verb: settings}]}
    with pytest.raises(LuthierError, match=f"stage 'then': .*{said}") as e:
        run_stages(chain, out=tmp_path / "out", progress=False)
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_errors_name_the_stage(tmp_path: Path) -> None:
    chain = {"stages": [{"name": "measured", "audit": {"target": ["practice:sorting"]}}]}
    with pytest.raises(LuthierError, match=r"stage 'measured': audit: states no delta"):
        run_stages(chain, out=tmp_path, progress=False)
    with pytest.raises(LuthierError, match="begin with a stage or a verb"):
        load_stages(CHAIN, ["train.steps=3"])
    with pytest.raises(LuthierError, match="beside stages"):
        load_stages({**CHAIN, "base": "practice"})


LAUNCHER = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"


@pytest.mark.slow
def test_a_launcher_starts_every_run_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = {"name": "small", "compress": {"delta": "@second", "method": "bitdelta"}}
    chain = {"stages": [*CHAIN["stages"][:2], small]}
    done = run_stages(chain, out=tmp_path, progress=False, launcher=LAUNCHER)
    assert [row["name"] for row in done.stages] == ["first", "second", "small"]
    for name in ("first", "second"):
        report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
        assert report["cost"]["processes"] == 2
    header = json.loads((tmp_path / "second" / "delta.json").read_text(encoding="utf-8"))
    assert header["lineage"]["started_from"] == [str(tmp_path / "first")]


def test_a_launched_run_that_fails_or_is_asked_to_stop(tmp_path: Path) -> None:
    """Its launcher's code is an error; a signal to the chain is handed on to it, and leaves a chain to go on with."""
    script = tmp_path / "launcher"
    with pytest.raises(
        LuthierError, match="stage 'first': .*launcher -m luthier tune .*first.yaml.* ended with code 3"
    ):
        _as_launcher(script, "exit 3")
        run_stages(CHAIN, out=tmp_path / "a", progress=False, launcher=str(script))
    _as_launcher(script, f'trap "exit 143" TERM; kill -TERM {os.getpid()}; while :; do sleep 0.05; done')
    done = run_stages(CHAIN, out=tmp_path / "b", progress=False, launcher=str(script))
    assert done.stopped == "SIGTERM" and done.stages == []


def _as_launcher(script: Path, does: str) -> None:
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)


def test_processes_are_started_by_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LuthierError, match="launcher 'nowhere -n 2': no such command"):
        run_stages(CHAIN, out=tmp_path, progress=False, launcher="nowhere -n 2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LuthierError, match="start it once, with --launcher"):
        run_stages(CHAIN, out=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
