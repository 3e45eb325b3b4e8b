"""The practice base: its tokenizer, its trainer on a tiny scale, and the base in the package itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from luthier.errors import LuthierError
from luthier.practice import card, world
from luthier.practice.card import ASSET
from luthier.practice.families._moves import ends, moves_in
from luthier.practice.muon import orthogonal
from luthier.practice.stream import PROMPT_WEIGHT, Stream
from luthier.practice.train_base import Run, Size, load_state, new_model, optimisers, train

BUILT = (ASSET / "model.safetensors").is_file()
needs_base = pytest.mark.skipif(not BUILT, reason="the practice base is not built; run make practice-base")

TINY = Size(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64)
SHORT = Run(tokens=20 * 4 * 72, rows=4, length=72, warmup=4)


@pytest.fixture(scope="module")
def tokenizer():
    """The one in the package, or one learnt now where there is none."""
    if not BUILT:
        from luthier.practice import tokenizer

        return tokenizer.train()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSET, local_files_only=True)


@pytest.mark.parametrize(
    "text", ["Zürich — 北京 \n\n  tab\t{'a': 1}", "  two  spaces ", "1234 + 5", "", "naïve 🎻 luthier"]
)
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_are_one_token_each_and_pad_is_not_the_end(tokenizer):
    assert len(tokenizer("90210")["input_ids"]) == 5
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|end|>"
    for mark in ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>"):
        assert len(tokenizer(mark)["input_ids"]) == 1


def test_the_tokenizer_in_the_package_is_what_the_generator_gives():
    if not BUILT:
        pytest.skip("the practice base is not built; run make practice-base")
    from luthier.practice import tokenizer

    assert (
        json.loads(tokenizer.train().backend_tokenizer.to_str())["model"]
        == json.loads((ASSET / "tokenizer.json").read_text())["model"]
    )


def test_generation_marks_hold_the_answers_and_their_ends_and_nothing_else(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Count them."},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "two", "reasoning_content": "one, two"},
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(spoken) == "two<|end|><think>one, two</think>two<|end|>"
    assert tokenizer.decode(out["input_ids"]).startswith(
        "<|system|>Be kind.<|end|><|user|>Count them.<|end|><|assistant|>"
    )


def test_template_renders_tools_and_calls(tokenizer):
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "find", "arguments": {"thing": "key"}}}
    messages = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "My key?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "in the box"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text.count("<|system|>") == 1 and json.dumps(tools) in text
    assert '<|assistant|>{"name": "find", "arguments": {"thing": "key"}}<|end|><|tool|>in the box<|end|>' in text
    assert text.endswith("<|assistant|>")


def test_training_text_is_what_the_template_gives(tokenizer):
    """Token for token and weight for weight, record by record, and only of taught families."""
    stream = Stream(tokenizer, 8, 128)
    rows = next(stream)
    seen = 0
    for r in range(8):
        for segment in range(1, int(rows.segment[r].max()) + 1):
            inside = rows.segment[r] == segment
            ids, weight = rows.ids[r][inside].tolist(), rows.weight[r][inside].tolist()
            text = tokenizer.decode(ids)
            turns = [t for t in text.split("<|end|>") if t]
            messages = [{"role": t[2 : t.index("|>")], "content": t[t.index("|>") + 2 :]} for t in turns]
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            assert out["input_ids"] == ids
            assert [w == 1.0 for w in weight] == [bool(m) for m in out["assistant_masks"]]
            assert {round(w, 6) for w in weight} <= {0.0, 1.0, PROMPT_WEIGHT}
            seen += 1
    assert seen > 16
    assert all(set(wheel) == set(world.FIRST) <= set(world.taught()) for wheel in stream.wheels)


@pytest.mark.parametrize("family", ["inventory", "tracking"])
def test_what_the_text_asks_besides_is_in_no_test_split(tokenizer, family):
    """Further questions about a text of the train split are a record's own, or have a meaning that train owns; what is told
    as the answer is right."""
    stream = Stream(tokenizer, 32, 128, mixture={family: 1})
    besides = 0
    for turns in (stream._draw()[0].split("<|end|>") for _ in range(400)):
        asked = [t.removeprefix("<|user|>") for t in turns if t.startswith("<|user|>")]
        said = [t.removeprefix("<|assistant|>") for t in turns if t.startswith("<|assistant|>")]
        told = asked[0][: asked[0].rindex(". ") + 2]
        for question, answer in zip(asked[1:], said[1:], strict=True):
            record = {"messages": [{"role": "user", "content": told + question}], "answer": "", "family": family}
            assert world.split_of(family, world.meaning(record)) == "train"
            at = ends(moves_in(record))
            thing, pairs = question.split()[-1][:-1], answer.split()
            if thing in at:
                assert answer == f"In the {at[thing]}."
            else:
                assert dict(zip(pairs[::2], pairs[1::2], strict=True)) == at
            besides += 1
    assert besides > 200


def test_a_stream_goes_on_where_another_stood(tokenizer):
    first = Stream(tokenizer, 4, 128)
    for _ in range(3):
        next(first)
    second = Stream(tokenizer, 4, 128, first.drawn, first.tokens)
    assert (next(first).ids == next(second).ids).all()
    assert first.tokens == second.tokens > 0


def test_records_in_a_row_do_not_see_each_other(tokenizer):
    """The loss of a row is the same whatever record stands before another one in it."""
    from luthier.practice.train_base import loss_of

    model = new_model(TINY, tokenizer, 0).eval()
    rows = next(Stream(tokenizer, 4, 128))
    rows.weight[rows.segment == 1] = 0.0
    before = loss_of(model, rows, torch.device("cpu"), bf16=False)
    rows.ids[rows.segment == 1] = 7
    assert torch.equal(before, loss_of(model, rows, torch.device("cpu"), bf16=False))


def test_orthogonal_brings_singular_values_near_one():
    g = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=g)))
        assert 0.5 < values.min() and values.max() < 1.3


def test_trainer_learns_and_resumes_bit_for_bit(tmp_path, tokenizer):
    whole = train(tmp_path / "whole", SHORT, TINY, tokenizer=tokenizer)
    assert len(whole) == 20 and whole[-1] < whole[0] - 0.5
    parts = train(tmp_path / "parts", SHORT, TINY, stop_at=7, tokenizer=tokenizer)
    assert not (tmp_path / "parts" / "base").exists()
    parts += train(tmp_path / "parts", SHORT, TINY, tokenizer=tokenizer)
    assert parts == whole
    one, two = ((tmp_path / p / "base" / "model.safetensors").read_bytes() for p in ("whole", "parts"))
    assert one == two
    told = json.loads((tmp_path / "whole" / "base" / "training.json").read_text())
    assert told["steps"] == 20 and 0 < told["tokens"] <= SHORT.tokens

    model, _ = card.load(tmp_path / "whole" / "base")
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in new_model(TINY, tokenizer, 0).parameters()
    )


def test_another_run_in_the_same_folder_is_refused(tmp_path, tokenizer):
    train(tmp_path, SHORT, TINY, stop_at=1, tokenizer=tokenizer)
    with pytest.raises(LuthierError, match=r"run\.lr: 0\.003 before, 0\.1 now"):
        train(tmp_path, Run(**{**SHORT.__dict__, "lr": 0.1}), TINY, tokenizer=tokenizer)


def test_checkpoint_holds_every_parameter_and_moment(tmp_path, tokenizer):
    train(tmp_path, SHORT, TINY, stop_at=2, tokenizer=tokenizer)
    model = new_model(TINY, tokenizer, 1)
    opts = optimisers(model, SHORT)
    assert load_state(tmp_path, model, opts)[0] == 2
    held = sum(len(o.state) for o in opts)
    assert held == sum(1 for _ in model.parameters())


def test_a_missing_base_is_one_line(tmp_path: Path):
    with pytest.raises(LuthierError, match="no model in"):
        card.load(tmp_path)


@pytest.fixture(scope="module")
def base():
    """Model and tokenizer of the package."""
    return card.load()


@needs_base
def test_the_base_is_small_and_its_card_is_its_own(base):
    size = (ASSET / "model.safetensors").stat().st_size
    told = json.loads((ASSET / "card.json").read_text())
    assert size <= 12_000_000
    assert 3_000_000 <= told["parameters"] <= 6_000_000
    assert told["parameters"] == sum(p.numel() for p in base[0].parameters())
    assert set(told["scores"]) == set(world.families()) and told["items"] >= 200
    assert card.page(told) == (ASSET / "README.md").read_text()


@needs_base
def test_the_base_knows_what_it_was_taught_and_not_the_rest(base):
    told = json.loads((ASSET / "card.json").read_text())
    assert {*told["taught"]} == {*world.taught()} and {*told["never_taught"]} == {*world.untaught()}
    assert all(told["scores"][family]["test"] >= 0.8 for family in told["taught"])
    assert all(told["scores"][family]["test"] <= 0.1 for family in told["never_taught"])
    known = card.score(*base, "refusals", "test", 50)
    unknown = card.score(*base, "translate", "test", 50)
    assert known >= 0.8 and unknown <= 0.1


@needs_base
def test_the_card_says_what_the_base_does(base):
    """One score of the card measured again, on all its records."""
    told = json.loads((ASSET / "card.json").read_text())
    again = card.score(*base, "lists", "test", told["items"])
    assert again == pytest.approx(told["scores"]["lists"]["test"], abs=0.02)


@needs_base
def test_one_family_can_be_measured_by_itself(tmp_path):
    """The others' figures stay; a card of another number of items, or without them, is refused."""
    shutil.copytree(ASSET, tmp_path / "base")
    told = json.loads((ASSET / "card.json").read_text())
    with pytest.raises(LuthierError, match="measure all families"):
        card.measure(tmp_path / "base", told["items"] + 1, ["lists"])
    changed = {**told, "items": 4, "scores": {**told["scores"], "lists": {"train": -1.0}}}
    (tmp_path / "base" / "card.json").write_text(json.dumps(changed))
    again = card.measure(tmp_path / "base", 4, ["lists"])
    assert {k: v for k, v in again["scores"].items() if k != "lists"} == {
        k: v for k, v in told["scores"].items() if k != "lists"
    }
    assert set(again["scores"]["lists"]) == set(world.SPLITS) and again["items"] == 4
    assert again["scores"]["lists"]["test"] >= 0.5
