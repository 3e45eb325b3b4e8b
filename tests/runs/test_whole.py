"""From a plan to everything a delta is for: tuned, loaded, verified, looked at, asked, exported, measured; once per kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import luthier
from luthier.attach import attached
from luthier.bases.load import load_base
from luthier.bridge.hf import export_hf
from luthier.bridge.target import target
from luthier.errors import LuthierError
from luthier.plan.schema import BaseSpec
from luthier.verbs import export, import_, inspect
from luthier.verbs.generate import Speaker
from luthier.verbs.load import load_all
from luthier.verbs.tune import Run
from tests.runs.support import World, write_records
from tests.tiny import tiny_ids

LORA = {"form": "lora", "rank": 4}
OWN_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CLASSES = {
    "causal": AutoModelForCausalLM,
    "classify": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def sums(folder: Path) -> str:
    write_records(folder / "sums.jsonl", 16)
    return str(folder / "sums.jsonl")


def talks(folder: Path) -> str:
    asked = [[{"role": "user", "content": c * 3}, {"role": "assistant", "content": c}] for c in "abcdefgh"]
    return lines(folder / "talks.jsonl", [{"messages": m} for m in asked])


def letters(folder: Path) -> str:
    return lines(folder / "letters.jsonl", [{"text": c * n, "label": c} for c in "abc" for n in range(3, 8)])


def copies(folder: Path) -> str:
    return lines(folder / "copies.jsonl", [{"prompt": c * n, "completion": c} for c in "abcd" for n in (1, 2, 3)])


def pluses(folder: Path) -> str:
    pairs = [(a, b) for a in range(4) for b in range(4)]
    return lines(folder / "pluses.jsonl", [{"prompt": f"{a}<plus>{b}=", "completion": str(a + b)} for a, b in pairs])


@dataclass(frozen=True)
class Kind:
    """One kind of run. `hf` and `peft` are None where the export works, else what its refusal says."""

    delta: Any
    records: Callable[[Path], str] = sums
    family: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    hf: str | None = None
    peft: str | None = None
    parent: bool = False


KINDS = {
    "lora": Kind(LORA),
    "lora-gpt2": Kind(LORA, family="gpt2"),
    "several": Kind(
        [LORA, {"form": "ia3"}, {"choice": "norm"}, {"form": "prefix", "length": 2}],
        hf="no weight change",
        peft="cannot hold",
    ),
    "hft": Kind({"choice": "hft"}, peft="moved parameters alone"),
    "classify": Kind(LORA, letters, "bert", base={"kind": "classify", "labels": ["a", "b", "c"]}),
    "classify-llama": Kind(LORA, letters, "llama", base={"kind": "classify", "labels": ["a", "b", "c"]}),
    "seq2seq": Kind(LORA, copies, "t5", base={"kind": "seq2seq"}),
    "new tokens": Kind(LORA, pluses, base={"new_tokens": ["<plus>"]}),
    "grown": Kind(LORA, pluses, settings={"vocab_size": 103}, base={"new_tokens": ["<plus>"]}),
    "grown, tied": Kind(
        LORA, pluses, settings={"vocab_size": 103, "tie_word_embeddings": True}, base={"new_tokens": ["<plus>"]}
    ),
    "template": Kind(LORA, talks, template=OWN_TEMPLATE),
    "parent": Kind({"form": "ia3"}, parent=True, peft="cannot hold"),
}


@dataclass
class Made:
    """A finished run of one kind and where it lies."""

    kind: Kind
    plan: dict[str, Any]
    run: Run

    @property
    def out(self) -> Path:
        return self.run.out

    @property
    def family(self) -> str:
        return self.kind.base.get("kind", "causal")

    @cached_property
    def tuned(self) -> Tensor:
        """Logits of the base with the delta on it, as luthier.load gives them."""
        return answers(luthier.load(self.plan["base"]["name"], [self.out]))


def plan_of(kind: Kind, base: Path, records: str, folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = {"train": records, "max_length": 64, "cache": False}
    if kind.template:
        path = folder / "own.jinja"
        path.write_text(kind.template, encoding="utf-8")
        data["template"] = str(path)
    return {
        "base": {"name": str(base), **kind.base},
        "data": data,
        "delta": kind.delta,
        "train": {"steps": 3, "batch_size": 4, "lr": 3e-2, "precision": "fp32"},
        "audit": {
            "target": [{"source": records, "max_new_tokens": 4}],
            "guards": [{"name": "text", "source": records, "metric": "loss"}] if kind.parent else [],
            "items": 6,
            "resamples": 100,
            "drift_tokens": 64 if kind.base.get("kind", "causal") == "causal" else 0,
        },
    }


def answers(model: Any) -> Tensor:
    ids = tiny_ids(2, 9) % 103
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One run of a kind; every test below looks at it."""
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("whole")
    plan = plan_of(kind, world.base(kind.family, **kind.settings), kind.records(folder), folder)
    if kind.parent:
        luthier.tune({**plan, "delta": LORA, "audit": {"enabled": False}}, out=folder / "parent", progress=False)
        plan["base"]["deltas"] = [str(folder / "parent")]
    return Made(kind, plan, luthier.tune(plan, out=folder / "out", progress=False))


def test_the_run_says_what_it_did(made: Made) -> None:
    report = json.loads((made.out / "report.json").read_text(encoding="utf-8"))
    own = [q for q in made.run.delta.pieces if not q.name.startswith("parent")]
    assert report["delta"]["moved"] == sum(q.count() for q in own) > 0
    assert report["norms"] and not any(row["site"].startswith("parent") for row in report["norms"])
    assert report["proof"]["seals"]["ok"] and report["audit"]["target"]
    assert (made.out / "report.html").stat().st_size > 1000 and made.run.verdict


