"""No test record, nor its meaning, stands in a train split: searched for by meaning and, with other means, by n-grams."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice

import pytest

from luthier.errors import LuthierError
from luthier.practice import draw as drawing
from luthier.practice import words as vocabulary
from luthier.practice import world
from luthier.practice.contract import Item, said, words
from luthier.practice.draw import Draw
from luthier.practice.families._store import House

FAMILIES = world.families()
SLOW = ("countdown", "errands", "tagging", "ledgers", "repairs")
WORDED = ("facts", "newcomers", "recall")
"""Families in which a meaning is a fact in one wording, because an invented fact that was never told cannot be known."""
JOINED = ("translate", "kellish", "norrish", "ossan")
"""Families whose shifted tasks are two sentences joined by and, which no plain task is."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meaning_read_from_the_text_is_the_generators_own(family):
    """``meaning`` sees the record only. That it gives back the key on which splits are drawn shows that the key is in
    the record and says all of it, in every wording."""
    make, draw = world.family_named(family).make, Draw(f"meaning/{family}")
    for i in range(60 if family in SLOW else 240):
        item = make(draw, 1 + i % 3, bool(i % 2))
        assert world.meaning(world.record_of(family, item)) == item.key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_records_meaning_falls_into_its_own_split(family):
    seen: dict[str, set[str]] = {}
    for split in world.SPLITS:
        told = islice(world.records(family, split), 60 if family in SLOW else 240)
        seen[split] = {world.meaning(record) for record in told}
        assert {world.split_of(family, meaning) for meaning in seen[split]} == {split}
    assert not seen["train"] & (seen["test"] | seen["shifted"])


class Traced(Draw):
    """A draw that notes which line of the family asked for each of its values, and gives another value once."""

    __slots__ = ("asked_by", "at", "other", "plain")

    def __init__(self, seed: str, at: int = -1, other: float = 0.0) -> None:
        super().__init__(seed)
        self.plain, self.at, self.other = self.real, at, other
        self.asked_by: list[tuple[str, int]] = []
        self.real = self._real

    def _real(self) -> float:
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename == drawing.__file__:
            frame = frame.f_back
        self.asked_by.append((f"{frame.f_code.co_filename}:{frame.f_lineno}", frame.f_lasti))
        value = self.plain()
        return self.other if len(self.asked_by) - 1 == self.at else value


_LISTED = {
    word.lower()
    for name, listed in vars(vocabulary).items()
    if isinstance(listed, list) and name != "SYLLABLES"  # of which "for" is one
    for word in listed
}


def _told(item: Item) -> list[str]:
    """The numbers and the world's own words in a task, which no wording changes."""
    text = " ".join([item.prompt, *(content for _, content in item.after)])
    return [w for w in words(text) if w.isdigit() or w in _LISTED]


def drawn_wordings(family: str, n: int = 900) -> Iterator[str]:
    """Lines of a family that draw nothing but a wording and yet change the key: in n tasks one draw each is changed, and
    of 20 and more changes of a line's draw none gave another answer."""
    make, chosen = world.family_named(family).make, Draw(f"wording/{family}")
    answers, keys = defaultdict(list), defaultdict(list)
    for i in range(n):
        level, shifted = 1 + i % 3, bool(i // 3 % 2)
        first = make(traced := Traced(f"wording/{family}/{i}"), level, shifted)
        line = chosen.pick(list(dict.fromkeys(traced.asked_by)))
        at = chosen.pick([k for k, asker in enumerate(traced.asked_by) if asker == line])
        again = make(Traced(f"wording/{family}/{i}", at, chosen.real()), level, shifted)
        if (first.prompt, first.after) != (again.prompt, again.after):
            answers[line].append(first.answer != again.answer)
            if first.key != again.key and first.answer == again.answer and _told(first) == _told(again):
                keys[line].append(f"{line[0]}: {first.key!r} and {again.key!r}")
    yield from (found[0] for line, found in keys.items() if len(answers[line]) >= 20 and not any(answers[line]))


def marks(family: str, n: int = 900) -> set[str]:
    """Words that often stand in the keys of shifted tasks and in none of plain ones, or the other way round."""
    make = world.family_named(family).make
    found = []
    for shifted in (False, True):
        draw = Draw(f"marks/{family}/{shifted}")
        found.append(
            Counter(w for i in range(n) for w in set(re.findall("[A-Za-z]+", make(draw, 1 + i % 3, shifted).key)))
        )
    return {w for a, b in (found, found[::-1]) for w, times in a.items() if times > n / 20 and w not in b}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WORDED])
def test_no_wording_makes_another_meaning(family):
    """A key that says how something is asked for puts one task into two splits. Seen from the draws, and from words that
    tell shifted keys from plain ones."""
    n = 300 if family in SLOW else 900
    assert not [*drawn_wordings(family, n)]
    assert marks(family, n) == ({"and"} if family in JOINED else set())


@pytest.mark.parametrize("family", WORDED)
def test_wordings_that_are_meanings_are_seen(family):
    assert [*drawn_wordings(family)]


def turned(family: str, split: str, n: int) -> list[str]:
    """Answers that an earlier turn of n records holds, though they mean something else than the record does."""
    found = []
    for record in islice(world.records(family, split), n):
        for at, message in enumerate(record["messages"][:-1]):
            if message["role"] == "assistant":
                cut = record | {"messages": record["messages"][: at + 1], "answer": message["content"]}
                found += [message["content"]] if world.meaning(cut) != world.meaning(record) else []
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_a_conversation_means_what_the_whole_does(family):
    """A record holds the turns before it. Had they meanings of their own, what one record tells another split would test."""
    assert not [answer for split in world.SPLITS for answer in turned(family, split, 60)]


