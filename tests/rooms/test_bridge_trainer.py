"""The callback in transformers' Trainer and TRL's: whole runs pass and are described, broken ones stop before step one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from luthier.bridge.trainer import LuthierCallback
from luthier.errors import LuthierError
from tests.tiny import tiny, tiny_tokenizer

# These libraries warn of their own futures and of pinned memory without a GPU; none of that is ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def rows(n: int = 12) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    words = tiny_tokenizer()
    out = []
    for i in range(n):
        ids = torch.randint(10, 100, (6 + i % 4,), generator=g).tolist() + [words.eos_token_id]
        out.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return out


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(r["input_ids"]) for r in batch)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([r[key] + [fill] * (longest - len(r[key])) for r in batch])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def trainer(tmp_path: Path, data: list[dict[str, Any]], callback: LuthierCallback | None, **settings: Any) -> Trainer:
    arguments = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2} | settings
    args = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **arguments
    )
    return Trainer(
        tiny(),
        args,
        data_collator=collate,
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
        callbacks=[callback] if callback else [],
    )


def test_a_whole_run(tmp_path: Path) -> None:
    callback = LuthierCallback()
    watched = trainer(tmp_path / "a", rows(), callback)
    watched.train()
    told = json.loads((tmp_path / "a" / "luthier.json").read_text())
    assert told["ledger"]["rows"] == 12 and told["ledger"]["longest"] == 10
    assert told["ledger"]["supervised_per_row"] == {"min": 4, "median": 5.5, "max": 7, "zero": 0}
    assert told["ledger"]["ended_rows"] == 12 and not told["notes"]
    assert told["rehearsal"]["ok"] and told["rehearsal"]["length"] == 10 and told["rehearsal"]["grad_norm"] > 0
    assert told["probes"]["ok"] and told["probes"]["gap"] > 1e-3
    assert (tmp_path / "a" / "luthier-probes.safetensors").exists()
    plain = trainer(tmp_path / "b", rows(), None)
    plain.train()
    for (name, p), q in zip(watched.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q), f"the callback changed the run at {name}"


def test_nothing_supervised(tmp_path: Path) -> None:
    data = [{**r, "labels": [-100] * len(r["labels"])} for r in rows()]
    with pytest.raises(LuthierError, match="12 of the first 12 rows have no supervised token"):
        trainer(tmp_path, data, LuthierCallback()).train()
    assert json.loads((tmp_path / "luthier.json").read_text())["ledger"]["supervised_per_row"]["zero"] == 12


def test_one_row_unsupervised(tmp_path: Path) -> None:
    data = rows()
    data[4]["labels"] = [-100] * len(data[4]["labels"])
    with pytest.raises(LuthierError, match=r"1 of the first 12 rows .*rows 4"):
        trainer(tmp_path, data, LuthierCallback()).train()
    trainer(tmp_path, data, LuthierCallback(unsupervised="count")).train()


def test_only_the_first_token_supervised_is_nothing(tmp_path: Path) -> None:
    data = [{**r, "labels": [r["input_ids"][0]] + [-100] * (len(r["labels"]) - 1)} for r in rows()]
    with pytest.raises(LuthierError, match="no supervised token"):
        trainer(tmp_path, data, LuthierCallback()).train()


def test_end_of_turn_masked(tmp_path: Path) -> None:
    data = [{**r, "labels": [*r["labels"][:-1], -100]} for r in rows()]
    with pytest.raises(LuthierError, match="never learn to stop"):
        trainer(tmp_path, data, LuthierCallback()).train()
    callback = LuthierCallback(end_of_turn="allow-missing")
    trainer(tmp_path, data, callback).train()
    assert "12 of 12 rows end without" in callback.report["notes"][0]


def test_shifted_labels(tmp_path: Path) -> None:
    data = [{**r, "labels": [*r["labels"][1:], -100]} for r in rows()]
    with pytest.raises(LuthierError, match="shifted already"):
        trainer(tmp_path, data, LuthierCallback()).train()


def test_two_bos(tmp_path: Path) -> None:
    bos = tiny_tokenizer().bos_token_id
    data = [{"input_ids": [bos, bos, *r["input_ids"]], "labels": [-100, -100, *r["labels"]]} for r in rows()]
    callback = LuthierCallback()
    trainer(tmp_path, data, callback).train()
    assert any("12 rows begin with two BOS" in note for note in callback.report["notes"])


def test_nothing_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows(), LuthierCallback())
    for p in run.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(LuthierError, match="no parameter requires a gradient"):
        run.train()


def test_nothing_changed(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="answers exactly as before"):
        trainer(tmp_path, rows(), LuthierCallback(), learning_rate=0.0).train()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_full_disk_is_one_line(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if steps:
        monkeypatch.setattr("luthier.bridge.trainer.save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    said = rf"cannot write luthier's files in .* \(No space left on device\): free .*; {steps} steps were taken"
    with pytest.raises(LuthierError, match=said) as e:
        trainer(tmp_path, rows(), LuthierCallback()).train()
    assert "\n" not in str(e.value)


def sft(tmp_path: Path, tokenizer: Any, records: list[dict[str, Any]], **settings: Any) -> Any:
    args = trl.SFTConfig(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_steps=2, disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=2, learning_rate=1e-2, **{"max_length": 64} | settings,
    )  # fmt: skip
    return trl.SFTTrainer(
        tiny(),
        args,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4),
        callbacks=[LuthierCallback()],
    )


CHAT = [
    {"messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(8)
]


def test_trl_with_peft(tmp_path: Path) -> None:
    sft(tmp_path, tiny_tokenizer(), CHAT, assistant_only_loss=True).train()
    told = json.loads((tmp_path / "luthier.json").read_text())
    assert told["ledger"]["rows"] == 8 and told["ledger"]["ended_rows"] == 8
    assert told["ledger"]["supervised_per_row"]["median"] == len("it is 0") + 1
    assert told["probes"]["gap"] > 0


def test_trl_truncation_cuts_every_end(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="never learn to stop"):
        sft(tmp_path, tiny_tokenizer(), CHAT, assistant_only_loss=True, max_length=16).train()
    assert json.loads((tmp_path / "luthier.json").read_text())["ledger"]["at_limit_rows"] == 8
