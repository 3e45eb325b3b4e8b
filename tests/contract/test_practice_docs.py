"""docs/practice.md: its worked example becomes a family and keeps every promise, its table and its printed results are true."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.practice import families, world
from luthier.practice.draw import Draw

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


@pytest.fixture
def example(tmp_path: Path) -> Iterator[str]:
    """The page's family, put into the folder of families for one test."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
    with placed(tmp_path, NAME, block):
        yield block


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
