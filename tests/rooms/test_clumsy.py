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

from luthier.bridge.weights_file import index_of
from luthier.cli import main
from luthier.data.prepare import prepare
from luthier.errors import LuthierError
from luthier.plan.load import load_plan
from luthier.training.lock import locked
from tests.rooms.test_verify import made, saved
from tests.tiny import TEMPLATE, tiny_tokenizer

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


def chat(*turns: tuple[str, str], **more: Any) -> str:
    return json.dumps({"messages": [{"role": r, "content": c, **more} for r, c in turns]}) + "\n"


def spoken(*turns: tuple[Any, str]) -> str:
    return json.dumps({"conversations": [{"from": f, "value": v} for f, v in turns]}) + "\n"


def fields(**columns: Any) -> str:
    return json.dumps(columns) + "\n"


UNSUPERVISED = "set data.unsupervised: drop"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", chat(("usr", "a"), ("assistant", "b")), "turn 0 has the unknown role 'usr'; did you mean 'user'"),
        ("a.jsonl", chat(("user", "a"), ("assitant", "b")), "turn 1 has the unknown role 'assitant'"),
        ("a.jsonl", chat(("human", "a"), ("gpt", "b")), "turn 0 has the unknown role 'human'; write 'user'"),
        ("a.jsonl", fields(prompt=[{"role": "usr", "content": "a"}], completion="b"), "unknown role 'usr'"),
        ("a.jsonl", chat(("user", "a"), ("assistant", "")), "a.jsonl:1: the answer is empty"),
        ("a.jsonl", chat(("user", "a"), ("assistant", " "), ("user", "c"), ("assistant", "d")), "the answer is empty"),
        ("a.jsonl", fields(prompt="a", completion=" \n"), "the answer is empty"),
        ("a.jsonl", fields(prompt="a", completion=2), "expected a string or a list of messages"),
        ("a.jsonl", fields(instruction="a", output=""), UNSUPERVISED),
        ("a.jsonl", spoken(("human", "a"), ("gpt", "")), "the answer is empty"),
        ("a.jsonl", spoken((["human"], "a"), ("gpt", "b")), "unknown speaker ['human']"),
        ("a.jsonl", fields(text="  "), "the text is empty"),
        ("a.csv", "prompt,completion\na,\n", "a.csv:2: the answer is empty"),
        ("a.csv", "prompt,completion,completion\na,b,c\n", "names the column 'completion' twice"),
        ("a.json", '[{"prompt": "a", "completion": "b", "completion": "c"}]', "'completion' is given twice"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b", "prompt": "c"}\n',
            "a.jsonl:1: the key 'prompt' is given twice",
        ),
        ("a.jsonl", chat(("user", "a"), ("assistant", "b"), weight=float("inf")), "finite number of at least 0"),
        ("a.jsonl", fields(prompt="a", completion="b", weight="nan"), "finite number of at least 0"),
        ("a.jsonl", fields(prompt="a", completion="b", weight="-1"), "finite number of at least 0"),
        ("a.jsonl", fields(prompt="a", completion="b", weight=10**400), "finite number of at least 0"),
        ("a.jsonl", fields(prompt="a", completion="b", chat_template_kwargs="x"), "'chat_template_kwargs' holds str"),
    ],
)
def test_records_that_teach_something_else(name: str, content: str, said: str, here: Path, capsys: Any) -> None:
    (here / name).write_text(content)
    assert said in refused(here, capsys, "tune", "plan.yaml", "-q", "-o", "out", f"data.train={name}")


def test_empty_answers_in_tables_of_columns(here: Path, capsys: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "completion": ""}]), here / "a.parquet")
    said = refused(here, capsys, "tune", "plan.yaml", "-q", "-o", "out", "data.train=a.parquet")
    assert "a.parquet#0: the answer is empty" in said


def rows_of(content: str, **settings: Any) -> Any:
    """The data set of one file of records in the working folder."""
    Path("a.jsonl").write_text(content)
    spec = load_plan({"data": {"train": "a.jsonl", "cache": False, **settings}, "delta": "lora"}, methods=False).data
    return prepare(spec, tiny_tokenizer(), kind="causal")


