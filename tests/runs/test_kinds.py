"""Bases of every kind learn something trivial; new tokens train and travel; turns and roles carry the loss they should."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.delta.artefact import Delta
from luthier.training.run import build
from luthier.verbs.tune import tune
from tests.runs.support import World, assert_same, interrupted, run

LORA = {"form": "lora", "rank": 4}


def lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("delta", [LORA, {"choice": "full"}], ids=["lora", "full"])
def test_classification_learns(delta: Any, family: str, world: World, tmp_path: Path) -> None:
    """Which letter the text repeats."""
    draw = random.Random(0)
    records = [{"text": c * draw.randint(3, 8), "label": c} for c in "abc" * 16]
    plan = world.plan(
        delta,
        base={"name": str(world.base(family, initializer_range=0.2)), "kind": "classify", "labels": ["a", "b", "c"]},
        data={"train": lines(tmp_path / "d.jsonl", records)},
        train={"steps": 40, "batch_size": 12, "lr": 1e-2 if delta is LORA else 5e-3},
        checkpoint={"every": 0},
    )
    losses = run(plan, tmp_path / "out").losses
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0] and losses[0] < 3


def test_sequence_to_sequence_learns(world: World, tmp_path: Path) -> None:
    """T5 copies one letter."""
    records = [{"prompt": c * n, "completion": c} for c in "abcd" for n in (1, 2, 3, 5)]
    plan = world.plan(
        {"choice": "full"},
        base={"name": str(world.base("t5")), "kind": "seq2seq"},
        data={"train": lines(tmp_path / "d.jsonl", records)},
        train={"steps": 25, "batch_size": 8, "lr": 1e-2},
        checkpoint={"every": 0},
    )
    losses = run(plan, tmp_path / "out").losses
    assert losses[-1] < 0.5 * losses[0]


def test_new_tokens_train_and_travel(world: World, tmp_path: Path) -> None:
    """Only the new rows move; they and the tokenizer are in the delta, and come back with it."""
    records = [{"prompt": f"{a}<plus>{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]
    plan = world.plan(
        {**LORA, "sites": "attn.q"},
        base={"name": str(world.base()), "new_tokens": ["<plus>"]},
        data={"train": lines(tmp_path / "d.jsonl", records)},
        train={"steps": 8},
        checkpoint={"every": 3},
    )
    result = tune(plan, out=tmp_path / "out", progress=False)
    training = build(plan, tmp_path / "fresh", progress=False)
    tokenizer, model = training.base.tokenizer, training.base.model
    new = tokenizer.convert_tokens_to_ids("<plus>")
    assert training.base.new_rows and new in training.base.new_rows
    before = model.get_input_embeddings().weight.detach().clone()
    piece = next(p for p in Delta.load(tmp_path / "out").pieces if p.name.startswith("new"))
    rows = {int(i) // before.shape[1] for f in piece.fixed.values() for i in f["index"]}
    assert rows == set(training.base.new_rows)
    training.handle.detach()
    result.delta.apply(model, strict=False)
    after = model.get_input_embeddings().weight.detach()
    assert not torch.equal(after[new], before[new])
    old = [i for i in range(len(before)) if i not in training.base.new_rows]
    assert torch.equal(after[old], before[old])
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "<plus>" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_new_tokens_where_all_embeddings_train(world: World, tmp_path: Path) -> None:
    """The choice takes the new rows over, also when resumed."""
    records = [{"prompt": f"{a}<plus>{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]
    plan = world.plan(
        {"choice": "full"},
        base={"name": str(world.base()), "new_tokens": ["<plus>"]},
        data={"train": lines(tmp_path / "d.jsonl", records)},
        train={"steps": 8},
    )
    whole = run(plan, tmp_path / "out")
    assert_same(whole, interrupted(plan, tmp_path / "out", back_to=5))
    assert any("embed_tokens" in k for k in whole.moments)


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    ("data", "weight"),
    [
        ({}, len("yes") + len("no") + 2),
        ({"loss_on": "last"}, len("no") + 1),
        ({"role_weights": {"user": 0.5}}, len("yes") + len("no") + 2 + 0.5 * (len("hi") + len("more") + 2)),
    ],
    ids=["assistant", "last", "per role"],
)
def test_turns_carry_their_loss(data: dict[str, Any], weight: float, world: World, tmp_path: Path) -> None:
    """The weight of a step is the sum over what is supervised: characters and ends of turn."""
    path = lines(tmp_path / "d.jsonl", [{"messages": TALK}] * 8)
    training = build(
        world.plan(LORA, data={"train": path, **data}, train={"steps": 2}, checkpoint={"every": 0}),
        tmp_path / "out",
        progress=False,
    )
    progress = training.train()
    per_row = progress.supervised / 8
    assert per_row == pytest.approx(weight, abs=1.0 if "role_weights" in data else 0)
