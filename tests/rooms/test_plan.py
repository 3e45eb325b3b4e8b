"""Plans: what loads, what overrides reach, and that every mistake is one line that names the key and what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.plan.load import dump_plan, load_plan
from luthier.plan.problems import SYNONYMS, fields
from luthier.plan.schema import DeltaSpec, Plan

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "base": "practice",
    "data": {"train": {"path": "a.jsonl", "limit": 5}},
    "delta": [{"form": "lora", "rank": 8}],
    "train": {"lr": 1e-3},
}


def broken(overrides: list[str], plan: object = None) -> str:
    with pytest.raises(LuthierError) as e:
        load_plan(GOOD if plan is None else plan, overrides)  # type: ignore[arg-type]
    assert "\n" not in str(e.value)
    return str(e.value)


MISTAKES = {
    # override -> what its line must say
    "train.lrr=1": ["train.lrr", "train.lr"],
    "trian.lr=1": ["trian", "'train'"],
    "base.nmae=x": ["base.nmae", "base.name"],
    "data.train.pth=x": ["data.train.0.pth", "data.train.0.path"],
    "audit.target=[{sorce: a}]": ["audit.target.0.sorce", "source"],
    "model_name_or_path=x": ["base.name"],
    "learning_rate=1": ["train.lr"],
    "train.learning_rate=1": ["train.lr"],
    "data.cutoff_len=1": ["data.max_length"],
    "train.per_device_train_batch_size=1": ["train.batch_size"],
    "delta.lora_r=1": ["delta.0.lora_r", "delta.rank"],
    "delta.target_modules=all": ["delta.sites"],
    "delta.rnak=1": ["delta.0.rnak", "rank"],
    "delta.layer=1": ["delta.0.layer", "layers"],
    "delta.learning_rate=1": ["train.lr"],
    "delta.form=loar": ["delta.0", "loar", "lora"],
    "objective=sfft": ["objective", "sfft", "sft"],
    "train.optimiser=adam": ["train.optimiser", "adamw"],
    "lr=1": ["train.lr"],
    "output_dir=x": ["--out"],
    "train.resume_from_checkpoint=x": ["--resume"],
    "train.lr=fast": ["train.lr", "a number", "'fast'"],
    "train.steps=1.5": ["train.steps", "a whole number", "1.5"],
    "train.lr=-1": ["train.lr", "greater than 0", "-1"],
    "train.schedule=cosin": ["train.schedule", "cosine"],
    "base.kind=3": ["base.kind", "causal"],
    "train=7": ["train", "section", "7"],
    "delta=[]": ["delta", "empty"],
    "data.train=[]": ["data.train", "empty"],
    "delta.choice=full": ["delta.0", "exactly one of 'form' and 'choice'"],
    "delta.rank=two": ["delta.0", "rank", "'two'"],
    "delta.rank=-1": ["delta.0", "rank", "-1"],
    "delta.1.rank=2": ["delta.1.rank", "1 entries"],
    "train.lr.x=1": ["train.lr is a value"],
    "no-equals": ["key=value"],
    "=3": ["key=value"],
    "train.lr=[1": ["train.lr", "YAML"],
    "base.name=${LUTHIER_NO_SUCH_VARIABLE}": ["LUTHIER_NO_SUCH_VARIABLE", "base.name"],
    "train.betas=[1]": ["train.betas"],
    "delta.name=a/b": ["delta.0.name", "'a/b'", "letters"],
    "delta.name=.a": ["delta.0.name", "letters"],
    "delta.name=new": ["delta.0.name", "'new'", "choose another"],
    "delta.name=parent0-lora": ["delta.0.name", "choose another"],
    "delta.init=svd": ["delta.0.init", "rank"],
    "data.train.weight=0": ["data.train.0.weight", "greater than 0"],
    "audit.guards=[3]": ["audit.guards.0", "section"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_with_its_key_and_remedy(override: str) -> None:
    line = broken([override])
    for word in MISTAKES[override]:
        assert word in line, line


FILES = {
    "empty": ("", ["is empty"]),
    "comment only": ("# nothing\n", ["is empty"]),
    "a list": ("- a\n- b\n", ["table of sections"]),
    "broken": ("base: practice\ndata: [1, 2\ntrain: {}\n", ["line 3", "YAML"]),
    "tab": ("base:\n\tname: x\n", ["line 2", "YAML"]),
    "twice": ("base: a\nbase: b\n", ["line 2", "'base' is given twice"]),
    "list as key": ("base: x\n? [a, b]\n: 1\n", ["line 2", "cannot be a key"]),
    "table as key": ("{a: 1}: 2\n", ["line 1", "cannot be a key"]),
    "python tag": ("base: !!python/object/apply:os.system [ls]\n", ["line 1", "YAML"]),
    "no data": ("delta: lora\n", ["data is missing", "records"]),
    "no delta": ("data: a.jsonl\n", ["delta is missing"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, words = FILES[name]
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    line = broken([], path)
    assert all(word in line for word in [str(path), *words]), line


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes(b"base: \xff\xfe\n")
    assert "not UTF-8 at byte 6" in broken([], tmp_path / "plan.yaml")
    assert "plan.yaml?" in broken([], tmp_path / "paln.yaml")
    assert "is a folder" in broken([], tmp_path)


def test_overrides_reach_every_kind_of_place() -> None:
    plan = load_plan(
        GOOD | {"audit": {"target": ["practice:facts"]}},
        [
            "train.lr=1e-4", "base.dtype=float32", "data.train.limit=7", "data.train.0.skip=2", "delta.rank=4",
            "delta.0.alpha=9", "objective.smoothing=0.1", "audit.target.max_new_tokens=8", "train.clip=null",
            "data.eval=b.jsonl", "audit.guards=[practice:lists]",
        ],
    )  # fmt: skip
    assert (plan.train.lr, plan.base.name, plan.base.dtype, plan.train.clip) == (1e-4, "practice", "float32", None)
    assert (plan.data.train[0].limit, plan.data.train[0].skip, plan.data.eval[0].path) == (7, 2, "b.jsonl")
    assert plan.delta[0].settings == {"rank": 4, "alpha": 9} and plan.objective.settings == {"smoothing": 0.1}
    check = plan.audit.target[0]
    assert (check.max_new_tokens, check.source.path, check.source.split) == (8, "practice:facts", "test")
    assert plan.audit.guards[0].source.split == "test"


def test_an_entry_must_be_said_where_there_are_several() -> None:
    two = GOOD | {"delta": ["lora", {"form": "lora", "name": "b"}]}
    assert "delta has 2 entries" in broken(["delta.rank=2"], two)
    plan = load_plan(two, ["delta.0.rank=2", "delta.1.rank=3"])
    assert [d.settings["rank"] for d in plan.delta] == [2, 3]


def test_the_source_is_left_as_it_was() -> None:
    source = {"base": "practice", "data": {"train": "a"}, "delta": [{"form": "lora"}]}
    load_plan(source, ["delta.rank=2", "data.train.limit=1"])
    assert source == {"base": "practice", "data": {"train": "a"}, "delta": [{"form": "lora"}]}


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)
    plan = load_plan(GOOD, ["data.train.path=${PLACE}/a", "base.name=${NOWHERE:-there}/b"])
    assert (plan.data.train[0].path, plan.base.name) == ("here/a", "there/b")


@given(st.floats(1e-9, 1e3), st.sampled_from(["{:e}", "{:.3g}", "{!r}"]))
def test_floats_are_numbers_however_they_are_written(value: float, form: str) -> None:
    text = form.format(value)
    assert load_plan(GOOD, [f"train.lr={text}"], methods=False).train.lr == float(text)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.floats(0.1, 5), "steps": st.integers(1, 99), "clip": st.none() | st.floats(0.1, 2),
            "report_to": st.lists(st.sampled_from(["wandb", "mlflow"])), "fsdp": st.booleans(),
            "schedule": st.sampled_from(["constant", "wsd"]),
        },
    )
)  # fmt: skip
def test_a_dumped_plan_is_the_same_plan(train: dict) -> None:
    plan = load_plan(
        GOOD | {"train": train, "delta": [{"form": "lora", "except": ["attn.q"], "rank": 3}]}, methods=False
    )
    assert load_plan(yaml.safe_load(dump_plan(plan)), methods=False) == plan
    assert load_plan(plan, methods=False) == plan


def test_synonyms_name_what_exists() -> None:
    known = {path for path, _ in fields()} | {"delta.rank", "delta.alpha", "delta.dropout"}
    assert len(known) > 100
    assert {key for key in SYNONYMS.values() if key not in known} == set()
    ours = {key.rsplit(".", 1)[-1] for key in known} | {f"{p}" for p in Plan.model_fields}
    assert not set(SYNONYMS) & ours - {"adapter"}
    assert "start_from" in DeltaSpec.model_fields


def test_every_field_is_described() -> None:
    assert [path for path, info in fields() if not info.description] == []


def test_the_reference_is_current() -> None:
    from luthier.plan.reference import PAGE, reference

    assert PAGE.read_text() == reference(), "run: python -m luthier.plan.reference"


def test_a_room_with_a_broken_file_fails_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.delta import Registry

    room = tmp_path / "brokenroom"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "bad.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("form", "brokenroom")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            len(registry)
