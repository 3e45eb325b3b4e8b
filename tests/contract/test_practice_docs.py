"""docs/practice.md: its worked example becomes a family and keeps every promise, its table and its printed results are true."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luthier.data.read import read
from luthier.errors import LuthierError
from luthier.measuring.sources import choose_metric, default_name
from luthier.plan.schema import CheckSpec, SourceSpec
from luthier.practice import families, world
from luthier.practice.draw import Draw
from tests.rooms.test_practice_leakage import drawn_wordings, marks, turned

PAGE = (Path(__file__).parents[2] / "docs" / "practice.md").read_text(encoding="utf-8")
NAME = "earliest"


def forget() -> None:
    for cached in (world.families, world.family_named, world.drawn_as):
        cached.cache_clear()
    importlib.invalidate_caches()


@contextmanager
def placed(folder: Path, name: str, text: str) -> Iterator[None]:
    """A family's file, put beside the families for a while."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    families.__path__.append(str(folder))
    forget()
    try:
        yield
    finally:
        families.__path__.remove(str(folder))
        sys.modules.pop(f"{families.__name__}.{name}", None)
        if hasattr(families, name):
            delattr(families, name)
        forget()


def source(family: str, **more: object) -> SourceSpec:
    return SourceSpec.model_validate({"path": f"practice:{family}", **more})


(BLOCK,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
"""The page's family."""


@pytest.fixture
def example(tmp_path: Path) -> Iterator[str]:
    """The page's family, put into the folder of families for one test."""
    with placed(tmp_path, NAME, BLOCK):
        yield BLOCK


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder their_lab that Python finds, with the page's family in it."""
    (folder := tmp_path / "elsewhere" / "their_lab").mkdir(parents=True)
    (folder / f"{NAME}.py").write_text(BLOCK, encoding="utf-8")
    monkeypatch.syspath_prepend(folder.parent)
    forget()
    yield folder
    for module in [m for m in sys.modules if m.partition(".")[0] == "their_lab"]:
        del sys.modules[module]
    forget()


def test_the_worked_example_is_a_family(example: str) -> None:
    assert len(example.splitlines()) <= 40 and NAME in world.families() and NAME in world.untaught()
    told = {split: list(world.records(NAME, split, 60)) for split in world.SPLITS}
    for split, records in told.items():
        for record in records:
            assert world.verify(record, record["messages"][-1]["content"]).reward == 1
            assert world.verify(record, "a zebra").reward == 0
            assert world.split_of(NAME, world.meaning(record)) == split
    assert not {world.meaning(r) for r in told["train"]} & {world.meaning(r) for r in told["test"]}
    make, draw = world.family_named(NAME).make, Draw("example")
    for level in (1, 2, 3):
        item = make(draw, level, False)
        assert world.meaning(world.record_of(NAME, item)) == item.key and len(item.key.split()) == 1 + level


def test_the_example_is_gone_afterwards() -> None:
    assert NAME not in world.families()


SHIFTED = 'if shifted else "Which comes first"'
MISTAKES = {
    "the prompt": "prompt",
    "what is asked": "f'{asked} {sorted(named)}'",
    "a wording that is drawn": "f'{asked} {sorted(named)}'",
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_key_that_hangs_on_the_wording_is_found(key: str, example: str, tmp_path: Path) -> None:
    (folder := tmp_path / "worded").mkdir()
    assert not marks(NAME) and not [*drawn_wordings(NAME)]
    drawn = 'if draw.below(2) else "Which comes first"' if key == "a wording that is drawn" else SHIFTED
    text = example.replace('" ".join(sorted(named)),', f"{MISTAKES[key]},").replace(SHIFTED, drawn)
    assert (SHIFTED in text) == (drawn == SHIFTED) and MISTAKES[key] in text
    with placed(folder, "worded", text):
        assert marks("worded") or [*drawn_wordings("worded")]


def test_an_answer_of_an_earlier_turn_that_means_something_else_is_found(example: str, tmp_path: Path) -> None:
    """Asked again with one animal more: told of both, and meaning either the first or all of them."""
    (folder := tmp_path / "turns").mkdir()
    later = example.replace(
        'response=f"The {answer}.", answer=answer)',
        'response="The crow.", answer="crow", after=(("assistant", f"The {answer}."), ("user", "And a crow?")))',
    ).replace("words(said(record))", 'words(" ".join(m["content"] for m in record["messages"]{}))')
    assert later.count("{})") == 1
    for name, means, found in (("first", "[:1]", False), ("all", "", True)):
        with placed(folder, name, later.replace("]{})", f"]{means})")):
            assert bool(turned(name, "train", 20)) == found


def test_a_family_of_ones_own_is_named_where_a_family_is(own: Path, tmp_path: Path) -> None:
    name, found = f"their_lab:{NAME}", {}
    for split in world.SPLITS:
        found[split] = list(world.records(name, split, 30))
        for record in found[split]:
            assert record["family"] == name and world.split_of(name, world.meaning(record)) == split
            assert world.verify(record, record["messages"][-1]["content"]).reward == 1
            assert world.verify(record, "").reward == 0
    assert name not in world.families()
    assert [r.fields for r in read(source(name, split="test", limit=30))] == found["test"]
    with placed(tmp_path, NAME, BLOCK):  # moved into the package it makes the same records
        for split, told in found.items():
            assert list(world.records(NAME, split, 30)) == [record | {"family": NAME} for record in told]


def test_another_process_finds_a_family_of_ones_own_by_its_record(own: Path) -> None:
    record = next(world.records(f"their_lab:{NAME}", "shifted"))
    code = f"from luthier.practice import world; r = {record!r}; print(world.verify(r, r['messages'][-1]['content']).reward)"
    run = [sys.executable, "-c", code]
    there = subprocess.run(run, env={"PYTHONPATH": str(own.parent)}, capture_output=True, text=True)
    assert there.stdout == "1.0\n", there.stderr
    gone = subprocess.run(run, env={}, capture_output=True, text=True)
    assert gone.returncode and "put the folder that holds their_lab on PYTHONPATH" in gone.stderr


def test_an_audit_asks_the_verifier_of_a_family_of_ones_own(own: Path) -> None:
    broken = BLOCK.replace('same(f"The {answer}", response)', 'same(f"The {answer}", response.split()[1])')
    (own / "broken.py").write_text(broken, encoding="utf-8")
    for family, reason in ((NAME, "expected"), ("broken", "the verifier failed: IndexError")):
        asked = source(f"their_lab:{family}", split="test", limit=3)
        metric = choose_metric(CheckSpec.model_validate({"source": asked}), "causal", [])
        record = next(read(asked)).fields
        assert metric.name == "practice" and default_name(asked) == f"their_lab:{family}"
        assert metric.verify
        said = metric.verify(record, "cat")
        assert said.reward == 0 and said.reason.startswith(reason) and said.decided == (family == NAME)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("their_lab:tracking", "has a tracking of its own; give the file another name"),
        (
            "their_lab:nought",
            "cannot import family their_lab:nought .*put the folder that holds their_lab on PYTHONPATH",
        ),
        ("no_lab:mine", "No module named 'no_lab'.*put the folder that holds no_lab on PYTHONPATH"),
        ("their_lab:", "write package:family"),
        (":mine", "write package:family"),
        ("their_lab:empty", r"empty\.py has no ABOUT, TAUGHT, make, verify, meaning; add it"),
    ],
)
def test_a_family_of_ones_own_that_cannot_be_is_one_line(name: str, told: str, own: Path) -> None:
    for file in ("tracking", "empty"):
        (own / f"{file}.py").write_text("", encoding="utf-8")
    with pytest.raises(LuthierError, match=told) as error:
        list(read(source(name)))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"data source practice:{name}: ")


