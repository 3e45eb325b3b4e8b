"""Verifiers: right is right, wrong is wrong, and what cannot be decided never passes."""

from __future__ import annotations

from fractions import Fraction

import pytest

from luthier.errors import LuthierError
from luthier.parts.verdict import Verdict, undecided
from luthier.sampling.verifiers import VERIFIERS, get_verifier, last_number, reference

RIGHT_WRONG = [
    ("exact", {}, "two  words", " two words\n", "two word"),
    ("exact", {"ignore_case": True}, "Yes", "yes", "no"),
    ("contains", {}, "Paris", "It is paris.", "comparison"),
    ("number", {}, "6 * 7 = 42\n#### 42", "so 40 + 2 is 42.0", "42 and then 43"),
    ("number", {}, "#### 1,234", "The answer is $1,234.", "1.234"),
    ("number", {}, "-3", "it is -3", "3"),
    ("number", {"tolerance": 0.01}, "100", "100.9", "101.1"),
    ("regex", {"pattern": r"^{answer}\b"}, "a+b", "a+b is it", "aab"),
    ("regex", {"pattern": r"\d+", "whole": True}, "", "77", "77x"),
    ("json", {}, '{"a": [1, 2.0], "b": null}', '```json\n{"b": null, "a": [1, 2]}\n```', '{"a": [2, 1], "b": null}'),
    ("json", {}, '{"a": 1}', '{"a": 1}', '{"a": true}'),
    ("choice", {}, "B", "The answer is (B) because A is wrong", "A. not B"),
    ("choice", {}, "(C)", "C) third", "A or C"),
    ("f1", {}, "the red fox", "A red fox!", "blue whale"),
    ("rougeL", {}, "a b c d", "a b c d", "e f g"),
    ("refusal", {}, "I cannot do that.", "Sorry, but I can't help with this.", "Sure: first, open it."),
    ("refusal", {}, "Paris", "It is Paris.", "I am sorry, I will not say."),
]


@pytest.mark.parametrize(("name", "options", "answer", "right", "wrong"), RIGHT_WRONG)
def test_right_and_wrong(name, options, answer, right, wrong):
    judge = get_verifier(name, options)
    good, bad = judge({"answer": answer}, right), judge({"answer": answer}, wrong)
    assert good.passed and good.reward == 1, good
    assert not bad.passed and bad.decided and bad.reward == 0, bad
    assert bad.reason


def test_every_verifier_is_tried():
    assert {row[0] for row in RIGHT_WRONG} == set(VERIFIERS)


@pytest.mark.parametrize("name", VERIFIERS)
def test_without_an_answer_nothing_passes(name):
    verdict = get_verifier(name)({"prompt": "?"}, "anything 42 A {}")
    assert not verdict.decided and not verdict.passed and verdict.reward == 0 and verdict.reason


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("response", ["", "   ", "\x00", "####", "{", "-", "()" * 50])
def test_odd_responses_do_not_pass_or_fail_loudly(name, response):
    options = {"pattern": "answer"} if name == "regex" else {}
    record = {"answer": {"json": '{"A": 1}', "choice": "A", "refusal": "I cannot."}.get(name, "A 17")}
    assert not get_verifier(name, options)(record, response).passed


def test_partial_scores():
    assert get_verifier("f1")({"answer": "red fox"}, "red dog").reward == 0.5
    assert get_verifier("rougeL")({"answer": "a b c d"}, "a x c").reward == pytest.approx(2 * 2 / 7)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 1,234", 1234),
        ("7-3", 3),
        ("x = -4.", -4),
        ("1/2 cup", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("1e3", 1000),
        ("12,13", 13),
        ("$1,000,000.00", 1000000),
        ("none", None),
        ("1/0", None),
        ("5 #### none", None),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == value


def test_where_the_answer_is():
    assert reference({"completion": "c", "answer": "a"}) == "a"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    assert reference({"messages": turns}) == "x" == reference({"completion": turns[1:]})
    assert reference({"answer": {"k": 1}}) == '{"k": 1}'
    assert reference({"prompt": "q"}) is None


def own(record, response, want="yes"):
    return response == record.get("want", want)


def broken(record, response):
    return record["missing"]


def not_a_number(record, response):
    return float("nan")


def unsure(record, response):
    return Verdict(1.0, "a guess", decided=False)


def test_a_users_own(monkeypatch):
    judge = get_verifier(f"{__name__}:own", {"want": "no"})
    assert judge({}, "no").passed and not judge({}, "yes").passed
    for name in ("broken", "not_a_number", "unsure"):
        verdict = get_verifier(f"{__name__}:{name}")({}, "x")
        assert not verdict.decided and not verdict.passed and verdict.reward == 0
    assert not undecided("why").passed


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("excat", {}, "did you mean 'exact'"),
        ("exact", {"ignorecase": True}, "did you mean 'ignore_case'"),
        ("no_such_module:f", {}, "cannot import no_such_module"),
        ("json:nothing", {}, "has no 'nothing'"),
        ("json:__name__", {}, "not a function"),
    ],
)
def test_unknown_names(name, options, said):
    with pytest.raises(LuthierError, match=said):
        get_verifier(name, options)