def test_what_is_odd_but_may_be_meant_is_counted(here: Path) -> None:
    good = chat(("user", "a"), ("assistant", "b"))
    empty = chat(("user", "a"), ("assistant", ""))
    assert rows_of(good + empty, unsupervised="drop").ledger.dropped == {"empty answer": 1}
    noted = rows_of(good + chat(("user", " "), ("assistant", "b"), wieght=0)).ledger.notes
    assert noted["a user turn without words"] == 1
    assert noted["key 'wieght' of a turn is not read (did you mean 'weight'?)"] == 2
    noted = rows_of(fields(instruction="a", inptu="b", output="c", answers="d", source="e")).ledger.notes
    assert noted == {
        "column 'inptu' is not used: did you mean 'input'?": 1,
        "column 'answers' is not used: did you mean 'answer'?": 1,
    }


def test_an_answer_that_only_thinks_is_empty_where_thinking_is_not_taught(here: Path) -> None:
    thinking = chat(("user", "a"), ("assistant", "<think>b</think>"))
    assert len(rows_of(thinking).train) == 1
    for how in ("mask", "strip"):
        with pytest.raises(LuthierError, match="the answer is empty"):
            rows_of(thinking, thinking=how)


def test_a_role_of_ones_own_is_stated(here: Path) -> None:
    own = chat(("critic", "a"), ("user", "b"), ("assistant", "c"))
    with pytest.raises(LuthierError, match="must stand in the template or in data.role_weights"):
        rows_of(own)
    assert len(rows_of(own, role_weights={"critic": 0.5}).train) == 1
    template = TEMPLATE.replace("{% for m", "{# 'critic' may speak #}{% for m")
    assert len(rows_of(own, template=template).train) == 1
    with pytest.raises(LuthierError, match="data.role_weights: unknown role 'assitant'; did you mean 'assistant'"):
        rows_of(chat(("user", "b"), ("assistant", "c")), role_weights={"assitant": 0.5})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=true", "train.steps: expected a number, got true"),
        ("train.lr=true", "train.lr: expected a number, got true"),
        ("train.tokens_at_once=true", "expected a number, got true"),
        ("delta.rank=true", "setting 'rank': expected a number, got True"),
        ("data.role_weights={assistant: -1}", "data.role_weights.assistant: must be greater than or equal to 0"),
        ('data.train=""', "data.train: holds an empty text"),
        ('data.train=[""]', "holds an empty text"),
        ('base=""', "base: holds an empty text"),
        ('base.deltas=[""]', "base.deltas: holds an empty text"),
        ('delta.name=" "', "delta.0.name: holds an empty text"),
        ('train.callbacks=[""]', "train.callbacks: holds an empty text"),
        ('push_to=""', "push_to: holds an empty text"),
        ("delta.sites=[]", "delta.0.sites: is empty"),
        ("delta.layers=[]", "delta.0.layers: is empty"),
        ("train.lr", "write it as key=value"),
        ("train.steps=", "there is no value: give one, or null for none"),
        ("train.tokens_at_once=0", "train.tokens_at_once"),
        ("base.revision=x", "is a folder and has no revision 'x'"),
        ("data.train.0.split=nosuch", "files have no split 'nosuch'"),
        ("data.train.0.subset=x", "files have no subset 'x'"),
        ("data.train=base", "is a model's folder"),
        ("data.train=/dev/null", "is no regular file"),
        ("data.template_options={x: 1}", "the chat template reads no 'x'"),
        ("delta.alpha=0", "alpha must not be 0"),
        ("delta.ranks={nope: 4}", "'nope' in ranks or alphas names none of its sites"),
        ("delta.rank=99999", "rank 99999 is more than any of its sites has room for: state one of at most"),
    ],
)
def test_bad_overrides(override: str, said: str, here: Path, capsys: Any) -> None:
    assert said in refused(here, capsys, "tune", "plan.yaml", override, "-q", "-o", "out")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nope.jsonl", "nope.jsonl does not exist"),
        ("{source: good.jsonl, metric: exakt}", "did you mean 'exact'"),
        ("{source: blank.jsonl, metric: loss}", "blank lines only"),
        ("{source: good.jsonl, metric: loss, metric_options: {strict: true}}", "has no options"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_training(
    target: str, said: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "blank.jsonl").write_text("\n\n")
    monkeypatch.setattr("luthier.training.run.train", lambda loop: pytest.fail("a step was taken"))
    arguments = ("tune", "plan.yaml", "audit.enabled=true", f"audit.target=[{target}]", "-q", "-o", "out")
    assert said in refused(here, capsys, *arguments)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (
            "target=[{source: good.jsonl, metric: exct}]",
            "plan.yaml: audit.target.0.metric: no verifier 'exct'; did you",
        ),
        (
            "guards=[good.jsonl, 'practice:fact']",
            "plan.yaml: audit.guards.1.source: data source practice:fact: unknown",
        ),
        ("shifted=[nope.jsonl]", "plan.yaml: audit.shifted.0.source: data file nope.jsonl does not exist"),
        (
            "target=[{source: good.jsonl, metric: exact, metric_options: {x: 1}}]",
            "audit.target.0.metric_options: exact",
        ),
    ],
)
def test_a_wrong_check_of_an_audit_is_named(check: str, said: str, here: Path, capsys: Any) -> None:
    assert said in refused(here, capsys, "audit", "delta", "--plan", "plan.yaml", f"audit.{check}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "plan.yaml", "--out", ""], "--out is empty"),
        (["tune", "plan.yaml", "--out="], "--out is empty"),
        (["tune", "plan.yaml", "-o", " "], "-o is empty"),
        (["tune", ""], "argument 2 is empty"),
        (["audit", "delta", "--plan", ""], "--plan is empty"),
        (["verify", "delta", "--base", ""], "--base is empty"),
        (["export", "delta", "--to", "hf", "--out", ""], "--out is empty"),
        (["generate", "base", "-p", ""], "-p is empty"),
        (["generate", "base", "-p", "x", "-d", ""], "-d is empty"),
        (["merge", "base", "", "-o", "x", "-m", "linear"], "argument 3 is empty"),
        (["demo", "--out", ""], "--out is empty"),
    ],
)
def test_empty_arguments(arguments: list[str], said: str, here: Path, capsys: Any) -> None:
    assert said in refused(here, capsys, *arguments)


