"""Records of every family, drawn by seed, and their verdicts. Pure Python: needs no torch.

A record is ``{"messages": [{"role", "content"}, …], "answer": str, "family": str, "id": str}``, its last message the
assistant's. Record i of a split is a function of family, split, seed, difficulty and i alone.

Every split owns its share of *meanings*: a stable digest of what a task means, whatever its wording, falls into train
(8 of 10), test (1) or shifted (1), so nothing that is tested was trained, in these words or in others.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from types import ModuleType
from typing import Any, cast

from luthier.errors import LuthierError, nearest
from luthier.practice import families as _families
from luthier.practice.contract import LEVELS, Family, Item, Verdict
from luthier.practice.draw import Draw

SPLITS = ("train", "test", "shifted")
BLOCK = 64
"""Records drawn from one seed: ``start`` costs at most this many draws."""
PATIENCE = 5_000
"""Draws without a new test record, or without one that the split owns, after which there are taken to be no more."""

FIRST = ("arithmetic", "facts", "lists", "refusals", "stories", "tracking")
"""The taught families that the tokenizers are made of, and a base's text where its run states no other mixture."""

_SHARE = ("train",) * 8 + ("test", "shifted")
_OWNED = {split: frozenset(b for b in range(256) if _SHARE[b % 10] == split) for split in SPLITS}

Record = dict[str, Any]


@cache
def families() -> tuple[str, ...]:
    """Names of all families, in alphabetical order: the files in ``luthier/practice/families``."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(_families.__path__) if not m.name.startswith("_")))


@cache
def family_named(name: str) -> Family:
    """The family of this name, or one of the user's own by "package:family". Raises LuthierError for an unknown one,
    naming the nearest, and for one whose file lacks what every family's has."""
    if ":" in name:
        found = _own(name)
    elif name in families():
        found = importlib.import_module(f"{_families.__name__}.{name}")
    else:
        raise LuthierError(f"practice world: unknown family {name!r}; {nearest(name, families(), 'familie')}")
    if missing := [part for part in ("ABOUT", "TAUGHT", "make", "verify", "meaning") if not hasattr(found, part)]:
        raise LuthierError(f"practice world: family {name}: {found.__file__} has no {', '.join(missing)}; add it")
    return cast(Family, found)


def _own(name: str) -> ModuleType:
    """The file family.py of the package, or plain folder, that Python finds by the name before the colon."""
    package, _, family = name.partition(":")
    if family in families():
        raise LuthierError(
            f"practice world: family {name}: the world has a {family} of its own; give the file another name"
        )
    if not package or not family:
        raise LuthierError(f"practice world: family {name!r}: write package:family for the file family.py in package/")
    try:
        return importlib.import_module(f"{package}.{family}")
    except ImportError as e:
        raise LuthierError(
            f"practice world: cannot import family {name} ({e}); put the folder that holds {package} on PYTHONPATH"
        ) from e
    except SyntaxError as e:
        raise LuthierError(f"practice world: family {name} is no Python ({e}); correct it") from e


def taught() -> tuple[str, ...]:
    """The families the practice base was trained on."""
    return tuple(name for name in families() if family_named(name).TAUGHT)


def untaught() -> tuple[str, ...]:
    """The families the practice base has never seen."""
    return tuple(name for name in families() if not family_named(name).TAUGHT)


@cache
def drawn_as(name: str) -> str:
    """The name that a family's draws and splits go by: its file's, or its module's ``DRAWN_AS``. Families of one such
    name get the same draws, so that their records stand beside each other one by one and in the same splits."""
    return getattr(family_named(name), "DRAWN_AS", _short(name))


def _short(name: str) -> str:
    """The name of a family's file, wherever that lies: a file that is moved keeps its draws, splits and ids."""
    return name.rpartition(":")[2]


def split_of(name: str, key: str) -> str:
    """The split that owns a meaning."""
    return _SHARE[blake2b(f"{drawn_as(name)}|{key}".encode(), digest_size=2).digest()[0] % 10]


def meaning(record: Record) -> str:
    """What a record means whatever its wording, worked out from its text; ``split_of(family, meaning)`` is its split.
    Raises LuthierError for a record that is not of this world."""
    _checked(record)
    return family_named(record["family"]).meaning(record)


def records(
    family: str,
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
    start: int = 0,
    difficulty: int | None = None,
) -> Iterator[Record]:
    """Records ``start`` to ``start + n`` of a family's split.

    Without ``n``, train never ends, and test and shifted end when they are exhausted. Train may repeat itself; test
    and shifted records are all different. ``difficulty`` is 1, 2 or 3; by default the levels are mixed evenly.
    Raises LuthierError on an unknown family, split or difficulty, a negative size, and on more test records than
    there are.
    """
    _check(family, split, n, seed, start, difficulty)
    drawn = (
        _drawn(family, split, seed, start, difficulty)
        if split == "train"
        else _unrepeated(family, split, seed, start, difficulty)
    )
    return drawn if n is None else _first(drawn, n, f"{family}, split {split}, from {start}")


