"""What clumsy hands and broken disks do: one clear line, exit code 2, and nothing written or lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.cli import main
from luthier.errors import LuthierError
from luthier.training.lock import locked
from tests.rooms.test_verify import made, saved

PLAN = """base: base
data: {train: good.jsonl, max_length: 64, cache: false}
delta: [{form: lora, rank: 2}]
train: {steps: 1, batch_size: 2}
audit: {enabled: false}
"""
RECORD = '{"prompt": "1+1=", "completion": "2"}\n'


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    made(saved(folder / "base"), rank=2).save(folder / "delta")
    return folder


@pytest.fixture
def here(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, a delta, good records and a good plan."""
    for name in ("base", "delta"):
        shutil.copytree(stock / name, tmp_path / name)
    (tmp_path / "good.jsonl").write_text(RECORD * 8)
    (tmp_path / "plan.yaml").write_text(PLAN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")}


def refused(here: Path, capsys: Any, *arguments: str) -> str:
    """The one line of a command that fails, after which everything is as it was."""
    before = state(here)
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (left.value.code, shown)
    assert len(lines[0]) < 450 and "Traceback" not in lines[0]
    assert state(here) == before
    return lines[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the plan is empty"),
        ("data: &a {train: *a}\n", "holds itself"),
        ("base: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        (PLAN.replace("lora", "loar"), "did you mean 'lora'"),
        (PLAN.replace("train: {steps", "trian: {steps"), "did you mean 'train'"),
        (PLAN.replace("rank: 2", "rank: 2, alpha: .nan"), "finite number"),
        (PLAN.replace("rank: 2", "rank: 2, alpha: .inf"), "finite number"),
        (PLAN.replace("rank: 2", "rank: two"), "'rank'"),
        (PLAN.replace("rank: 2", "rank: 2, sites: [nothing]"), "'nothing' matches no part"),
        (PLAN.replace("rank: 2", "rank: 2, layers: [99]"), "no layer 99"),
        (PLAN.replace("steps: 1", "steps: 1, lr: .inf"), "finite number"),
        (PLAN.replace("steps: 1", "epochs: .inf"), "finite number"),
        (PLAN.replace("steps: 1", "steps: 1, betas: [2, 3]"), "train.betas.0"),
        (PLAN.replace("steps: 1", "steps: 1, callbacks: [nomodule:x]"), "nomodule"),
        (PLAN.replace("good.jsonl", "nope.jsonl"), "nope.jsonl does not exist"),
    ],
)
def test_bad_plans(text: str, said: str, here: Path, capsys: Any) -> None:
    (here / "plan.yaml").write_text(text)
    assert said in refused(here, capsys, "tune", "plan.yaml", "-q", "-o", "new/out")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (RECORD.encode() + b'{"prompt": "x", \n', "bad.jsonl:2: broken JSON"),
        (b"", "is empty"),
        (b"\n\n", "blank lines only"),
        (RECORD.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a\\ud800", "completion": "b"}\n', "bad.jsonl:1: \\ud800 is half of a character"),
        (b"[" * 100_000 + b"]" * 100_000 + b"\n", "nested too deeply"),
        (b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}\n", "a number too long"),
        (b"[1]\n", "must be an object"),
        (b'{"a": 1}\n', "no known record shape"),
        (b"\x00\x00\n", "broken JSON"),
    ],
)
def test_bad_records(content: bytes, said: str, here: Path, capsys: Any) -> None:
    (here / "bad.jsonl").write_bytes(content)
    assert said in refused(here, capsys, "tune", "plan.yaml", "-q", "-o", "out", "data.train=bad.jsonl")