def test_a_merged_checkpoint_that_is_not_there(here: Path, capsys: Any) -> None:
    assert "merged: nope is no checkpoint" in refused(here, capsys, "verify", "delta", "--merged", "nope")


EDIT = '{"prompt": "The capital of {}", "subject": "France", "target_new": "Rome"}\n'
AUDIT = ("--plan", "plan.yaml", "audit.enabled=true", "audit.target=[good.jsonl]")


WRITERS = [
    ("export", "delta", "--to", "hf"),
    ("export", "delta", "--to", "peft"),
    ("import", "base"),
    ("compress", "delta"),
    ("merge", "base", "base+delta", "-m", "linear"),
    ("diff", "base", "base"),
    ("port", "delta", "--onto", "base"),
    ("assemble", "--large", "base", "--expert", "delta"),
    ("rebase", "delta", "--onto", "base", *AUDIT),
    ("edit", "base", "edit.jsonl", "-m", "rome"),
    ("audit", "delta", *AUDIT),
    ("gate", "base", "delta", *AUDIT),
]


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("out", ["good.jsonl", "good.jsonl/below"])
def test_a_file_in_the_place_of_the_folder_to_write_is_told_first(
    command: tuple[str, ...], out: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "edit.jsonl").write_text(EDIT)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail("a model was loaded"))
    assert "good.jsonl is no folder that can be written to" in refused(here, capsys, *command, "-o", out)


