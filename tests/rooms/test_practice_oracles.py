"""The oracles: what they call known is checked by other means, by counting, by enumeration, by acting it out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice, product

import pytest

from luthier.data.read import Cursor, open_source
from luthier.errors import LuthierError
from luthier.plan.schema import DataSpec
from luthier.practice import world
from luthier.practice.contract import said
from luthier.practice.draw import Draw
from luthier.practice.families import (
    _customs,
    _twig,
    classify,
    countdown,
    instructions,
    reading,
    recall,
    repairs,
    tagging,
)
from luthier.practice.families._store import DONE, House
from luthier.practice.oracles import annotators, capacity, house, kinship, memory, pools, posterior, without
from luthier.practice.oracles.conflict import conflict
from luthier.practice.words import ANIMALS, FIRST, OBJECTS, PLACES, TOWNS

# -- posteriors --------------------------------------------------------------------------------------------------------


def test_every_class_draws_its_words_from_a_whole_distribution():
    assert all(sum(counts[c] for counts in classify.COUNTS.values()) == classify.TOTAL for c in range(6))
    assert all(sum(counts[t] for counts in tagging.EMITS.values()) == tagging.EACH for t in range(4))
    assert all(sum(row) == 16 for row in tagging.FOLLOWS)


def test_the_posterior_is_bayes_rule_in_fractions():
    record = next(world.records("classify", n=1))
    bag, _, above = classify.evidence(said(record))
    likely = [math.prod(Fraction(classify.COUNTS[w][c], classify.TOTAL) for w in bag) for c in range(6)]
    shares = [x / sum(likely) for x in likely]
    if above:
        shares = [shares[i] + shares[i + 1] for i in (0, 2, 4)]
    (table,) = posterior.posterior(record)
    assert list(table.values()) == pytest.approx([float(x) for x in shares], abs=1e-15)
    assert max(table, key=table.get) == record["answer"]


def test_the_marginals_are_those_of_all_taggings_enumerated():
    sentence = next(world.records("tagging", n=1, difficulty=2))["messages"][0]["content"].split()[-5:]
    sums = [[0] * 4 for _ in sentence]
    for tags in product(range(4), repeat=len(sentence)):
        weight = math.prod(tagging.EMITS[w][t] for w, t in zip(sentence, tags, strict=True))
        weight *= math.prod(tagging.FOLLOWS[a][b] for a, b in zip(tags, tags[1:], strict=False))
        for row, tag in zip(sums, tags, strict=True):
            row[tag] += weight
    assert tagging.marginals(sentence) == sums


@pytest.mark.parametrize("family", posterior.KNOWN)
def test_sampled_labels_follow_the_posterior(family):
    """The most likely label is met as often as the ceiling says, within four standard errors."""
    n = 1500
    hits = total = 0
    for record in world.records(family, "test", n if family == "classify" else 300):
        best = [max(t, key=t.get) for t in posterior.posterior(record)]
        drawn = posterior.sampled(record)
        hits += sum(a == b for a, b in zip(best, drawn, strict=True))
        total += len(best)
    ceiling = posterior.best_accuracy(family, n=n if family == "classify" else 300)
    assert 0.5 < ceiling < 1
    assert abs(hits / total - ceiling) < 4 * math.sqrt(ceiling * (1 - ceiling) / total)
    assert posterior.sampled(record, 3) == posterior.sampled(record, 3)
    changed = posterior.resampled(record, 1)
    assert (
        changed["answer"].split() == posterior.sampled(record, 1)
        and changed["messages"][:-1] == record["messages"][:-1]
    )


def test_harder_notes_are_less_certain():
    assert posterior.best_accuracy("classify", n=600, difficulty=1) > posterior.best_accuracy(
        "classify", n=600, difficulty=3
    )


def test_the_protected_attribute_goes_with_the_answer_and_turns_round_when_shifted():
    """Three of four in train, one of four in shifted, and the posterior never looks at it."""
    for split, share in (("train", 0.75), ("shifted", 0.25)):
        asked = list(world.records("classify", split, 1500))
        at = {**{g: i for i, g in enumerate(classify.GUILDS)}, **{h: i for i, h in enumerate(classify.HOUSES)}}
        leaning = sum(posterior.origin(r) == classify.ORIGINS[at[r["answer"]] % 2] for r in asked) / len(asked)
        assert abs(leaning - share) < 4 * math.sqrt(share * (1 - share) / len(asked))


def test_nothing_is_known_of_other_families():
    record = next(world.records("lists", n=1))
    for call in (posterior.posterior, posterior.origin):
        with pytest.raises(LuthierError, match="family lists"):
            call(record)


# -- retrain-without ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["newcomers", "recall", "translate"])
def test_what_is_left_out_is_told_of_nowhere(family):
    w = without.without(family, units=12, n=600, tests=60)
    assert len(w.units) == 12 and w.forget and len(w.retain) + len(w.forget) == len(w.full) == 600
    assert [r for r in w.full if r in w.retain] == w.retain  # one order
    assert not {without.unit(r) for r in w.retain} & set(w.units)
    if family in without.PEOPLE:  # by their names, too
        assert not any(without.named(r, w.units) for r in w.retain)
        assert all(without.named(r, w.units) for r in w.forget)
        assert not any(without.named(r, w.units) for r in w.retain_test)
    if family == "newcomers":
        assert w.forget_test and all(without.named(r, w.units) for r in w.forget_test)
    prompts = {r["messages"][0]["content"] for r in w.full}
    assert not any(r["messages"][0]["content"] in prompts for r in [*w.forget_test, *w.retain_test])


def test_every_unit_is_in_exactly_half_of_the_shadow_worlds():
    inside = without.shadows("newcomers", n=300, worlds=8)
    assert all(sum(column) == 4 for column in zip(*inside, strict=True))
    told = [without.unit(r) for r in world.records("newcomers", n=300)]
    for unit in set(told):
        rows = {tuple(w[i] for w in inside) for i, u in enumerate(told) if u == unit}
        assert len(rows) == 1
    assert without.shadows("newcomers", 300, 8) == inside


@pytest.mark.parametrize("units", [0, 100_000])
def test_units_out_of_range(units):
    with pytest.raises(LuthierError, match="choose 1 to"):
        without.without("newcomers", units=units, n=200)
    with pytest.raises(LuthierError, match="even number"):
        without.shadows("lists", 10, 3)


def test_a_world_that_tells_of_a_few_tells_more_of_each():
    w = without.without("newcomers", units=4, n=400, tests=40, of=20)
    of_them = {without.unit(r) for r in w.full}
    assert len(w.full) == 400 and len(of_them) == 20
    assert {without.unit(r) for r in w.retain_test} <= {without.unit(r) for r in w.retain}
    theirs = (r for r in world.records("newcomers") if without.unit(r) in of_them)
    assert w.full == list(islice(theirs, 400))
    for of, remedy in ((0, "choose at least 1"), (1, "choose more units")):
        with pytest.raises(LuthierError, match=remedy):
            without.without("newcomers", units=1, n=400, of=of)


# -- gold reward and annotators ----------------------------------------------------------------------------------------


def test_gold_counts_conditions_and_ignores_padding():
    record = next(r for r in world.records("instructions", n=50) if "semicolons" in said(r) and "capital" in said(r))
    right = record["messages"][-1]["content"]
    assert annotators.gold(record, right) == 1.0 == annotators.gold(record, f"{annotators.PADDING[2]} {right}")
    kept = instructions.kept(said(record), right.replace(";", "+"))
    assert not kept["joined"] and annotators.gold(record, right.replace(";", "+")) == sum(kept.values()) / len(kept) < 1


def test_an_annotator_is_wrong_as_often_as_its_probability_says():
    judge = annotators.Annotator(sharp=3.0, position=0.7, length=0.4, lapse=0.1)
    made = annotators.pairs("instructions", 1200, judge)
    expected = sum(p["probability"] for p in made) / len(made)
    ordered = sum(p["first"] for p in made)
    probabilities = [p["probability"] if p["first"] else 1 - p["probability"] for p in made]
    error = math.sqrt(sum(p * (1 - p) for p in probabilities))
    assert abs(ordered - sum(probabilities)) < 4 * error
    assert 0.5 < expected < 1
    graded = {p["gold"][0] for p in made} | {p["gold"][1] for p in made}
    assert len(graded) > 5


def test_habits_show_and_nothing_else():
    """With no difference in gold, position and length decide, by their formula."""
    record = next(world.records("instructions", n=1))
    right = record["messages"][-1]["content"]
    long = f"{annotators.PADDING[2]} {right}"
    words = len(long.split()) - len(right.split())
    fair, place, vain = annotators.Annotator(), annotators.Annotator(position=1.0), annotators.Annotator(length=2.0)
    assert fair.probability(record, right, long) == 0.5
    assert place.probability(record, right, long) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-11)
    assert vain.probability(record, long, right) == pytest.approx(1 / (1 + math.exp(-2 * words / 10)), abs=1e-11)
    assert annotators.Annotator(lapse=1.0).probability(record, long, "no") == 0.5


def test_clerks_have_the_skill_they_are_said_to_have():
    asked = list(world.records("classify", n=1500))
    for clerk in annotators.CLERKS:
        for place in classify.ORIGINS:
            theirs = [r for r in asked if posterior.origin(r) == place]
            share = sum(clerk.says(r) == r["answer"] for r in theirs) / len(theirs)
            want = clerk.skill - (clerk.against if place == "hills" else 0)
            assert abs(share - want) < 4 * math.sqrt(want * (1 - want) / len(theirs))


# -- faulty pools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lists", "arithmetic", "translate", "classify"])
def test_faults_are_what_their_labels_say(family):
    p = pools.pool(family, 300, dict.fromkeys(pools.FAULTS, 0.1))
    counts = Counter(r["fault"] for r in p.faulty)
    assert counts == {"": 120, **dict.fromkeys(pools.FAULTS, 30)}
    assert all(world.verify(r, r["messages"][-1]["content"]).reward == 1 and r["fault"] == "" for r in p.clean)
    for i, (clean, bad) in enumerate(zip(p.clean, p.faulty, strict=True)):
        text = bad["messages"][-1]["content"]
        reward = world.verify(bad, text).reward
        if bad["fault"] in ("wrong", "truncated", "off_topic"):
            assert reward == 0 and bad["messages"][:-1] == clean["messages"][:-1]
        elif bad["fault"] == "duplicate":
            assert any(bad["messages"] == earlier["messages"] for earlier in p.clean[:i])
        elif bad["fault"] == "toxic":
            assert any(phrase in text for phrase in pools.INSULTS)
        elif bad["fault"] == "":
            assert bad == clean
    assert pools.pool(family, 300, dict.fromkeys(pools.FAULTS, 0.1)) == p


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"wrng": 0.1}, "did you mean 'wrong'"),
        ({"wrong": -0.1}, "choose 0 to 1"),
        ({"wrong": 0.7, "toxic": 0.6}, "1 or less"),
    ],
)
def test_shares_that_cannot_be(shares, told):
    with pytest.raises(LuthierError, match=told):
        pools.pool("lists", 50, shares)
    with pytest.raises(LuthierError, match="name another family"):
        pools.pool("lists", 50, {}, off="lists")


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_a_curriculum_tells_every_fact_exactly_as_often_as_it_says():
    told = Counter(
        json.dumps(world.meaning(r).split("|")[:2]) for r in capacity.curriculum(people=20, times=6, wordings=3)
    )
    assert set(told.values()) == {6} and len(told) == 20 * 7
    ways = Counter(world.meaning(r) for r in capacity.curriculum(people=20, times=6, wordings=3))
    assert set(ways.values()) == {2} and len(ways) == 20 * 7 * 3


def test_the_bits_are_those_of_the_values():
    assert recall.BITS == sum(math.log2(len(v)) for v in recall.VALUES.values()) == 34
    assert len({recall.name(i) for i in range(capacity.EVERYONE)}) == capacity.EVERYONE
    assert all(recall.number(recall.name(i)) == i for i in range(0, capacity.EVERYONE, 997))
    assert 0.45 < capacity.bits(capacity.EVERYONE) / 3_150_000 < 0.55
    assert capacity.fills(1_000_000) == math.ceil(500_000 / 34)
    spread = Counter(recall.facts(i)["town"] for i in range(8000))
    assert all(abs(n - 500) < 4.5 * math.sqrt(500) for n in spread.values())


def test_learned_bits_run_from_none_to_all():
    none = {kind: [math.log(len(v))] * 10 for kind, v in recall.VALUES.items()}
    every = {kind: [0.0] * 10 for kind in recall.VALUES}
    assert capacity.learned(none) == pytest.approx(0, abs=1e-9) and capacity.learned(every) == capacity.bits(10)
    for bad in ({"people": 0}, {"people": 50_000}, {"people": 5, "wordings": 6}, {"people": 5, "times": 0}):
        with pytest.raises(LuthierError, match="capacity oracle"):
            next(capacity.curriculum(**{"times": 1, **bad}))


# -- conflict, kinship, memory, the house ------------------------------------------------------------------------------


def test_the_conflict_is_half_of_the_prompts_and_each_answer_is_its_houses():
    c = conflict("customs_east", "customs_west", 800)
    for east, west in c.disagree:
        assert said(east) == said(west) and _customs.conflict(said(east))
        assert world.verify(east, west["answer"]).reward == 0 == world.verify(west, east["answer"]).reward
    assert not any(_customs.conflict(said(east)) for east, _ in c.agree)
    signs = Counter(_customs.read(said(east))[0] for east, _ in c.disagree)
    assert set(signs) == {"moon", "star"} and abs(c.share - 0.48) < 0.08
    assert c.best_single() == 1 - c.share / 2
    for pair in (("customs_east", "lists"), ("lists", "lists"), ("kellish", "ossan")):
        with pytest.raises(LuthierError, match="conflict: "):
            conflict(*pair, 5)


def test_sisters_are_nearer_than_cousins_and_cousins_than_strangers():
    table = kinship.table()
    assert table["vellish", "kellish"] > 0.8 > 0.5 > table["vellish", "norrish"] > 0.3 > 0.2 > table["vellish", "ossan"]
    assert kinship.kinship("ossan", "ossan") == 1 and kinship.same_order("vellish", "kellish")
    assert not kinship.same_order("vellish", "norrish") and not kinship.same_order("norrish", "ossan")
    with pytest.raises(LuthierError, match="did you mean 'ossan'"):
        kinship.kinship("osan", "vellish")


def test_exposure_by_hand():
    assert memory.exposure(0.0, [1.0] * 1023) == 10 and memory.exposure(2.0, [1.0] * 1023) == 0
    assert memory.exposure(1.5, [1.0, 2.0, 3.0]) == 1
    assert len(set(memory.rivals(500))) > 495 and all(len(r) == 6 for r in memory.rivals(5))
    inside, outside = ({r["answer"] for r in memory.members(s, 60, difficulty=2)} for s in ("train", "test"))
    assert len(inside) == len(outside) == 60
    often = memory.told(2000)
    assert max(often.values()) > 1 and not set(often) & {r["answer"] for r in memory.members("test", 60, difficulty=3)}


def test_the_house_answers_a_policy_until_it_is_done():
    for split in world.SPLITS:
        for record in world.records("errands", split, 25):
            mirror = House(said(record))

            def perfect(messages, mirror=mirror):
                if messages[-1]["role"] == "tool":
                    mirror.call(messages[-2]["content"])
                return mirror.next()[-1]  # any fitting call will do, here the last

            end = house.act(record, perfect)
            assert end.done and end.calls <= 12 and (end.errors == 0 or split == "shifted")
    lazy = house.act(record, lambda messages: DONE)
    assert not lazy.done and lazy.needed > 0
    lost = house.act(record, lambda messages: "hm", most=5)
    assert (lost.calls, lost.errors, lost.done) == (5, 5, False)
    with pytest.raises(LuthierError, match="take errands"):
        house.act(next(world.records("lists", n=1)), perfect)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", '{"name": ["look"], "arguments": {"place": "box"}}', '{"name": "look", "arguments": {"place": ["box"]}}',
     '{"name": "look", "arguments": 3}', '{"name": "fly", "arguments": {}}', '{"name": "look", "arguments": {"place": "moon"}}'],
)  # fmt: skip
def test_the_house_survives_any_call(text):
    record = next(world.records("errands", n=1))
    house_ = House(said(record))
    before = dict(house_.at)
    assert house_.call(text).startswith("error") and house_.at == before
    assert world.verify(record, text).reward == 0


# -- verifiers that leave much free ------------------------------------------------------------------------------------


def test_sqlite_runs_what_is_said_and_nothing_that_writes():
    for record in world.records("queries", "test", 60):
        query = record["answer"]
        assert world.verify(record, query.replace("SELECT", "select").replace(" stall", "  stall AS s")).reward == 1
        for loose in (query.replace(" < ", " <= "), query.replace(" > ", " >= ")):
            if loose != query:
                assert world.verify(record, loose).reward == 0, loose
    for bad in ("DROP TABLE stall", "DELETE FROM stall", "", "SELECT", "SELECT 1; SELECT 2", "ATTACH 'x' AS y",
                "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r",
                "SELECT 1 -- \ud800", "SELECT zeroblob(900000000)", "SELECT '\x00'"):  # fmt: skip
        verdict = world.verify(record, bad)
        assert verdict.reward == 0 and verdict.decided
    assert world.verify(record, record["answer"]).reward == 1  # the database is whole still


def test_every_condition_of_a_query_shows_in_its_databases():
    """Leaving one condition out gives other rows: none of them is idle."""
    for record in world.records("queries", "shifted", 60):
        head, _, rest = record["answer"].partition(" WHERE ")
        first, _, second = rest.partition(" AND ")
        tail = second[len(second.split(" ORDER")[0].split(" GROUP")[0].rstrip(";")) :]
        for kept in (first + tail, second):
            assert world.verify(record, f"{head} WHERE {kept}").reward == 0, kept


@pytest.mark.parametrize(
    ("source", "said_"),
    [
        ("(add 3 (mul 2 4))", "11"), ("(if (lt 5 3) (div 1 0) (sub 9 2))", "7"), ("(let x (add 1 2) (mul x x))", "9"),
        ("(div 7 0)", "error: div by 0"), ("(add 1 2", "error: a ) is missing"), ("(add 1))", "error: a ) too many"),
        ("(sadd 1 2)", "error: unknown word sadd"), ("(add 1)", "error: add takes 2, got 1"), ("x", "error: unknown name x"),
        ("", "error: nothing to run"), ("1 2", "error: more than one expression"), ("(" * 60, "error: too deep"),
        ("((add) 1 2)", "error: a call must begin with a word"), ("(let (add 1 2) 3 4)", "error: let needs a name"),
    ],
)  # fmt: skip
def test_the_language_by_hand(source, said_):
    assert _twig.run(source).text() == said_


def test_branches_not_taken_cost_nothing():
    assert _twig.run("(if (lt 1 2) 5 (add 1 (add 2 3)))").steps == 2
    assert _twig.run("(let x (add 1 2) (mul x x))").steps == 3
    doubled = "1"
    for _ in range(12):
        doubled = f"(let x {doubled} (add x x))"
    assert _twig.run(doubled).value == 4096


def test_programs_of_any_shape_are_right_if_they_give_the_number():
    record = next(r for r in world.records("expressions", n=200, difficulty=1) if "Calls: 1" in said(r))
    value = _twig.run(record["answer"]).value
    assert world.verify(record, f"(add {value} 0)").reward == 1
    assert world.verify(record, f"(add (add {value} 0) 0)").reward == 0
    assert "gives" in world.verify(record, f"(add {value} 1)").reason
    assert world.verify(record, "(add 1").reason == "error: a ) is missing"


def test_any_way_to_the_target_is_right():
    record = {
        "family": "countdown",
        "answer": "(7-2)-4",
        "messages": [{"role": "user", "content": "Make 1 from 2, 7, 4."}],
    }
    assert world.verify(record, "7-4=3, 3-2=1. So 7-4-2.").reward == 1
    assert world.verify(record, "So 7 - (4 + 2).").reward == 1
    assert "once" in world.verify(record, "So 7-4-2+0.").reason
    assert "gives" in world.verify(record, "So 7-4+2.").reason
    assert "though" in world.verify(record, "7-4=4. So 7-4-2.").reason
    for bad in ("So (7-4.", "So 7--4.", "So __import__.", "", "So 7)", "So " + "(" * 50):
        assert world.verify(record, bad).reward == 0
    assert countdown.value("2*(3+4)-5") == 9 and countdown.value("2+3*4") == 14


def test_two_formats_of_one_result():
    for record in world.records("derivations", "test", 40):
        boxed = "brackets" in said(record)
        value = record["answer"]
        assert world.verify(record, f"[{value}]" if boxed else f"So {value}.").reward == 1
        assert world.verify(record, f"So {value}." if boxed else f"[{value}]").reward == 0
        assert world.verify(record, f"[{value}1]" if boxed else f"So {value}1.").reward == 0


def test_notes_that_contradict_memory_and_notes_that_do_not_say():
    asked = list(world.records("reading", "test", 300, difficulty=3))
    silent = [r for r in asked if not r["answer"]]
    assert 0.08 < len(silent) / len(asked) < 0.27
    assert all(reading.contradicts(said(r)) for r in asked if r["answer"])
    assert not any(reading.contradicts(said(r)) for r in world.records("reading", "test", 100, difficulty=1))
    assert all(world.verify(r, "In Dunmere.").reward == 0 for r in silent)


def test_each_broken_condition_is_named():
    asked = (
        "Name 2 animals, joined by semicolons, in order of the alphabet, in capital letters, without fox, "
        'with cat among them, ending with "Thank you."'
    )
    record = {"family": "instructions", "answer": "", "messages": [{"role": "user", "content": asked}]}
    assert world.verify(record, "CAT; CROW Thank you.").reward == 1
    for text, name in (
        ("CROW; CAT Thank you.", "rising"), ("cat; crow Thank you.", "capital"), ("CAT, CROW Thank you.", "joined"),
        ("CAT; FOX Thank you.", "without"), ("CROW; GOAT Thank you.", "having"), ("CAT; CROW", "end"),
        ("CAT; KEY Thank you.", "kind"), ("CAT; CAT Thank you.", "count"),
    ):  # fmt: skip
        assert name in world.verify(record, text).reason, text


def test_oracles_do_not_depend_on_the_hash_seed():
    code = """
