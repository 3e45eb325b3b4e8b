"""Checks read from records: the metric that fits, the prompt that inference would make, the loss that training has."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.measuring.sources import default_name, drawn, prepare_check, prepare_checks
from luthier.plan.schema import AuditSpec, CheckSpec, DataSpec, SourceSpec

DATA = Path(os.environ.get("LUTHIER_DATA", "../shared/data"))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer(chat: bool = True) -> Any:
    """Bytes as tokens, with a start token that the tokenizer adds and an end-of-turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<end>", "<user>", "<assistant>", "<system>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="<end>",
                                  additional_special_tokens=special[3:])  # fmt: skip
    out.chat_template = TEMPLATE if chat else None
    return out


def base(kind: str = "causal", chat: bool = True, **spec: Any) -> Any:
    config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    return SimpleNamespace(
        tokenizer=tokenizer(chat), kind=kind, model=SimpleNamespace(config=config), spec=SimpleNamespace(**spec)
    )


def written(folder: Path, records: list[dict[str, Any]], name: str = "records.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def check(path: str, **more: Any) -> CheckSpec:
    return CheckSpec.model_validate({"source": {"path": path}, **more})


def test_a_prompt_is_what_inference_would_make(tmp_path):
    path = written(tmp_path, [{"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"},
    ]}])  # fmt: skip
    made = prepare_check(base(), check(path), "target")
    [item] = made.items
    assert (
        tokenizer().decode(item.source)
        == "<system>be brief<end><user>2+2?<end><assistant>4<end><user>3+3?<end><assistant>"
    )
    assert item.expected == "6" and item.prompt.endswith("user: 3+3?") and made.metric.name == "exact"
    assert made.metric.verify is not None and made.metric.verify(dict(item.record), " 6 ").passed


def test_without_a_template_prompt_and_row_agree(tmp_path):
    path = written(tmp_path, [{"prompt": "two", "completion": "deux"}])
    asked = prepare_check(base(chat=False), check(path), "target").items[0]
    lost = prepare_check(base(chat=False), check(path, metric="loss"), "guard").items[0]
    assert tokenizer(False).decode(asked.source) == "<s>two\n"
    assert lost.ids[: len(asked.source)] == asked.source
    supervised = [i for i, w in zip(lost.ids, lost.weights, strict=True) if w]
    assert tokenizer(False).decode(supervised) == "deux<end>"


@pytest.mark.parametrize(
    ("record", "metric"),
    [
        ({"text": "once upon a time"}, "loss"),
        ({"prompt": "q", "completion": "so it is 4\n#### 4"}, "number"),
        ({"instruction": "q", "input": "", "output": "a"}, "exact"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "exact"),
    ],
)
def test_auto_chooses_by_the_records(tmp_path, record, metric):
    made = prepare_check(base(), check(written(tmp_path, [record])), "guard")
    assert made.metric.name == metric
    if metric != "loss":
        right = "a" if metric == "exact" else "I think 4"
        assert made.metric.verify is not None and made.metric.verify(dict(made.items[0].record), right).passed


def test_classes_by_name(tmp_path):
    path = written(tmp_path, [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}])
    made = prepare_check(base("classify", labels=["neg", "pos"]), check(path), "target")
    assert made.metric.name == "accuracy" and [i.label for i in made.items] == [1, 0]
    with pytest.raises(LuthierError, match="kind classify"):
        prepare_check(base(), check(path, metric="accuracy"), "target")


def my_metric(record: dict[str, Any], response: str, bonus: float = 0.0) -> float:
    return 0.5 + bonus


def test_own_metric_and_its_options(tmp_path):
    path = written(tmp_path, [{"prompt": "q", "completion": "a"}])
    made = prepare_check(base(), check(path, metric=f"{__name__}:my_metric", metric_options={"bonus": 0.25}), "target")
    assert made.metric.verify is not None and made.metric.verify({}, "x").reward == 0.75
    for more in (
        {"metric": "exatc"},
        {"metric": "loss", "metric_options": {"x": 1}},
        {"metric": "exact", "metric_options": {"x": 1}},
    ):
        with pytest.raises(LuthierError):
            prepare_check(base(), check(path, **more), "target")


def test_draw_is_seeded_ordered_and_bounded(tmp_path):
    one = drawn(iter(range(500)), 50, seed=1)
    assert one == drawn(iter(range(500)), 50, seed=1) == sorted(one) and len(set(one)) == 50
    assert one != drawn(iter(range(500)), 50, seed=2) and max(one) > 250
    assert drawn(iter(range(3)), 50, seed=1) == [0, 1, 2]
    endless = iter(lambda: 1, 0)
    assert len(drawn(endless, 5, seed=0)) == 5