def test_whole_characters_in_escapes_are_read(here: Path) -> None:
    from luthier.data.files import from_json

    assert from_json('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    assert from_json('{"a": "\\\\ud800"}', "x") == {"a": "\\ud800"}


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_line_ends_of_other_systems_are_read(start: bytes, end: bytes, here: Path, capsys: Any) -> None:
    (here / "good.jsonl").write_bytes(start + RECORD.encode().replace(b"\n", end) * 3)
    (here / "plan.yaml").write_bytes(start + PLAN.encode().replace(b"\n", end))
    (here / "ask.jsonl").write_bytes(start + '{"prompt": "a\u2028b"}'.encode().replace(b"\xe2\x80\xa8", b"x") + end)
    for arguments in (
        ["data", "show", "plan.yaml", "-n", "1"],
        ["generate", "base", "-f", "ask.jsonl", "--max-new-tokens", "1"],
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"messages": [1]}\n', "messages.0 has no 'role'"),
        ('{"messages": [{"role": "user"}]}\n', "messages.0 has no 'role' and 'content'"),
        ('{"prompt": \n', "ask.jsonl:1: not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\n", "is empty"),
    ],
)
def test_bad_prompts(content: str, said: str, here: Path, capsys: Any) -> None:
    (here / "ask.jsonl").write_text(content)
    assert said in refused(here, capsys, "generate", "base", "-f", "ask.jsonl")


@pytest.mark.parametrize("out", ["base", "good.jsonl", "good.jsonl/below"])
def test_places_that_are_taken(out: str, here: Path, capsys: Any) -> None:
    said = refused(here, capsys, "tune", "plan.yaml", "-q", "-o", out)
    assert "choose another --out" in said
    if out != "base":
        arguments = ("audit", "delta", "--plan", "plan.yaml", "audit.target=[good.jsonl]", "-o", out)
        assert "choose another --out" in refused(here, capsys, *arguments)  # before anything is measured


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), locked(tmp_path / "a" / "b"):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="late"), locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "log").write_text("x")
        raise ValueError("late")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [".lock", "log"]
    with pytest.raises(ValueError, match="again"), locked(tmp_path / "a"):
        raise ValueError("again")
    assert (tmp_path / "a" / "b" / "log").read_text() == "x"


@pytest.mark.parametrize("what", ["matches nothing", "wrong shape", "truncated", "pickle", "no weights", "no json"])
def test_broken_adapters(what: str, here: Path, capsys: Any) -> None:
    folder = here / "adapter"
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text("{" if what == "no json" else json.dumps(settings))
    module = "nope" if what == "matches nothing" else "q_proj"
    wide = 3 if what == "wrong shape" else 32
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side}.weight": torch.zeros(shape)
        for layer in range(2)
        for side, shape in (("A", (2, wide)), ("B", (wide, 2)))
    }
    path = folder / "adapter_model.safetensors"
    if what == "pickle":
        torch.save(tensors, folder / "adapter_model.bin")
    elif what != "no weights":
        save_file(tensors, path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    said = refused(here, capsys, "import", "adapter", "-o", "new", "--base", "base")
    told = {
        "matches nothing": "match nothing",
        "wrong shape": "(2, 3)",
        "pickle": "can run code",
        "no json": "not JSON",
    }
    assert told.get(what, "copy it again") in said
    refused(here, capsys, "generate", "base", "-p", "x", "-d", "adapter")


@pytest.mark.parametrize(
    ("settings", "said"),
    [("{", "not readable as JSON"), ("[]", "no JSON object"), ("{}", "unknown to transformers"), (None, "config.json")],
)
def test_broken_bases(settings: str | None, said: str, here: Path, capsys: Any) -> None:
    path = here / "base" / "config.json"
    if settings is None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    else:
        path.write_text(settings)
    assert said in refused(here, capsys, "generate", "base", "-p", "x")


def test_an_override_opens_what_was_left_empty() -> None:
    from luthier.plan.load import override

    raw: dict[str, Any] = {"gate": None}
    override(raw, "gate.min_gain=0.5")
    assert raw["gate"] == {"min_gain": 0.5}
    with pytest.raises(LuthierError, match="is a value, not a section"):
        override({"push_to": "x"}, "push_to.y=1")
