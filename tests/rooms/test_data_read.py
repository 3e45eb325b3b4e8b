"""Every kind of file and every shape of record, whole and broken."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import read as reading
from luthier.data.files import READERS
from luthier.data.prepare import prepare
from luthier.data.read import Cursor, read
from luthier.data.records import SHAPES, example, recognise
from luthier.errors import LuthierError
from luthier.plan.schema import SourceSpec
from tests.rooms.test_data_kit import PLAIN, spec, taught, tokenizer, written

DATA = Path(os.environ.get("LUTHIER_DATA", "../shared/data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real records at LUTHIER_DATA ({DATA})")
ROWS = [{"prompt": f"two {i}?", "completion": f"four é {i}"} for i in range(5)]


def source(path: Any, **settings: Any) -> SourceSpec:
    return SourceSpec.model_validate({"path": str(path), **settings})


def write_as(suffix: str, folder: Path) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        pq.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as f:
            out = csv.DictWriter(f, list(ROWS[0]), delimiter="," if suffix == ".csv" else "\t")
            out.writeheader()
            out.writerows(ROWS)
    elif suffix == ".txt":
        path.write_text("".join(f"{r['prompt']} => {r['completion']}\n\n" for r in ROWS), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", sorted(READERS))
def test_every_suffix_reads_resumes_and_counts(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path = write_as(suffix, tmp_path)
    if zipped:
        if suffix == ".parquet":
            pytest.skip("Parquet compresses by itself")
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = packed
    one = source(path, pattern="(?P<prompt>.*) => (?P<completion>.*)" if suffix == ".txt" else None)
    found = list(read(one))
    assert [r.fields for r in found] == ROWS
    for i, record in enumerate(found[:-1]):
        rest = list(read(one, record.after))
        assert [(r.fields, r.where, r.after) for r in rest] == [(r.fields, r.where, r.after) for r in found[i + 1 :]]
    assert reading.open_source(one).count() == 5
    assert [r.fields for r in read(one.model_copy(update={"skip": 1, "limit": 2}))] == ROWS[1:3]
    assert list(read(one.model_copy(update={"skip": 1, "limit": 2}), found[1].after))[0].fields == ROWS[2]


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    where = [r.where.rpartition(":")[2] for r in read(source(write_as(".jsonl", tmp_path)))]
    assert where == ["1", "3", "5", "7", "9"]


def test_text_without_a_pattern_is_a_record_for_each_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\nsat\n \n\non a mat\n")
    found = list(read(source(tmp_path / "a.txt")))
    assert [(r.fields["text"], r.where[-1]) for r in found] == [("the cat\nsat", "1"), ("on a mat", "5")]
    assert [r.fields["text"] for r in read(source(tmp_path / "a.txt"), found[0].after)] == ["on a mat"]


def test_globs_folders_and_files_in_order(tmp_path: Path) -> None:
    for name, records in (("b.jsonl", ROWS[2:]), ("a.jsonl", ROWS[:2])):
        written(tmp_path, records, name)
    (tmp_path / "notes.md").write_text("not data")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        found = list(read(source(path)))
        assert [r.fields for r in found] == ROWS
        assert [r.fields for r in read(source(path), found[2].after)] == ROWS[3:]
        assert found[2].after.file == 1


def laid_out(folder: Path, names: str, readme: str = "") -> Path:
    """A folder of files whose one record says its own name."""
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        written((folder / name).parent, [{"text": name}], Path(name).name)
    if readme:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def texts(path: Path, **settings: Any) -> list[str]:
    return [r.fields["text"] for r in read(source(path, **settings))]


HUB = "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl data/test-00000-of-00001.jsonl"
NAMED: dict[str, tuple[str, str, dict[str, str]]] = {
    "the hub's layout": (HUB, "# A set\n", {"train": HUB.rpartition(" ")[0], "test": HUB.rpartition(" ")[2]}),
    "words in names": (
        "train.jsonl my-valid_2.jsonl Test.jsonl latest.jsonl",
        "",
        {"train": "train.jsonl", "validation": "my-valid_2.jsonl", "dev": "my-valid_2.jsonl", "test": "Test.jsonl"},
    ),
    "folders": (
        "train/a.jsonl train/b.jsonl dev/a.jsonl",
        "",
        {"train": "train/a.jsonl train/b.jsonl", "dev": "dev/a.jsonl"},
    ),
    "the name before the folder": (
        "train/eval.jsonl train/a.jsonl",
        "",
        {"train": "train/a.jsonl", "eval": "train/eval.jsonl"},
    ),
    "a word of its own": ("eval.jsonl test.jsonl", "", {"eval": "eval.jsonl", "test": "test.jsonl"}),
    "parts of another name": (
        "train_sft-00000-of-00001.jsonl test_sft-00000-of-00001.jsonl",
        "",
        {"train_sft": "train_sft-00000-of-00001.jsonl"},
    ),
    "README.md": (
        "a.jsonl b/c.jsonl train.jsonl",
        "---\nconfigs:\n- config_name: x\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        "  - {split: held, path: ['b/*', 'nope*']}\n---\n",
        {"train": "a.jsonl", "held": "b/c.jsonl"},
    ),
    "README.md without splits": (
        "a.jsonl b.jsonl",
        "---\nconfigs: [{data_files: b.jsonl}]\n---\n",
        {"train": "b.jsonl"},
    ),
    "README.md of other things": ("a.jsonl b.jsonl", "---\nlicense: mit\n---\n", {"train": "a.jsonl b.jsonl"}),
    "no split in any name": (
        "a.jsonl contest.jsonl",
        "",
        {"train": "a.jsonl contest.jsonl", "test": "a.jsonl contest.jsonl"},
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_folder_is_read_by_split(case: str, tmp_path: Path) -> None:
    names, readme, splits = NAMED[case]
    laid_out(tmp_path, names, readme)
    for split, wanted in splits.items():
        assert texts(tmp_path, split=split) == wanted.split()
    assert len(texts(tmp_path / "**/*.jsonl")) == len(names.split())


def test_subsets_that_readme_states(tmp_path: Path) -> None:
    head = "---\nconfigs:\n- {config_name: x, data_files: {train: x.jsonl}}\n- {config_name: y, data_dir: y}\n"
    laid_out(tmp_path, "x.jsonl y/a.jsonl z.jsonl", head + "---\n")
    assert texts(tmp_path, subset="x") == ["x.jsonl"] and texts(tmp_path, subset="y") == ["y/a.jsonl"]
    with pytest.raises(LuthierError, match="holds several subsets, state one; subsets: x, y$"):
        texts(tmp_path)
    with pytest.raises(LuthierError, match="has no subset 'z'; subsets: x, y$"):
        texts(tmp_path, subset="z")
    laid_out(tmp_path, "x.jsonl", head + "- {config_name: z, data_files: z.jsonl, default: true}\n---\n")
    assert texts(tmp_path) == ["z.jsonl"]


@pytest.mark.parametrize(
    ("names", "readme", "settings", "said"),
    [
        ("test.jsonl dev.jsonl", "", {}, "has no split 'train'; splits: dev, test; a glob reads"),
        ("train_sft-00000-of-00001.jsonl", "", {}, "has no split 'train'; did you mean 'train_sft'"),
        ("train.jsonl valid.jsonl dev.jsonl", "", {"split": "val"}, "has no split 'val'; did you mean 'valid'"),
        ("train.jsonl", "", {"split": "test"}, "has no split 'test'; splits: train"),
        ("train.jsonl", "", {"subset": "x"}, "files have no subset 'x'"),
        ("a.jsonl", "", {"split": "valid"}, "files have no split 'valid'"),
        ("a.jsonl", "---\nconfigs: [{data_files: {test: a.jsonl}}]\n---\n", {}, "has no split 'train'; splits: test"),
        ("a.jsonl", "---\nconfigs: [{data_files: {train: b*}}]\n---\n", {}, "no file that can be read matches"),
        ("a.jsonl", "---\nconfigs: [{data_files: [3]}]\n---\n", {}, "must be paths, or tables of split and path"),
        ("a.jsonl", "---\nconfigs: x\n---\n", {}, "'configs' must be a list"),
        ("a.jsonl", "---\nconfigs: [\n---\n", {}, "its head cannot be read"),
    ],
)
def test_splits_that_are_not_there(names: str, readme: str, settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=re.escape(said)) as e:
        texts(laid_out(tmp_path, names, readme), **settings)
    assert "\n" not in str(e.value)


def test_a_folder_of_the_hub_trains_on_its_own_split(tmp_path: Path) -> None:
    pq, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        pq.write_table(arrow.Table.from_pylist([{"text": name}]), tmp_path / f"data/{name}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("# A set\n")
    data = prepare(spec(str(tmp_path)), tokenizer())
    assert data.ledger.read == 1 and data.train[0].where.startswith(str(tmp_path / "data/train-"))


def test_columns_constants_and_their_mistakes(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": "two?", "answer": "four"}])
    mapped = source(path, columns={"prompt": "question", "completion": "answer"}, constants={"system": "be a cat"})
    assert next(read(mapped)).fields == {"prompt": "two?", "completion": "four", "system": "be a cat"}
    with pytest.raises(LuthierError, match="no column 'qestion' for 'prompt'; did you mean 'question'"):
        next(read(source(path, columns={"prompt": "qestion"})))
    with pytest.raises(LuthierError, match=re.escape("columns: {prompt: question, completion: answer}")):
        prepare(spec(path), tokenizer())


BROKEN = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "blank lines only"),
    "cut.jsonl": (
        b'{"text": "a"}\n\n{"text": "b\n',
        r"cut.jsonl:3: broken JSON, Unterminated string starting at column 10",
    ),
    "short.jsonl": (b'{"text": "a"}\n{"text": "b",  \r\n', r"short.jsonl:2: broken JSON, .* at column 14"),
    "short.json": (b'[{"text": "a"},\n {"text":\n', r"short.json:2: broken JSON, Expecting value at column 10"),
    "columns.json": (
        b'{"prompt": ["a", "b"], "completion": ["c", "d"]}',
        r'holds the columns completion, prompt, not records: write one record a line, {"prompt": …, "completion": …}',
    ),
    "pandas.json": (b'{"prompt": {"0": "a"}, "completion": {"0": "c"}}', "holds the columns completion, prompt"),
    "column.json": (b'{"text": ["a"]}', "holds the columns text, not records"),
    "parts.json": (b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "write the array under 'train' alone"),
    "several.csv": (b'text,label\n"a\nb\nc",1\n\n"d\ne"\n"f",2\n', r"several.csv:6: 1 cells where the header has 2"),
    "open.csv": (b'text,label\na,1\n"b\nc\nd,1\n', r"open.csv:3: broken table"),
    "semicolon.csv": (b"prompt;completion\na, b;c\n", r"semicolon.csv:2: 2 cells .*separated by ';'"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', r"list.jsonl:2: a record must be an object"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin.jsonl:2: not UTF-8 at byte 24 .*0xe9"),
    "latin.csv": (b"text\na\n\xe9\n", r"latin.csv:3: not UTF-8 at byte 7"),
    "wrapped.json": (b'{"data": [{"text": "a"}]}', r"one object with the keys data, not.*array under 'data'"),
    "cut.json": (b'[{"text": "a"},\n {"text": }]', r"cut.json:2: broken JSON"),
    "empty.json": (b"[]", "empty array"),
    "cells.csv": (b"text,label\na,1\nb\n", r"cells.csv:3: 1 cells where the header has 2"),
    "blank.csv": (b"\n  \n", "blank.csv is empty"),
    "quote.csv": (b'text\n"a\n', r"quote.csv:2: broken table"),
    "no.parquet": (b"PAR1 nothing", "is no Parquet file"),
    "bad.jsonl.gz": (b"\x1f\x8b\x08 broken", "broken compressed file"),
    "model.pkl": (b"\x80\x04", r"cannot read .pkl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_with_the_place(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LuthierError, match=message) as e:
        list(read(source(tmp_path / name)))
    assert "\n" not in str(e.value)


TABLES = {
    "plain": b"a,b\n1,2\n3,4\n",
    "windows": b"a,b\r\n1,2\r\n3,4\r\n",
    "carriage returns": b"a,b\r1,2\r3,4\r",
    "byte order mark": b"\xef\xbb\xbfa,b\n1,2\n3,4",
    "blank lines": b"\na,b\n\n1,2\n\n3,4\n\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_line_end_read_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(TABLES[name])
    rows = list(READERS[".csv"].rows(tmp_path / "a.csv", 0, 0, None))
    assert [r.fields for r in rows] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert [r.fields for r in READERS[".csv"].rows(tmp_path / "a.csv", 1, 0, None)] == [{"a": "3", "b": "4"}]


def test_cells_keep_the_line_ends_within_them(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes('a\tb\n"1\n2\r\n3\r4"\té\n5\t6\n'.encode())
    rows = list(READERS[".tsv"].rows(tmp_path / "a.tsv", 0, 0, None))
    assert [r.fields for r in rows] == [{"a": "1\n2\r\n3\r4", "b": "é"}, {"a": "5", "b": "6"}]
    assert READERS[".tsv"].count(tmp_path / "a.tsv", None) == 2


def test_a_large_table_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + f"{'x' * 200},{'y' * 200}\n" * 10_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in READERS[".csv"].rows(path, 0, 0, None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 10_000 and path.stat().st_size > 4e6 and peak < 5e5


def test_missing_things_name_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, ROWS, "train.jsonl")
    with pytest.raises(LuthierError, match="does not exist: did you mean 'train.jsonl'"):
        list(read(source(tmp_path / "trian.jsonl")))
    with pytest.raises(LuthierError, match="no file matches"):
        list(read(source(tmp_path / "*.csv")))
    with pytest.raises(LuthierError, match="unknown scheme 'practise'; did you mean 'practice'"):
        list(read(source("practise:facts")))
    with pytest.raises(LuthierError, match="no record in"):
        list(read(source(tmp_path / "train.jsonl", skip=9)))
    with pytest.raises(LuthierError, match="names no column"):
        list(read(source(tmp_path / "train.jsonl", pattern=".*")))


def test_a_hub_name_offline_is_one_quick_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(reading, "reachable", lambda: False)
    with pytest.raises(LuthierError, match=r"openai/gsm8k is no file or folder here, and the hub .* cannot be reached"):
        list(read(source("openai/gsm8k")))


def test_a_saved_dataset_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "d"))
    found = list(read(source(tmp_path / "d")))
    assert [r.fields for r in found] == ROWS and found[1].where.endswith("#1")
    assert [r.fields for r in read(source(tmp_path / "d"), Cursor(0, 3, 0))] == ROWS[3:]
    assert len(list(read(source(tmp_path / "d", split="test")))) == 1
    with pytest.raises(LuthierError, match="no split 'valid'"):
        list(read(source(tmp_path / "d", split="valid")))


FOUR = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": FOUR}, {"messages": json.dumps(FOUR)}, {"messages": FOUR, "system": "be a cat"}],
    "prompt-completion": [
        {"prompt": "two?", "completion": "four"},
        {"prompt": FOUR[:1], "completion": FOUR[1:]},
        {"prompt": FOUR + FOUR[:1], "completion": "four", "answer": 4},
    ],
    "alpaca": [
        {"instruction": "two?", "output": "four"},
        {"instruction": "add", "input": "2 2", "output": "four", "system": "be a cat"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "four"}], "system": "be a cat"},
        {
            "conversations": [
                {"from": "human", "value": "two?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "four"},
            ],
            "tools": '[{"name": "add"}]',
        },
    ],
    "text": [{"text": "four"}],
    "labelled": [{"text": "four", "label": 1}],
    "chosen-rejected": [
        {"prompt": "two?", "chosen": "four", "rejected": "the cat"},
        {"prompt": FOUR[:1], "chosen": FOUR[1:], "rejected": [{"role": "assistant", "content": "sat"}]},
        {"chosen": FOUR, "rejected": [FOUR[0], {"role": "assistant", "content": "sat"}]},
        {"instruction": "add", "input": "2 2", "chosen": "four", "rejected": "the cat"},
    ],
}


def test_a_record_of_every_shape_is_covered() -> None:
    assert set(RECORDS) == set(SHAPES)


@pytest.mark.parametrize("shape", RECORDS)
def test_every_shape_is_recognised_and_trains_the_answer(shape: str, tmp_path: Path) -> None:
    tok = tokenizer()
    kind = {"labelled": "classify", "chosen-rejected": "pair"}.get(shape, "causal")
    data = prepare(spec(written(tmp_path, RECORDS[shape])), tok, kind=kind)
    assert data.ledger.formats == {shape: len(RECORDS[shape])} and len(data.train) == len(RECORDS[shape])
    for i in range(len(data.train)):
        row = data.train[i]
        assert row.where.endswith(f"data.jsonl:{i + 1}")
        if kind == "classify":
            assert row.label == 1 and row.supervised == 1
        else:
            assert taught(row, tok).endswith("four<|end|>") and row.eot
        if kind == "pair":
            assert tok.decode(row.second).rstrip().endswith(("the cat<|end|>", "sat<|end|>"))


def test_what_shapes_become() -> None:
    def one(record: dict[str, Any]) -> Any:
        found = reading.Record(record, "here", Cursor())
        return example(found, recognise(record, "here"))

    assert [m["role"] for m in one(RECORDS["sharegpt"][1]).messages] == ["user", "assistant", "tool", "assistant"]
    assert one(RECORDS["prompt-completion"][2]).weights == [None, 0.0, None, None]
    assert one(RECORDS["prompt-completion"][2]).answer == "4"
    assert one({"text": "a", "label": "b", "id": 3}).extra == {"id": 3}
    history = {"instruction": "two?", "output": "four", "history": [["a", "b"]]}
    assert [m["content"] for m in one(history).messages] == ["a", "b", "two?", "four"]
    assert one({"messages": FOUR, "weight": 0.5}).weight == 0.5


WRONG = [
    ({"text": 3}, r"data.jsonl:1: column 'text' holds int \(3\), expected a string"),
    ({"messages": "hello"}, "column 'messages' holds str"),
    ({"messages": [{"content": "a"}]}, r"column 'messages\[0\]' holds dict .* 'role'"),
    ({"messages": [{"role": "assistant"}]}, r"messages\[0\].content' holds nothing"),
    ({"messages": []}, "empty conversation"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "list of text parts"),
    ({"conversations": [{"from": "humn", "value": "a"}]}, "unknown speaker 'humn'; did you mean 'human'"),
    ({"conversations": [{"from": "function_call", "value": "{"}]}, "function call of broken JSON"),
    ({"instruction": "a", "output": None}, r"no 'output' for a alpaca record"),
    ({"prompt": "a", "completion": 4}, "column 'completion' holds int"),
    ({"foo": 1, "bar": 2}, "columns foo, bar are no known record shape"),
    ({"text": "a", "weight": -1}, "column 'weight' holds int"),
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_wrong_records_name_file_line_and_column(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=message):
        prepare(spec(written(tmp_path, [record])), tokenizer())


def test_a_record_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\ntext\n"a\nb"\n\n"c\r\nd"\ne\n')
    assert [r.where.rpartition(":")[2] for r in read(source(tmp_path / "a.csv"))] == ["3", "6", "8"]


TURNS = [{"role": "user", "content": "two?"}]
SPOKEN = [{"from": "human", "value": "two?"}]
HINTS = [
    ({"prompt": "a", "response": "b"}, "state columns: {completion: response}"),
    ({"query": "a", "completion": "b"}, "state columns: {prompt: query}"),
    ({"instruction": "a", "response": "b"}, "state columns: {prompt: instruction, completion: response}"),
    ({"conversation": TURNS}, "state columns: {messages: conversation}"),
    ({"id": 1, "dialog": json.dumps(TURNS)}, "state columns: {messages: dialog}"),
    ({"dialogue": SPOKEN}, "state columns: {conversations: dialogue}"),
    ({"conversations": TURNS}, "for turns with a role, state columns: {messages: conversations}"),
    ({"messages": SPOKEN}, "for turns with from and value, state columns: {conversations: messages}"),
    ({"prompt;completion": "a;b"}, "its cells seem to be separated by ';'"),
    ({"prompt": "a", "foo": "b"}, "map them with columns: {ours: theirs}"),
]


@pytest.mark.parametrize(("record", "hint"), HINTS)
def test_the_mapping_that_is_meant_is_proposed(record: dict[str, Any], hint: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=re.escape(hint)) as e:
        prepare(spec(written(tmp_path, [record])), tokenizer())
    if "state columns" in hint:
        path = written(tmp_path, [record])
        columns = dict(pair.split(": ") for pair in re.findall(r"{(.*?)}", str(e.value))[-1].split(", "))
        assert recognise(next(iter(read(source(path, columns=columns)))).fields, path)


def labelled(labels: list[Any], **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": "two?", "completion": f"four {i}", "label": label, **more} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ([True, False, False, True], [0, 3]),
        ([1, 0, 1], [0, 2]),
        (["True", "false", "1"], [0, 2]),
        ([1, 0, 2], [0, 1, 2]),
        (["spam", "ham"], [0, 1]),
        ([0, None], [0, 1]),
        ([None, False], [0]),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_answers_labelled_false_are_left_out_with_a_note(
    labels: list[Any], kept: list[int], streamed: bool, tmp_path: Path
) -> None:
    tok = tokenizer()
    data = prepare(spec(written(tmp_path, labelled(labels)), stream=streamed), tok)
    rows = data.window if streamed else [data.train[i] for i in range(len(data.train))]
    assert [taught(row, tok) for row in rows] == [f"four {i}<|end|>" for i in kept]
    out = len(labels) - len(kept)
    assert data.ledger.dropped == ({"labelled false": out} if out else {})
    assert [n for t, n in data.ledger.notes.items() if "labelled false are left out" in t] == ([out] if out else [])
    assert ("label" in data.ledger.unused_columns) == (not out or None in labels)


def test_labels_can_be_taken_away_and_false_ones_alone_train_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, labelled([True, False]))
    data = prepare(spec([{"path": path, "constants": {"label": None}}]), tokenizer())
    assert len(data.train) == 2 and not data.ledger.dropped
    with pytest.raises(LuthierError, match="no row is left of .*labelled false': 2"):
        prepare(spec(written(tmp_path, labelled([False, False]))), tokenizer())
    with pytest.raises(LuthierError, match="give chosen and rejected"):
        prepare(spec(written(tmp_path, labelled([True, False]))), tokenizer(), kind="pair")


def test_mixed_columns_name_what_is_there_and_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        LuthierError, match=r"data.jsonl:2: no 'completion' and no 'prompt' for a prompt-completion record; it has text"
    ):
        prepare(spec(written(tmp_path, [ROWS[0], {"text": "a"}])), tokenizer())
    path = written(tmp_path, [{"text": "a", "prompt": "two?", "completion": "four", "id": 1}])
    data = prepare(spec([{"path": path, "format": "text"}]), tokenizer())
    assert data.ledger.unused_columns == {"prompt": 1, "completion": 1, "id": 1} and data.ledger.formats == {"text": 1}


def test_limit_skip_weight_and_order_of_sources(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS)
    data = prepare(spec([{"path": path, "skip": 3}, {"path": path, "limit": 1, "weight": 2.0}]), tokenizer())
    assert [data.train[i].where[-1] for i in range(3)] == ["4", "5", "1"]
    assert [float(data.train[i].weights.max()) for i in range(3)] == [1, 1, 2]


@pytest.mark.skipif(
    importlib.util.find_spec("luthier.practice.world") is None, reason="the practice world is not there"
)
def test_practice_families_take_turns() -> None:
    from luthier.practice import world

    names = world.families()[:2]
    found = list(read(source(f"practice:{','.join(names)}", limit=6, split="test")))
    assert [r.fields["family"] for r in found] == [*names] * 3
    assert found == list(read(source(f"practice:{','.join(names)}", limit=6, split="test")))
    data = prepare(spec([{"path": f"practice:{names[0]}", "limit": 4}]), tokenizer())
    assert len(data.train) == 4
    with pytest.raises(LuthierError):
        list(read(source("practice:no such family")))


@real
def test_real_files_of_every_kind() -> None:
    tok = tokenizer(PLAIN)
    qa = {"columns": {"prompt": "question", "completion": "answer"}}
    scan = {"pattern": "IN: (?P<prompt>.*) OUT: (?P<completion>.*)"}
    sources: dict[str, dict[str, Any]] = {
        "gsm8k/train.jsonl": {**qa, "limit": 50},
        "scan/tasks_train_simple.txt": {**scan, "limit": 50},
        "instructions/instruction-data.json": {"limit": 50},
        "arithmetic/train.json": {"limit": 50},
        "commonsense/openbookqa.test.json": {"limit": 50},
        "text/tinyshakespeare.txt": {"limit": 50},
        "text/wikitext-2.test.txt": {"limit": 50},
        "code/mbpp.jsonl": {"columns": {"prompt": "text", "completion": "code"}, "limit": 50},
    }
    for name, settings in sources.items():
        data = prepare(spec([{"path": str(DATA / name), **settings}], max_length=4096), tok)
        assert data.ledger.kept == 50 and data.ledger.to_dict()["end_of_turn"]["share"] == 1, name
    pairs = prepare(spec([{"path": str(DATA / "instructions/preferences.json"), "limit": 20}]), tok, kind="pair")
    assert pairs.train[0].second is not None and np.any(pairs.train[0].second_weights)
    assert sum(1 for _ in read(source(DATA / "scan/tasks_train_simple.txt", **scan))) == 16728
    assert sum(1 for _ in read(source(DATA / "gsm8k/train.jsonl"))) == 7473