def test_names_are_unique_and_speak(tmp_path):
    assert default_name(SourceSpec(path="practice:translate", split="shifted")) == "translate, shifted"
    assert default_name(SourceSpec(path="data/gsm8k/test.jsonl")) == "gsm8k/test"
    path = written(tmp_path, [{"prompt": "q", "completion": "a"}])
    spec = AuditSpec.model_validate(
        {"target": [{"source": path, "name": "x"}], "guards": [{"source": path, "name": "x"}] * 2}
    )
    assert [p.name for p in prepare_checks(base(), spec)] == ["x", "x (2)", "x (3)"]


def test_records_that_cannot_be_measured_are_counted(tmp_path):
    path = written(tmp_path, [{"prompt": "q" * 60, "completion": "a"}, {"prompt": "q", "completion": "a"}])
    data = DataSpec.model_validate({"train": path, "max_length": 40})
    made = prepare_check(base(), check(path, metric="loss"), "guard", data=data)
    assert len(made.items) == 1 and sum(made.dropped.values()) == 1
    short = data.model_copy(update={"max_length": 4})
    with pytest.raises(LuthierError, match="no record to measure on"):
        prepare_check(base(), check(path, metric="loss"), "guard", data=short)


def test_an_answer_labelled_false_is_no_reference(tmp_path):
    """Unpaired preferences: their undesirable answers are neither right nor trained; a stated answer still is one."""
    path = written(tmp_path, [
        {"prompt": "1+1=", "completion": "2", "label": True},
        {"prompt": "1+1=", "completion": "3", "label": False},
        {"prompt": "2+2=", "completion": "5", "label": False, "answer": "4"},
    ])  # fmt: skip
    made = prepare_check(base(), check(path), "target")
    assert made.metric.name == "exact" and [i.expected for i in made.items] == ["2", "4"]
    assert made.dropped == {"labelled false": 1}
    assert len(prepare_check(base(), check(path, metric="loss"), "target").items) == 1
    rows = [{"prompt": "1+1=", "completion": str(n), "label": int(n == 2)} for n in (1, 2, 3)]
    numbers = prepare_check(base(), check(written(tmp_path, rows, "numbers.jsonl")), "target")
    assert [i.expected for i in numbers.items] == ["2"] and numbers.dropped == {"labelled false": 2}
    bad = written(tmp_path, [{"prompt": "1+1=", "completion": "3", "label": False}], "bad.jsonl")
    with pytest.raises(LuthierError, match="no record to measure on: 1 labelled false"):
        prepare_check(base(), check(bad), "target")


def test_the_runs_template_is_used(tmp_path):
    path = written(tmp_path, [{"prompt": "q", "completion": "a"}])
    data = DataSpec.model_validate({"train": path, "template": TEMPLATE.replace("<assistant>", "<assistant>=")})
    assert (
        tokenizer()
        .decode(prepare_check(base(), check(path), "target", data=data).items[0].source)
        .endswith("<assistant>=")
    )


def test_practice_records_are_judged_by_their_family():
    made = prepare_check(base(), CheckSpec.model_validate("practice:translate"), "target", items=5)
    assert made.metric.name == "practice" and made.name == "translate" and len(made.items) == 5
    for item in made.items:
        assert made.metric.verify is not None and item.expected is not None
        assert made.metric.verify(dict(item.record), item.expected).passed
        assert not made.metric.verify(dict(item.record), "no idea").passed


@pytest.mark.skipif(not DATA.is_dir(), reason="no real records: set LUTHIER_DATA")
@pytest.mark.parametrize(
    ("source", "metric"),
    [
        ({"path": "gsm8k/test.jsonl", "columns": {"prompt": "question", "completion": "answer"}}, "number"),
        ({"path": "scan/tasks_test_simple.txt", "pattern": "IN: (?P<prompt>.*) OUT: (?P<completion>.*)"}, "exact"),
        ({"path": "text/wikitext-2.test.txt"}, "loss"),
        ({"path": "instructions/instruction-data.json"}, "exact"),
    ],
)
def test_real_records(source, metric):
    spec = CheckSpec.model_validate({"source": source | {"path": str(DATA / source["path"])}})
    made = prepare_check(base(), spec, "guard", items=20)
    assert made.metric.name == metric and len(made.items) == 20
    if metric == "number":
        assert made.metric.verify is not None
        assert all(made.metric.verify(dict(i.record), i.expected or "").passed for i in made.items)
