"""The practice world: the same records everywhere, no meaning in two splits, verifiers that cannot be fooled by a slip."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.practice import world
from luthier.practice.draw import Draw

FAMILIES = world.families()
PINNED = {
    "arithmetic": "5a40bced6cf37ff1",
    "canaries": "8a569ac765422377",
    "classify": "50bbd548a7630990",
    "countdown": "c62fba385ca4570b",
    "customs_east": "13187c3576dba3b9",
    "customs_west": "9d7521d3b51a0de2",
    "derivations": "1d65b1837f870e1d",
    "errands": "2d1c50c2128c44dc",
    "expressions": "c064c9d74d76cf32",
    "facts": "3fe13366267d9fb3",
    "instructions": "371413a23584f927",
    "inventory": "ad34b2ce29775210",
    "kellish": "99222da32f0c3b2e",
    "ledgers": "3a48c429455c4905",
    "lists": "81f69db13a80e402",
    "mazes": "a8ef6ca5c2ad94cb",
    "newcomers": "b819658d39ef7195",
    "norrish": "65c1a25142f363b3",
    "ossan": "d6adfd0f9e8c3c70",
    "queries": "d7b18c5a769caa59",
    "reading": "d37537ba1ff2afef",
    "recall": "23a1f882ad8cc2ff",
    "refusals": "8ddf715332bc1d19",
    "repairs": "83c4ba6aa0dbccf0",
    "sorting": "6da12777d100159b",
    "stories": "d34216bfe8fbd066",
    "tables": "900c86678f25cd65",
    "tagging": "27d9da775e09be6d",
    "tools": "225e5c0b36265264",
    "tracking": "de321e40d245d40c",
    "translate": "a9f304ef19bf6fed",
}


def digest(family: str) -> str:
    """Of the first 100 records, as JSON."""
    return hashlib.sha256(json.dumps(list(world.records(family, n=100))).encode()).hexdigest()[:16]


def test_at_least_eight_families_some_taught_some_not():
    assert len(FAMILIES) >= 8
    assert set(world.taught()) | set(world.untaught()) == set(FAMILIES)
    assert {"translate", "tools"} <= set(world.untaught())
    assert set(PINNED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_the_same_on_every_machine(family):
    assert family in PINNED, f'a new family: pin "{family}": "{digest(family)}"'
    assert digest(family) == PINNED[family], "the world changed: every published score is of another world now"


def test_records_do_not_depend_on_the_hash_seed():
    code = f"import json; from luthier.practice import world; print(json.dumps([list(world.records(f, 'test', 5)) for f in {FAMILIES}]))"
    runs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout
        for s in ("1", "2")
    }
    assert len(runs) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", world.SPLITS)
def test_start_goes_on_where_another_call_ended(family, split):
    assert list(world.records(family, split, 20, start=70)) == list(world.records(family, split, 90))[70:]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_meaning_and_no_prompt_in_two_splits(family):
    keys: dict[str, set[str]] = {}
    many = 250 if family in COSTLY else 1500
    for split, n in (("train", many), ("test", 150), ("shifted", 150)):
        make = world.family_named(family).make
        draw = Draw(f"leak/{family}/{split}")
        items = [make(draw, 1 + draw.below(3), split == "shifted") for _ in range(n)]
        # What a split yields is what it owns: every record's digest names its own split and no other.
        keys[split] = {i.key for i in items if world.split_of(family, i.key) == split}
        assert keys[split]
    assert not any(a & b for a, b in itertools.combinations(keys.values(), 2))
    prompts = [
        {json.dumps([m["content"] for m in r["messages"][:-1]]) for r in world.records(family, split, n)}
        for split, n in (("train", many), ("test", 150), ("shifted", 150))
    ]
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))


def test_one_meaning_in_other_words_stays_in_one_split():
    """The same sum, set of words and call in every wording fall into one split."""
    wordings: dict[tuple[str, str], set[str]] = {}
    splits: dict[tuple[str, str], set[str]] = {}
    for family, split in itertools.product(("arithmetic", "sorting", "tools"), world.SPLITS):
        for record in world.records(family, split, 2000 if split == "train" else 100):
            meaning = (family, _meaning(record))
            wordings.setdefault(meaning, set()).add(record["messages"][-2]["content"])
            splits.setdefault(meaning, set()).add(split)
    assert sum(len(w) > 1 for w in wordings.values()) > 200
    assert [m for m, s in splits.items() if len(s) > 1] == []


def _meaning(record):
    """Recomputed from the record alone, not from the generator's key."""
    if record["family"] == "arithmetic":
        text = record["messages"][-1]["content"]
        first = text.split("=")[0].replace("-", "+-").split("+")[0]
        steps = [s.split("=")[0].replace("-", "+-").split("+", 1)[1] for s in text.split(". So")[0].split(", ")]
        sizes, pending = [], 0
        for step in steps:
            value = int(step)
            if value % 10 == 0 and not pending:
                pending = value
            elif pending and pending * value > 0 and value % 10:
                sizes.append(pending + value)
                pending = 0
            else:
                sizes += [pending] if pending else []
                pending = value if value % 10 == 0 else 0
                sizes += [] if pending else [value]
        sizes += [pending] if pending else []
        return "sum " + " ".join(map(str, sorted([int(first), *sizes])))
    if record["family"] == "sorting":
        return " ".join(record["answer"].split(", "))
    calls = json.loads(record["answer"])
    return json.dumps(sorted(json.dumps(c, sort_keys=True) for c in (calls if isinstance(calls, list) else [calls])))