@pytest.mark.parametrize("command", [c for c in WRITERS if c[0] not in ("audit", "gate")])
def test_nothing_is_written_into_what_is_read(command: tuple[str, ...], here: Path, capsys: Any) -> None:
    (here / "edit.jsonl").write_text(EDIT)
    source = "base" if command[0] == "assemble" else command[1]
    assert f"{source}/in lies in {source}, which is read" in refused(here, capsys, *command, "-o", f"{source}/in")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("chat", "base", "--temperature", "nan"), "no finite number"),
        (("generate", "base", "-p", "x", "-d", "delta", "-d", "./delta"), "is given twice"),
        (("generate", "base", "-f", "both.jsonl"), "both.jsonl:1: has 'prompt' and 'messages'"),
        (("compress", "base", "base", "-o", "x"), "base changes nothing"),
        (("merge", "base@x", "base+delta", "-m", "linear", "-o", "x"), "has no revision 'x'"),
        (("merge", "delta", "delta/", "-m", "task_arithmetic", "-o", "x"), "is named twice"),
        (("merge", "empty.yaml", "-o", "x"), "the plan is empty: state its sections"),
        (("edit", "base", "edit.jsonl", "-m", "rome", "-o", "x"), "it is there, and empty"),
        (("edit", "base", "edit.jsonl", "-m", "rome", "steps=-1", "-o", "x"), "steps must be at least 0, got -1"),
        (("edit", "base", "edit.jsonl", "-m", "locft", "epochs=0", "-o", "x"), "epochs must be at least 1, got 0"),
        (("edit", "base", "edit.jsonl", "-m", "memit", "steps=-3", "-o", "x"), "steps must be at least 0, got -3"),
        (
            ("edit", "base", "edit.jsonl", "-m", "alternative-labels", "batch_size=0", "-o", "x"),
            "batch_size must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_be_meant(command: tuple[str, ...], said: str, here: Path, capsys: Any) -> None:
    (here / "both.jsonl").write_text(fields(prompt="a", messages=[{"role": "user", "content": "b"}]))
    (here / "edit.jsonl").write_text(EDIT.replace("Rome", ""))
    (here / "empty.yaml").write_text("")
    before = state(here)
    with pytest.raises(SystemExit) as left:
        main(list(command))
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and said in lines[-1] and state(here) == before


@pytest.mark.parametrize(
    "command", [("generate", "base", "-p", "x"), ("edit", "base", "edit.jsonl", "-m", "rome", "-o", "x")]
)
def test_a_broken_template_is_told(command: tuple[str, ...], here: Path, capsys: Any) -> None:
    (here / "edit.jsonl").write_text(EDIT)
    (here / "base" / "chat_template.jinja").write_text("{% for %}")
    assert "chat template fails" in refused(here, capsys, *command)


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_finished_delta_is_not_written_over(more: tuple[str, ...], here: Path, capsys: Any) -> None:
    assert "holds a finished delta" in refused(here, capsys, "tune", "plan.yaml", "-q", "-o", "delta", *more)


def test_files_of_others_are_not_written_over(here: Path, capsys: Any) -> None:
    (here / "README.md").write_text("mine")
    assert "holds a README.md that is of no run" in refused(here, capsys, "tune", "plan.yaml", "-q", "-o", ".")


def test_options_that_the_template_reads_are_taken(here: Path) -> None:
    template = TEMPLATE.replace("{% for m", "{% if loud %}!{% endif %}{% for m")
    assert len(rows_of(RECORD, template=template, template_options={"loud": True}).train) == 1
    with pytest.raises(LuthierError, match="reads no 'luod'; did you mean 'loud'"):
        rows_of(RECORD, template=template, template_options={"luod": True})


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
        ('{"messages": [{"role": "usr", "content": "x"}]}\n', "unknown role 'usr'; did you mean 'user'"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "messages.0.content is no text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "nothing that asks for it"),
        ('{"prompt": " "}\n', "no 'prompt' and no 'messages'"),
    ],
)
def test_bad_prompts(content: str, said: str, here: Path, capsys: Any) -> None:
    (here / "ask.jsonl").write_text(content)
    assert said in refused(here, capsys, "generate", "base", "-f", "ask.jsonl")