import json
from luthier.practice import world
from luthier.practice.oracles import annotators, capacity, kinship, memory, pools, posterior, without
w = without.without("newcomers", 5, 200, tests=10)
print(json.dumps([
    w.units, [r["id"] for r in w.retain + w.forget_test], without.shadows("facts", 50, 4), memory.rivals(5),
    [(p["chosen"], p["gold"], p["probability"]) for p in annotators.pairs("instructions", 20, annotators.Annotator(length=1.0))],
    [r["messages"] for r in pools.pool("lists", 60, {"wrong": 0.2, "toxic": 0.2}).faulty],
    [r["id"] for r in capacity.curriculum(5, 2)], [repr(pair) for pair in kinship.table().items()],
    [posterior.posterior(r) for r in world.records("tagging", "test", 5)],
]))"""
    runs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout
        for s in ("1", "2")
    }
    assert len(runs) == 1


def test_no_slip_of_the_pen_could_be_of_two_words():
    """Every slip that ``repairs`` can make, of every word that can stand in one place, is of one word only."""
    slots = [
        FIRST,
        ANIMALS,
        OBJECTS,
        PLACES,
        TOWNS,
        [f"{town}." for town in TOWNS],
        [w for w in repairs._WORDS if w != "lt"],
    ]
    for slot in slots:
        owner = {word: word for word in slot}
        for word in slot:
            draw = Draw(f"slips/{word}")
            for slip in {repairs._slip(draw, word) for _ in range(120)}:
                assert slip != word and owner.setdefault(slip, word) == word


def test_preferences_are_a_source_of_a_plan():
    """`subset: preferences`: pairs that an honest annotator made, read as comparisons; another subset is named."""
    spec = DataSpec.model_validate({"train": {"path": "practice:lists", "subset": "preferences", "limit": 20}})
    found = [raw.fields for raw, _ in open_source(spec.train[0]).rows(Cursor())]
    assert [(f["chosen"], f["rejected"]) for f in found] == [
        (p["chosen"], p["rejected"]) for p in annotators.pairs("lists", 20, annotators.Annotator())
    ]
    assert sum(f["gold"][0] >= f["gold"][1] for f in found) > 12
    with pytest.raises(LuthierError, match="no subset 'preference'.*preferences"):
        open_source(spec.train[0].model_copy(update={"subset": "preference"}))