def preferences(family: str, split: str = "train", n: int = 1) -> Iterator[Record]:
    """n preference records {prompt, chosen, rejected, …}: two answers to each record, as an honest annotator prefers them
    (``oracles.annotators``, where others are)."""
    annotators = importlib.import_module("luthier.practice.oracles.annotators")
    return iter(annotators.pairs(family, n, annotators.Annotator(), split=split))


def verify(record: Record, response: str) -> Verdict:
    """What the record's family says of a response. Raises LuthierError for a record that is not of this world."""
    name, answer, prompt = _checked(record)
    if not isinstance(response, str):
        raise LuthierError(f"practice world: a response is text, got {response!r}")
    family = family_named(name)
    judge = getattr(family, "judge", None)
    return judge(record, response) if judge else family.verify(prompt, answer, response)


def _checked(record: Record) -> tuple[str, str, str]:
    try:
        name, answer, messages = record["family"], record["answer"], record["messages"]
    except KeyError as missing:
        raise LuthierError(
            f"practice world: record {record.get('id', '?')} has no {missing}; take it from records()"
        ) from None
    prompt = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
    if prompt is None:
        raise LuthierError(
            f"practice world: record {record.get('id', '?')} has no user message; take it from records()"
        )
    return name, answer, prompt


def _check(name: str, split: str, n: int | None, seed: int, start: int, difficulty: int | None) -> None:
    family_named(name)
    if split not in SPLITS:
        raise LuthierError(f"practice world: family {name} has no split {split!r}; {nearest(split, SPLITS, 'split')}")
    if difficulty is not None and (isinstance(difficulty, bool) or difficulty not in LEVELS):
        raise LuthierError(f"practice world: family {name} has no difficulty {difficulty!r}; choose 1, 2 or 3")
    for what, value in (("n", n or 0), ("start", start), ("seed", seed)):
        if not isinstance(value, int) or value < 0:
            raise LuthierError(f"practice world: family {name}: {what} is {value!r}; choose a whole number, 0 or more")


def _items(name: str, split: str, seed: int, difficulty: int | None, block: int) -> Iterator[Item]:
    """The accepted items of one block, without end; it ends only where the split owns nothing that the family makes."""
    make, shifted = family_named(name).make, split == "shifted"
    drawn = drawn_as(name)
    prefix, owned = f"{drawn}|", _OWNED[split]
    draw = Draw(f"luthier/{drawn}/{split}/{seed}/{difficulty or 'mixed'}/{block}")
    below = draw.below
    idle = 0
    while idle < PATIENCE:
        item = make(draw, difficulty or 1 + below(3), shifted)
        if blake2b(f"{prefix}{item.key}".encode(), digest_size=2).digest()[0] in owned:  # split_of, without its calls
            idle = 0
            yield item
        else:
            idle += 1


def record_of(name: str, item: Item) -> Record:
    """The record of a family's item."""
    messages = [{"role": "user", "content": item.prompt}]
    if item.after:
        messages += [{"role": role, "content": content} for role, content in item.after]
    messages.append({"role": "assistant", "content": item.response})
    if item.system:
        messages.insert(0, {"role": "system", "content": item.system})
    told = f"{item.key}|{item.prompt}{len(item.after) or ''}"
    digest = blake2b(told.encode(), digest_size=6).hexdigest()
    return {"messages": messages, "answer": item.answer, "family": name, "id": f"{_short(name)}-{digest}"}


def _drawn(name: str, split: str, seed: int, start: int, difficulty: int | None) -> Iterator[Record]:
    block, skip = divmod(start, BLOCK)
    while True:
        items = _items(name, split, seed, difficulty, block)
        for i in range(BLOCK):
            item = next(items, None)
            if item is None:
                raise LuthierError(
                    f"practice world: family {name} makes nothing that split train owns"
                    f"{f' at difficulty {difficulty}' if difficulty else ''}; give it more meanings"
                )
            if i >= skip:
                yield record_of(name, item)
        block, skip = block + 1, 0


def _unrepeated(name: str, split: str, seed: int, start: int, difficulty: int | None) -> Iterator[Record]:
    seen: set[str] = set()
    idle = 0
    for item in _items(name, split, seed, difficulty, 0):
        record = record_of(name, item)
        if record["id"] in seen:
            idle += 1
            if idle > PATIENCE:
                return
            continue
        idle = 0
        seen.add(record["id"])
        if len(seen) > start:
            yield record


def _first(drawn: Iterator[Record], n: int, where: str) -> Iterator[Record]:
    for i in range(n):
        record = next(drawn, None)
        if record is None:
            raise LuthierError(f"practice world: {where}: there are only {i} different records, not {n}; ask for fewer")
        yield record