@pytest.mark.parametrize("name", ["ask.csv", "ask.json"])
def test_tables_are_no_prompts(name: str, here: Path, capsys: Any) -> None:
    (here / name).write_text("prompt\nx\n")
    assert "one a line, or from .jsonl" in refused(here, capsys, "generate", "base", "-f", name)


@pytest.mark.parametrize("heat", ["nan", "inf"])
def test_a_temperature_is_a_number(heat: str, here: Path, capsys: Any) -> None:
    assert "no finite number" in refused(here, capsys, "generate", "base", "-p", "x", "--temperature", heat)


@pytest.mark.parametrize("out", ["base", "good.jsonl", "good.jsonl/below"])
def test_places_that_are_taken(out: str, here: Path, capsys: Any) -> None:
    said = refused(here, capsys, "tune", "plan.yaml", "-q", "-o", out)
    assert "choose another --out" in said
    arguments = (
        "audit",
        "delta",
        "--plan",
        "plan.yaml",
        "audit.target=[good.jsonl]",
        "-o",
        out.replace("base", "delta"),
    )
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
    ("field", "value", "said"),
    [
        ("peft_type", 3, "peft_type 3 has no form here"),
        ("r", "two", "'r' is 'two'"),
        ("r", None, "'r' is 'None'"),
        ("r", 0, "'r' is '0'"),
        ("lora_alpha", "x", "'lora_alpha' is 'x'"),
        ("lora_alpha", 0, "adapter: form 'lora': alpha must not be 0"),
        ("lora_dropout", 7, "dropout must lie in [0, 1)"),
        ("target_modules", 3, "'target_modules' is '3'"),
        ("target_modules", "(*", "'(*', which is no regular expression"),
        ("rank_pattern", {"(*": 3}, "'(*', which is no regular expression"),
        ("rank_pattern", [1], "'rank_pattern' is '[1]'"),
        ("modules_to_save", [3], "'modules_to_save' is '[3]'"),
        ("layers_to_transform", "x", "'layers_to_transform' is 'x'"),
        ("target_parameters", "q_proj.weight", "'target_parameters' is 'q_proj.weight'"),
        ("trainable_token_indices", [-1], "'trainable_token_indices' is '[-1]'"),
        ("base_model_name_or_path", 3, "'base_model_name_or_path' is '3'"),
    ],
)
def test_settings_that_no_adapter_can_have(field: str, value: Any, said: str, here: Path, capsys: Any) -> None:
    folder = here / "adapter"
    folder.mkdir()
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(known | {field: value}))
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.zeros(shape)
        for layer in range(2)
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    assert said in refused(here, capsys, "import", "adapter", "-o", "new", "--base", "base")


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nowhere", "nothing at nowhere"),
        ("delta", "delta is a delta already"),
        ("base", "base holds no adapter_config.json"),
        ("good.jsonl", "good.jsonl holds no adapter_config.json"),
    ],
)
def test_what_is_no_adapter(folder: str, said: str, here: Path, capsys: Any) -> None:
    assert said in refused(here, capsys, "import", folder, "-o", "new")


@pytest.mark.parametrize(
    ("field", "value"), [("name", 3), ("fingerprint", 3), ("kind", None), ("new_tokens", 3), ("labels", [3])]
)
def test_a_delta_that_says_odd_things_of_its_base(field: str, value: Any, here: Path, capsys: Any) -> None:
    path = here / "delta" / "delta.json"
    header = json.loads(path.read_text())
    header["base"][field] = value
    path.write_text(json.dumps(header))
    for command in (("inspect", "delta"), ("verify", "delta"), ("export", "delta", "--to", "peft", "-o", "new")):
        assert f"delta.json: base.{field}" in refused(here, capsys, *command)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_of_a_merged_checkpoint_is_told(index: str, here: Path) -> None:
    (here / "base" / "model.safetensors").rename(here / "weights.safetensors")
    (here / "base" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LuthierError, match=r"model.safetensors.index.json is altered: .*copy it again"):
        index_of(here / "base")


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