@pytest.mark.parametrize("family", [f for f in world.untaught() if f != "newcomers"])
def test_enough_test_pairs(family):
    """2,000 in every family but facts and newcomers. Of the slow ones not all are drawn."""
    n = 200 if family in SLOW else 2000
    assert len({r["id"] for r in world.records(family, "test", n)}) == n


def grams(record, n: int = 13) -> set[tuple[str, ...]]:
    """All runs of n words and signs of what is asked and answered; all of it where it is shorter."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(m["content"] for m in record["messages"] if m["role"] != "system"))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or {tuple(words)}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_test_record_is_patched_together_from_train_records(family):
    """By other means than meanings: no test record has all its runs of 13 words in 20 times as many train records."""
    n = 15 if family in SLOW else 60
    trained = list(world.records(family, "train", 20 * n, seed=5))
    seen = set().union(*map(grams, trained))
    for split in ("test", "shifted"):
        assert not [r for r in world.records(family, split, n) if grams(r) <= seen]
    assert grams(trained[0]) <= seen


def _list_question(record) -> tuple[str, ...]:
    """What is asked of which list, worked out from the words: to turn a list round and name its first is to name its last."""
    listed, _, asked = said(record).partition(". ")
    plain = asked.split("then: ")[-1]
    ways = {
        "backwards|round|from the end": "reverse",
        "first|begin": "first",
        "last|end": "last",
        "Count|many|long": "count",
    }
    kind = next((kind for way, kind in ways.items() if re.search(way, plain)), plain.split()[-1])
    if "then:" in asked:
        kind = {"first": "last", "last": "first", "count": "count"}.get(kind, f"reverse, {kind}")
    return (kind, *words(listed))


def _errand(record) -> tuple[object, ...]:
    """What is to be brought where, the places to look in whatever order they are named, where each thing is, what is known."""
    text, house = said(record), House(said(record))
    goal = frozenset(re.findall(r"the (\w+) to the (\w+)", text))
    places = frozenset(re.split(r", | or ", text.split("look in the ")[1].split(".")[0]))
    return (
        goal,
        places,
        frozenset(house.at.items()),
        frozenset(house.locked),
        re.findall(r"The \w+ is in the \w+", text) == [],
    )


def _custom(record) -> tuple[object, ...]:
    """The sign and the list, which is a mere set under the star."""
    found = words(said(record))
    sign, items = next(w for w in found if w in ("sun", "rain", "moon", "star")), [w for w in found if w in _LISTED]
    return (sign, frozenset(items) if sign == "star" else tuple(items))


def _program(record) -> tuple[object, ...]:
    """What is asked of which program, calls that take their parts in any order having bags of them."""

    def bag(source: str) -> object:
        if not source.startswith("("):
            return source
        word, *parts = re.findall(
            r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\))*\)|[^\s()]+", source[1:]
        )
        read = [bag(part) for part in parts]
        return (word, frozenset(Counter(read).items()) if word[-3:] in ("add", "mul", "max", "min") else tuple(read))

    text = said(record)
    if "alue: " in text or "numbering" in text:
        return tuple(re.findall(r"-?\d+", text))
    source = text[text.index("(") : text.rindex(")") + 1 if ")" in text else None]
    lost = source.count("(") - source.count(")")
    return ("teps" in text, lost, bag(source + ")" * lost))


@pytest.mark.parametrize(
    ("family", "question", "trained", "tested"),
    [
        ("lists", _list_question, 20_000, 1500),
        ("sorting", lambda record: frozenset(words(record["answer"])), 20_000, 1500),
        ("errands", _errand, 6000, 400),
        ("customs_west", _custom, 20_000, 1500),
        ("expressions", _program, 20_000, 1500),
    ],
)
def test_no_question_of_a_test_split_was_trained_in_another_order_or_other_words(family, question, trained, tested):
    """By other means than meanings: who turns a list round first, sorts the other way or names the places in another order
    asks for what train may have told already."""
    told = {question(record) for record in world.records(family, "train", trained, seed=3)}
    for split in ("test", "shifted"):
        assert not [r for r in world.records(family, split, tested) if question(r) in told]
    assert question(next(world.records(family, "train", 1, seed=3))) in told


def test_the_same_prompt_is_never_asked_in_train_and_test_of_parallel_families():
    """Three tongues and two houses share their draws, so a sentence that one of them trains on, none of them tests."""
    for names in (("kellish", "norrish", "ossan"), ("customs_east", "customs_west")):
        trained = {world.meaning(r) for name in names for r in world.records(name, "train", 3000)}
        tested = {world.meaning(r) for name in names for r in world.records(name, "test", 300)}
        assert not trained & tested
        firsts = [[world.meaning(r) for r in world.records(name, "train", 50)] for name in names]
        assert all(first == firsts[0] for first in firsts)


def test_a_record_of_another_world_has_no_meaning_here():
    with pytest.raises(LuthierError, match="unknown family 'nought'"):
        world.meaning({"family": "nought", "answer": "", "messages": [{"role": "user", "content": "?"}]})
    with pytest.raises(LuthierError, match="no 'answer'"):
        world.meaning({"family": "facts", "messages": []})