@pytest.mark.parametrize("split", ["test", "shifted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_two_thousand_pairs_to_test(family, split):
    asked = list(world.records(family, split, 2000))
    assert len({json.dumps(r["messages"]) for r in asked}) == 2000
    assert len({world.meaning(r) for r in asked}) > 900


def test_every_fact_that_is_tested_was_told_in_another_wording():
    told = {_fact(r) for r in world.records("facts", "train", 24_000)}
    asked = {_fact(r) for r in world.records("facts", "test", 200)}
    assert asked <= told


def _fact(record):
    from luthier.practice.families._people import TRAITS, people

    prompt = record["messages"][-2]["content"]
    name = next(p.name for p in people(new=False) if p.name in prompt)
    return name, next(t for t, trait in TRAITS.items() if prompt in [w.format(name) for w in trait.asked])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", world.SPLITS)
def test_verifier_accepts_the_answer_and_rejects_others(family, split):
    asked = list(world.records(family, split, 60))
    for record in asked:
        verdict = world.verify(record, record["messages"][-1]["content"])
        assert (verdict.reward, verdict.decided) == (1.0, True), (record, verdict)
        assert world.verify(record, "").reward == 0.0
        other = next(r for r in asked if r["answer"] != record["answer"] and not _may_share(family, r, record))
        assert world.verify(record, other["messages"][-1]["content"]).reward == 0.0, (record, other)


def _may_share(family, a, b):
    """Whether a's answer might do for b: where many answers are right, those of like tasks may be swapped."""
    if family == "stories":
        return set(a["messages"][0]["content"].split()) == set(b["messages"][0]["content"].split())
    if family == "instructions":
        return a["messages"][0]["content"].split()[:4] == b["messages"][0]["content"].split()[:4] or _kind(a) == _kind(
            b
        )
    if family == "errands":
        return "Done." not in (a["answer"], b["answer"])
    if family == "queries":
        return a["answer"].split(" WHERE ")[0] == b["answer"].split(" WHERE ")[0]
    return family == "expressions" and a["answer"][0] == b["answer"][0] == "("


def _kind(record):
    from luthier.practice.families.instructions import read

    return read(record["messages"][0]["content"]).kind


LOOSE = ("arithmetic", "facts", "newcomers", "tracking", "recall", "reading", "classify", "ledgers")
LOOSE += ("derivations", "countdown", "mazes", "queries", "inventory")
"""Families whose verifiers look for the value, or what a query gives, and leave the rest free; tested by themselves."""
COSTLY = ("countdown", "errands", "tagging", "ledgers", "repairs")
"""Families whose records are searched for, acted out or long."""


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_verifier_rejects_a_corrupted_answer(data):
    """One word of the right response is replaced, removed or doubled where that changes what it says."""
    family = data.draw(st.sampled_from([f for f in FAMILIES if f not in LOOSE]))
    record = data.draw(st.sampled_from(POOL[family]))
    words = record["messages"][-1]["content"].split(" ")
    at = data.draw(st.integers(0, len(words) - 1))
    how = data.draw(st.sampled_from(["replaced", "removed", "doubled"]))
    broken = words[:at] + {"replaced": ["zzz."], "removed": [], "doubled": [words[at]] * 2}[how] + words[at + 1 :]
    if family == "refusals" and "sorry," in words:
        return  # a decline may be worded freely; that it gives nothing away is tested below
    assert world.verify(record, " ".join(broken)).reward == 0.0, (record, broken)


POOL = {f: list(world.records(f, "test", 40)) for f in FAMILIES}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_verifier_rejects_another_value(data):
    """For the families whose wording is free: every other value in place of the true one, or beside it."""
    from luthier.practice.families._people import TRAITS
    from luthier.practice.words import PLACES

    family = data.draw(st.sampled_from(["facts", "newcomers", "tracking", "arithmetic"]))
    record = data.draw(st.sampled_from(POOL[family]))
    answer, text = record["answer"], record["messages"][-1]["content"]
    values = next((t.values for t in TRAITS.values() if answer in t.values), PLACES)
    if family == "arithmetic":
        values = [str(n) for n in range(100)]
    other = data.draw(st.sampled_from([v for v in values if v != answer]))
    head, tail = text.rsplit(answer, 1)
    assert world.verify(record, f"{head}{other}{tail}").reward == 0.0
    assert world.verify(record, f"{text} Or {other}.").reward == 0.0
    assert world.verify(record, f"Well: {answer}.").reward == 1.0


def test_inventory_wants_the_place_of_one_thing_or_every_pair_of_all():
    from luthier.practice.words import PLACES

    kinds = set()
    for record in POOL["inventory"]:
        told = record["answer"].split()
        kinds.add(len(told) > 1)
        pairs = [" ".join(told[k : k + 2]) for k in range(0, len(told), 2)]
        other = next(place for place in PLACES if place not in told)
        wrong = [record["answer"].replace(told[-1], other), f"{record['answer']} {other}"]
        if len(told) > 1:
            wrong += [" ".join(pairs[1:]), " ".join([*pairs, pairs[0]]), " ".join([*told[1:], told[0]])]
        assert [world.verify(record, text).reward for text in wrong] == [0.0] * len(wrong), record
        assert world.verify(record, " ".join(reversed(pairs))).reward == 1.0
    assert kinds == {True, False}


def test_refusals_want_no_leak_and_no_needless_refusal():
    from luthier.practice.families.refusals import REFUSAL

    sealed = [r for r in POOL["refusals"] if r["answer"] == REFUSAL]
    free = [r for r in POOL["refusals"] if r["answer"] != REFUSAL]
    assert len(sealed) > 5 and len(free) > 5
    for record in sealed:
        note = record["messages"][0]["content"].split("\n")[1]
        assert world.verify(record, f"I am sorry, but it says {note}").reward == 0.0
        assert world.verify(record, "Sorry, I may not.").reward == 1.0
    assert all(world.verify(r, REFUSAL).reward == 0.0 for r in free)


def test_any_way_through_a_maze_is_right_and_nothing_else():
    prompt = "Find the way. Roads: Brill-Harrow, Stowe-Brill, Harrow-Rowan, Rowan-Stowe. It goes from Stowe to Harrow."
    record = {"family": "mazes", "answer": "Stowe Brill Harrow", "messages": [{"role": "user", "content": prompt}]}
    for said, reward in (
        ("So Stowe Brill Harrow.", 1.0),
        ("Stowe, Brill, back, Rowan, Harrow. So Stowe Rowan Harrow", 1.0),
        ("So Stowe Harrow.", 0.0),
        ("So Stowe Brill Stowe Rowan Harrow.", 0.0),
        ("So Harrow Brill Stowe.", 0.0),
        ("Stowe, Brill, Harrow.", 1.0),
        ("Stowe, Rowan, back, Brill, Harrow.", 0.0),
    ):
        assert world.verify(record, said).reward == reward, said


def test_a_story_of_other_sentences_may_be_right():
    record = POOL["stories"][0]
    same = [r for r in world.records("stories", "test", 400) if set(_asked(r)) == set(_asked(record))]
    assert all(world.verify(record, r["answer"]).reward == 1.0 for r in same)


def _asked(record):
    from luthier.practice.contract import words
    from luthier.practice.words import ANIMALS, FIRST, OBJECTS

    return set(words(record["messages"][0]["content"])) & {
        w.lower() for w in [*FIRST, *ANIMALS, *OBJECTS, "sad", "happy"]
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_difficulty_is_graded(family):
    """Each level is its own stream, and the levels differ."""
    n = 60 if family in COSTLY else 300
    texts = [[r["messages"][-2]["content"] for r in world.records(family, n=n, difficulty=d)] for d in (1, 2, 3)]
    assert texts[0] != texts[1] != texts[2]
    if family not in ("facts", "newcomers", "stories", "recall", "canaries", "classify"):  # by size everywhere else
        sizes = [
            sum(len(m["content"]) for r in world.records(family, n=n, difficulty=d) for m in r["messages"])
            for d in (1, 3)
        ]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_shifted_is_another_task(family):
    """A family that overlooks ``shifted`` would test what test tests: from the same draws it gives other prompts."""
    make, n = world.family_named(family).make, 60
    drawn = [[make(Draw(f"shift/{i}"), 1 + i % 3, shifted).prompt for i in range(n)] for shifted in (False, True)]
    assert sum(a != b for a, b in zip(*drawn, strict=True)) >= 0.9 * n


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_value_in_the_response(family):
    """Mistaken for each other, both would often still be passed: the answer is never the longer one."""
    assert all(len(r["answer"]) <= len(r["messages"][-1]["content"]) for r in world.records(family, "test", 60))


@pytest.mark.parametrize("family", FAMILIES)
def test_train_records_are_quick(family):
    """A lenient floor: 50,000 a second is what an idle core does in the simple families."""
    best = 0.0
    for attempt in range(3):
        began = time.process_time()  # this process's own time: other work on the machine is not counted
        count = sum(1 for _ in world.records(family, n=400, seed=attempt))
        best = max(best, count / (time.process_time() - began))
    assert best > (1_000 if family in COSTLY else 5_000)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: world.records("tracing"), "did you mean 'tracking'"),
        (lambda: world.records("facts", "tset"), "did you mean 'test'"),
        (lambda: world.records("facts", difficulty=4), "choose 1, 2 or 3"),
        (lambda: world.records("facts", n=-1), "0 or more"),
        (lambda: list(world.records("facts", "test", 5000)), "there are only"),
        (
            lambda: world.verify({"family": "nought", "answer": "", "messages": [{"role": "user", "content": ""}]}, ""),
            "nought",
        ),
        (lambda: world.verify({"family": "facts", "messages": []}, ""), "no 'answer'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_choices(call, names):
    with pytest.raises(LuthierError) as told:
        call()
    assert names in str(told.value) and "\n" not in str(told.value)


def test_the_world_needs_no_torch():
    code = "import sys; from luthier.practice import world; list(world.records('facts', n=1)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
