"""Which tokens carry loss: by marks, by prefixes, by swapping; and the ways in which templates go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.prepare import Dataset, prepare
from luthier.errors import LuthierError
from tests.rooms.test_data_kit import (
    ENDLESS,
    FORGETFUL,
    MARKED,
    MARKED_SHORT,
    PLAIN,
    chat,
    spec,
    taught,
    tokenizer,
    written,
)

TALK = [
    chat("two plus two?", "four", "and then?", "the cat sat"),
    {"messages": [{"role": "system", "content": "be a cat"}, *chat("what is it", "a mat\n")["messages"]]},
]


def made(folder: Path, records: list[Any], own: str | None = PLAIN, **settings: Any) -> tuple[Dataset, Any]:
    tok = tokenizer(own)
    return prepare(spec(written(folder, records), **settings), tok), tok


def test_marks_prefixes_and_swaps_find_the_same_tokens(tmp_path: Path) -> None:
    plain, tok = made(tmp_path, TALK, PLAIN)
    marked, _ = made(tmp_path, TALK, MARKED)
    short, _ = made(tmp_path, TALK, MARKED_SHORT)
    rows = [d.train for d in (plain, marked, short)]
    for i in range(len(TALK)):
        for other in rows[1:]:
            assert np.array_equal(rows[0][i].ids, other[i].ids) and np.array_equal(rows[0][i].weights, other[i].weights)
    assert taught(plain.train[0], tok) == "four<|end|>the cat sat<|end|>"
    assert taught(plain.train[1], tok) == "a mat\n<|end|>"
    assert short.ledger.notes["end-of-turn added to the template's generation marks"] == 3
    assert not plain.ledger.notes


def test_a_template_that_rewrites_earlier_turns_is_still_exact(tmp_path: Path) -> None:
    talk = [chat("two plus two?", "<think>it is</think>four", "sure?", "<think>now</think>four.")]
    data, tok = made(tmp_path, talk, FORGETFUL)
    assert taught(data.train[0], tok) == "four<|end|><think>now</think>four.<|end|>"
    assert "it is" not in tok.decode(data.train[0].ids)


def test_a_turn_that_cannot_be_found_is_an_error_naming_the_record(tmp_path: Path) -> None:
    upper = PLAIN.replace("{{ m.content }}{% for c", "{{ m.content | upper }}{% for c")
    with pytest.raises(LuthierError, match=r"data.jsonl:1: turn 1 .* cannot be found|does not show turn 1"):
        made(tmp_path, TALK, upper)


def test_a_turn_the_template_hides_is_an_error(tmp_path: Path) -> None:
    hiding = PLAIN.replace("{{ m.content }}{% for c", "{% for c")
    with pytest.raises(LuthierError, match=r"data.jsonl:1: the template does not show turn 1"):
        made(tmp_path, TALK, hiding)


def test_a_failing_template_names_the_record(tmp_path: Path) -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
    with pytest.raises(LuthierError, match=r"data.jsonl:2: the chat template fails on this record: no system turn"):
        made(tmp_path, TALK, picky)
    with pytest.raises(LuthierError, match="data.jsonl:1: the chat template fails"):
        made(tmp_path, TALK, "{{ messages[9].content }}")


def test_stripped_end_of_turn_is_refused_or_counted(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=r"data.jsonl:1: the answer does not end in a supervised end-of-turn"):
        made(tmp_path, TALK, ENDLESS)
    data, tok = made(tmp_path, TALK, ENDLESS, end_of_turn="allow-missing")
    assert data.ledger.to_dict()["end_of_turn"]["share"] == 0
    assert taught(data.train[0], tok) == "fourthe cat sat"
    allowed, tok = made(tmp_path, TALK, MARKED_SHORT, end_of_turn="allow-missing")
    assert taught(allowed.train[0], tok) == "fourthe cat sat" and allowed.ledger.ended == 0


def test_doubled_bos_is_removed_and_counted_and_a_missing_one_is_told(tmp_path: Path) -> None:
    twice, tok = made(tmp_path, TALK, "{{ bos_token }}" + PLAIN)
    once, _ = made(tmp_path, TALK, PLAIN)
    never, _ = made(tmp_path, TALK, PLAIN.removeprefix("{{ bos_token }}"))
    assert [list(r.train[0].ids[:2]).count(tok.bos_token_id) for r in (twice, once, never)] == [1, 1, 0]
    assert np.array_equal(twice.train[0].ids, once.train[0].ids) and twice.train[0].eot
    assert np.array_equal(twice.train[0].weights, once.train[0].weights)
    assert [dict(d.ledger.bos) for d in (twice, once, never)] == [{"doubled, removed": 2}, {"one": 2}, {"missing": 2}]


def test_loss_on_last_and_all(tmp_path: Path) -> None:
    last, tok = made(tmp_path, TALK, loss_on="last")
    assert taught(last.train[0], tok) == "the cat sat<|end|>"
    every, tok = made(tmp_path, TALK, loss_on="all")
    assert (every.train[0].weights[1:] == 1).all() and every.train[0].weights[0] == 0
    assert every.ledger.ended == every.ledger.ending == 2


def test_role_weights_and_a_turns_own_weight(tmp_path: Path) -> None:
    record = chat("two?", "four", "now?", "then")
    record["messages"] += [{"role": "tool", "content": "a mat"}, {"role": "assistant", "content": "about it"}]
    data, tok = made(tmp_path, [record], role_weights={"tool": 0.5, "user": 0})
    row = data.train[0]
    half = tok.decode([int(i) for i, w in zip(row.ids, row.weights, strict=True) if w == 0.5])
    assert half == "a mat" and taught(row, tok) == "four<|end|>then<|end|>a matabout it<|end|>"
    record["messages"][1]["weight"], record["messages"][3]["loss"] = 0, False
    data, tok = made(tmp_path, [record])
    assert taught(data.train[0], tok) == "about it<|end|>"
    record["messages"][0]["loss"] = True
    data, tok = made(tmp_path, [record])
    assert taught(data.train[0], tok) == "two?about it<|end|>"
    on_all, tok = made(tmp_path, [record], loss_on="all", role_weights={"tool": 0})
    silent = tok.decode([int(i) for i, w in zip(on_all.train[0].ids, on_all.train[0].weights, strict=True) if w == 0])
    assert silent == "<|bos|>four<|end|>then<|end|>a mat"


@pytest.mark.parametrize("field", [True, False])
@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL])
def test_thinking_is_kept_masked_or_stripped(tmp_path: Path, template: str, field: bool) -> None:
    record = chat("two?", "four")
    if field:
        record["messages"][1]["reasoning_content"] = "it is"
    else:
        record["messages"][1]["content"] = "<think>\nit is\n</think>\n\nfour"
    keep, tok = made(tmp_path, [record], template)
    assert taught(keep.train[0], tok) == "<think>\nit is\n</think>\n\nfour<|end|>"
    mask, tok = made(tmp_path, [record], template, thinking="mask")
    assert taught(mask.train[0], tok) == "four<|end|>" and "it is" in tok.decode(mask.train[0].ids)
    strip, tok = made(tmp_path, [record], template, thinking="strip")
    assert taught(strip.train[0], tok) == "four<|end|>" and "think" not in tok.decode(strip.train[0].ids)
    noted = any("thinking written" in n for n in keep.ledger.notes)
    assert noted == (field and template is FORGETFUL)


def test_tools_and_tool_calls_reach_the_text_or_the_ledger(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "tool_calls": [call]}]
    record = {"messages": turns, "tools": [{"type": "function", "function": {"name": "add"}}]}
    for template in (PLAIN, MARKED):
        data, tok = made(tmp_path, [record], template)
        assert taught(data.train[0], tok) == '{"name": "add", "arguments": {"a": 2}}<|end|>'
        assert '"type": "function"' in tok.decode(data.train[0].ids)
    data, tok = made(tmp_path, [record], ENDLESS, end_of_turn="allow-missing")
    assert '"name": "add"' in taught(data.train[0], tok)
    assert sorted(data.ledger.notes) == [
        "tool calls written into the answer: the template has no place for them",
        "tools are not shown: the template has no place for them",
    ]


def test_template_from_the_plan_as_file_and_as_text_and_its_options(tmp_path: Path) -> None:
    greeting = "{{ greeting }}" + PLAIN
    (tmp_path / "chat.jinja").write_text(greeting)
    for given in (greeting, str(tmp_path / "chat.jinja")):
        data, tok = made(tmp_path, TALK, None, template=given, template_options={"greeting": "the mat"})
        assert tok.decode(data.train[0].ids).startswith("the mat<|bos|>") and data.template == greeting
    with pytest.raises(LuthierError, match="data.template: nowhere.jinja is neither a file"):
        made(tmp_path, TALK, None, template="nowhere.jinja")


def test_without_a_template_prompts_are_joined_and_conversations_refused(tmp_path: Path) -> None:
    data, tok = made(
        tmp_path, [{"prompt": "two?", "completion": "four"}, {"prompt": "two? ", "completion": "four"}], None
    )
    assert [tok.decode(data.train[i].ids) for i in (0, 1)] == ["<|bos|>two?\nfour<|end|>", "<|bos|>two? four<|end|>"]
    assert taught(data.train[0], tok) == "four<|end|>" and data.train[0].eot
    data, tok = made(tmp_path, [{"instruction": "sit", "input": "cat", "output": "sat"}], None)
    assert tok.decode(data.train[0].ids) == "<|bos|>### Task\nsit\n\n### Input\ncat\n\n### Answer\nsat<|end|>"
    assert taught(data.train[0], tok) == "sat<|end|>"
    data, tok = made(tmp_path, [{"text": "the cat"}], PLAIN)
    assert taught(data.train[0], tok) == "the cat<|end|>"
    with pytest.raises(
        LuthierError, match=r"data.jsonl:1: a conversation, but the tokenizer has no chat template; state data.template"
    ):
        made(tmp_path, TALK, None)


def test_special_tokens_in_a_records_own_words_are_counted(tmp_path: Path) -> None:
    data, tok = made(tmp_path, [chat("say <|end|> now", "four")])
    assert (
        data.ledger.notes == {"special tokens inside a record's own words": 1}
        and taught(data.train[0], tok) == "four<|end|>"
    )