def test_a_family_that_lacks_a_part_is_told_which(example: str, tmp_path: Path) -> None:
    (folder := tmp_path / "lacking").mkdir()
    with placed(folder, "halfway", example.split("def meaning")[0].replace("TAUGHT = False", "")):
        with pytest.raises(LuthierError, match=r"family halfway: .*halfway\.py has no TAUGHT, meaning; add it"):
            world.records("halfway", n=1)


def test_a_split_that_owns_nothing_ends_and_is_not_waited_for(example: str, tmp_path: Path) -> None:
    (folder := tmp_path / "narrow").mkdir()
    alike = example.replace("TAUGHT = False", f'TAUGHT, DRAWN_AS = False, "{NAME}"')
    for owner, other in (("test", "train"), ("train", "shifted")):
        key = next(k for k in map(str, range(100)) if world.split_of(NAME, k) == owner)
        with placed(folder, "narrow", alike.replace('key=" ".join(sorted(named))', f'key="{key}"')):
            assert next(world.records("narrow", owner))["family"] == "narrow"
            if other == "train":
                with pytest.raises(LuthierError, match="narrow makes nothing that split train owns at difficulty 2"):
                    next(world.records("narrow", other, difficulty=2))
            else:
                assert list(world.records("narrow", other)) == []
                with pytest.raises(LuthierError, match="only 0 different records, not 2"):
                    list(world.records("narrow", other, 2))


def test_the_table_names_every_family_and_what_it_asks() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| \w+ \| (.*?) \|", PAGE, re.M))
    assert rows == {name: world.family_named(name).ABOUT for name in world.families()}
    assert [t == "yes" for t in re.findall(r"^\| `\w+` \| (yes|never) \|", PAGE, re.M)].count(True) == len(
        world.taught()
    )


def test_the_table_names_every_oracle() -> None:
    from luthier.practice import oracles

    there = {path.stem for path in Path(oracles.__path__[0]).glob("*.py")} - {"__init__"}
    assert (
        set(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", PAGE.split("## Oracles")[1].split("## A claim")[0], re.M)) == there
    )


def test_what_the_page_prints_is_what_is_printed() -> None:
    text = "\n".join(line for line in PAGE.splitlines() if line.startswith("    ") or not line)
    examples = doctest.DocTestParser().get_doctest(text, {}, "practice.md", None, 0)
    assert len(examples.examples) > 20
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0