def test_the_loaded_model_is_the_trained_one(made: Made, world: World) -> None:
    model, on = load_all(made.plan["base"]["name"], [made.out])
    with attached(model).off():
        base = answers(model)
    assert not torch.allclose(base, made.tuned, atol=1e-4)
    assert {p.name for p in made.run.delta.pieces} == set(attached(model).placed) | set(attached(model).edits)
    if made.family == "classify":
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    if made.kind.base.get("new_tokens"):
        assert on.tokenizer.convert_ids_to_tokens(on.new_rows) == ["<plus>"]


@pytest.mark.parametrize("full", [False, True], ids=["sampled", "full"])
def test_it_verifies(made: Made, full: bool) -> None:
    report = luthier.verify(made.out, full=full)
    assert report.ok, str(report)
    decided = {c.name for c in report.checks if c.ok}
    assert {"file", "norms", "base", "tokenizer", "template", "tensors", "seals"} <= decided, str(report)
    assert ("probes" in decided) or made.family != "causal", str(report)
    grown = bool(made.kind.base.get("new_tokens"))
    assert ("full fingerprint" in decided) == (full and not grown), str(report)


def test_it_can_be_inspected(made: Made) -> None:
    found = inspect(made.out)
    assert found["numbers"] == made.run.delta.count()
    assert [p["name"] for p in found["pieces"]] == [p.name for p in made.run.delta.pieces]
    assert all(p["size_by_layer"] for p in found["pieces"])
    assert found["lineage"]["steps"] == 3 and found["audit"]["verdict"]
    json.dumps(found)


def test_it_answers(made: Made) -> None:
    if made.family == "classify":
        with pytest.raises(LuthierError, match="classifier"):
            Speaker(made.plan["base"]["name"], [made.out])
        return
    speaker = Speaker(made.plan["base"]["name"], [made.out])
    given = speaker.answer(["aaa", "bb"], max_new_tokens=3)
    assert len(given) == 2 and given == speaker.answer(["aaa", "bb"], max_new_tokens=3, batch_size=1)
    if made.kind.template:
        assert speaker.tokenizer.decode(speaker.ids("aaa", raw=False)) == "[user] aaa\n[assistant] "


def exported(made: Made, to: str, out: Path) -> Path | None:
    """The written folder; None where the refusal is the one that the kind states, and nothing is left behind."""
    said = made.kind.hf if to == "hf" else made.kind.peft
    if said is None:
        return export(made.out, to, out)
    with pytest.raises(LuthierError, match=said):
        export(made.out, to, out)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return None


def test_a_plain_checkpoint_of_it(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Plain transformers gives the tuned logits; the card counts; verify finds the delta in it."""
    folder = exported(made, "hf", tmp_path / "hf")
    if folder is None:
        return
    assert "%|" not in capfd.readouterr().err, "no progress bars"
    model = CLASSES[made.family].from_pretrained(folder).eval()
    assert torch.allclose(answers(model), made.tuned, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert f"{made.run.delta.count():,} numbers" in (folder / "README.md").read_text(encoding="utf-8")
    for token in made.kind.base.get("new_tokens", []):
        assert tokenizer.tokenize(token) == [token]
    if made.kind.template:
        assert tokenizer.chat_template == made.kind.template
    report = luthier.verify(made.out, merged=folder)
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_peft_adapter_of_it(made: Made, tmp_path: Path) -> None:
    """PEFT gives the tuned logits, and luthier reads the folder back to the same."""
    folder = exported(made, "peft", tmp_path / "peft")
    if folder is None:
        return
    peft = pytest.importorskip("peft")
    name = made.plan["base"]["name"]
    extra = {"num_labels": 3} if made.family == "classify" else {}
    base = CLASSES[made.family].from_pretrained(name, **extra)
    if made.kind.base.get("new_tokens"):  # as their users do
        words = len(AutoTokenizer.from_pretrained(folder))
        if words > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(words, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert torch.allclose(answers(theirs), made.tuned, atol=1e-4)
    if not made.kind.base:
        back = import_(folder, tmp_path / "back", base=name)
        assert back.count() == made.run.delta.count()
        assert torch.allclose(answers(luthier.load(name, [tmp_path / "back"])), made.tuned, atol=1e-5)
    report = luthier.verify(folder, base=BaseSpec.model_validate(made.plan["base"]))
    served = next(c.detail for c in report.checks if c.name == "serving")
    assert ("modules_to_save" in served) == (made.family == "classify"), served
    assert [c.name for c in report.failed] == (["template"] if made.kind.template else []), str(report)


def test_it_can_be_measured_again(made: Made, tmp_path: Path) -> None:
    """The numbers are those of the report that the run wrote."""
    again = luthier.audit(made.out, out=tmp_path / "audit")
    found, wrote = ([*r["audit"]["target"], *r["audit"]["guards"]] for r in (again.report, made.run.report))
    assert [{k: c[k] for k in ("before", "after")} for c in found] == [
        {k: c[k] for k in ("before", "after")} for c in wrote
    ]
    assert (tmp_path / "audit" / "report.html").exists()


def test_a_handle_is_exported_as_it_stands(world: World, tmp_path: Path) -> None:
    """Moved parameters that are no piece yet are in the checkpoint and on its card too."""
    on = target(load_base(str(world.base())))
    handle = attached(on.model)
    handle.move("moved", {"model.norm.weight": None, "lm_head.weight": torch.arange(5)})
    with torch.no_grad():
        for _, value in handle.trained()["moved"]:
            value.add_(0.25)
    tuned = answers(on.model)
    export_hf(on, handle, tmp_path / "hf")
    assert torch.allclose(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()), tuned, atol=1e-5)
    assert "A delta of 37 numbers" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
