"""Files and folders that cannot be used as asked: one line each, and a cache that fails costs nothing but time."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from luthier.bridge import peft_out
from luthier.bridge.hf import export_hf
from luthier.bridge.peft_out import to_peft
from luthier.bridge.target import target
from luthier.cli import main
from luthier.delta import artefact
from luthier.errors import LuthierError
from luthier.measuring.items import Response
from luthier.measuring.remembered import remembered
from luthier.training.lock import locked
from luthier.training.machine import make_accelerator
from tests.moves import base_at, delta_of


def test_a_lock_in_a_place_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(LuthierError, match="cannot be written to .*--out"), locked(place):
            raise AssertionError("the lock was held")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_the_system_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import luthier.papers.table as papers

    def full() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.delenv("LUTHIER_TRACE", raising=False)
    monkeypatch.setattr(papers, "papers", full)
    with pytest.raises(SystemExit) as e:
        main(["papers"])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "No space left on device" in said and str(tmp_path / "x") in said


def test_a_full_disk_that_safetensors_tells_of_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_at(tmp_path / "base")
    delta, on = delta_of(base), target(str(base))
    before = delta.save(tmp_path / "delta") / "delta.safetensors"
    held = before.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for room in (artefact, peft_out):
        monkeypatch.setattr(room, "save_file", full)
    monkeypatch.setattr(type(on.model), "save_pretrained", full)
    for write in (
        lambda: delta.save(tmp_path / "delta"),
        lambda: to_peft(delta, tmp_path / "peft", base=on),
        lambda: export_hf(on, delta, tmp_path / "hf"),
    ):
        with pytest.raises(LuthierError, match="cannot write .*No space left on device.*free some space") as e:
            write()
        assert "\n" not in str(e.value)
    assert before.read_bytes() == held and sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta"]


def test_a_cache_that_cannot_be_written_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    answers = [Response(text="x")]
    with caplog.at_level(logging.WARNING):
        assert remembered(tmp_path / "file" / "audit", "f", {}, [], lambda: answers) == (answers, False)
    assert "LUTHIER_CACHE" in caplog.text


@pytest.mark.parametrize(("name", "near"), [("json", "tensorboard"), ("tensorbord", "did you mean 'tensorboard'")])
def test_an_unknown_tracker_is_one_line(name: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=f"train.report_to.*{name}") as e:
        make_accelerator(False, torch.device("cpu"), [name], tmp_path)
    assert near in str(e.value)


def test_trackers_are_told_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    told: list[object] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config=None: told.append(config))
    plan = {"train": {"lr": 0.1, "betas": [0.9, 0.99]}, "delta": [{"rank": 4}], "push_to": None}
    make_accelerator(False, torch.device("cpu"), ["tensorboard"], tmp_path, plan)
    assert told == [{"train.lr": 0.1, "train.betas": "[0.9, 0.99]", "delta.0.rank": 4, "push_to": "None"}]
