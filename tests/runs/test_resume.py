"""A resumed run gives bit for bit what the uninterrupted one gives, or refuses to be one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.training import certificate, events
from luthier.training.run import build
from tests.runs.support import World, assert_same, interrupted, run, write_records

DROPOUT = {"form": "lora", "rank": 4, "dropout": 0.2}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora with dropout": (DROPOUT, {}),
    "full": ({"choice": "full"}, {}),
    "lisa redrawn every 3": ({"choice": "lisa", "every": 3, "layers_active": 1}, {}),
    "lisa returning": ({"choice": "lisa", "every": 3, "layers_active": 1, "released": "return"}, {}),
    "hft": ({"choice": "hft"}, {}),
    "hft redrawn": ({"choice": "hft", "every": 2}, {}),
    "top-gradient entries": ({"choice": "top-gradient", "fraction": 0.02}, {}),
    "random entries redrawn": ({"choice": "random-entries", "fraction": 0.02, "every": 4}, {}),
    "random entries returning": ({"choice": "random-entries", "fraction": 0.02, "every": 3, "released": "return"}, {}),
    "fisher's entries of the norms": ({"choice": "norm", "fraction": 0.3, "every": 4}, {}),
    "picked rows redrawn, decaying": (
        {"choice": "pick", "granularity": "row", "count": 20, "of": ["ffn"], "every": 3},
        {"train": {"weight_decay": 0.1}},
    ),
    "two pieces, own rates": (
        [{"choice": "top-gradient", "fraction": 0.01, "lr": 3e-3}, {**DROPOUT, "sites": "attn", "lr": 2e-2}],
        {},
    ),
    "accumulation of 3": (DROPOUT, {"train": {"accumulate": 3}}),
    "packing": (DROPOUT, {"data": {"packing": True, "max_length": 48}, "train": {"batch_size": 2}}),
    "streaming": (DROPOUT, {"data": {"stream": True, "window": 16}}),
    "streaming and packing": (
        DROPOUT,
        {"data": {"stream": True, "window": 16, "packing": True, "max_length": 48}, "train": {"batch_size": 2}},
    ),
    "best kept": (DROPOUT, {"data": {"holdout": 8}, "train": {"eval_every": 2, "keep_best": True}}),
    "best of a choice kept": (
        {"choice": "lisa", "every": 3, "layers_active": 1},
        {"data": {"holdout": 8}, "train": {"eval_every": 2, "keep_best": True}},
    ),
    "early best of a choice kept": (
        {"choice": "lisa", "every": 5, "layers_active": 1},
        {"data": {"holdout": 8}, "train": {"eval_every": 2, "keep_best": True}},
    ),
    "early best of entries kept": (
        {"choice": "random-entries", "every": 5, "fraction": 0.1},
        {"data": {"holdout": 8}, "train": {"eval_every": 2, "keep_best": True}},
    ),
    "early stop": (
        DROPOUT,
        {"data": {"holdout": 8}, "train": {"eval_every": 1, "keep_best": True, "early_stop": 2, "lr": 3.0}},
    ),
    "activation checkpointing": (DROPOUT, {"train": {"checkpointing": True}}),
    "bf16 form": (DROPOUT, {"train": {"precision": "bf16"}}),
    "bf16 full": ({"choice": "full"}, {"train": {"precision": "bf16"}}),
    "bf16 lisa": ({"choice": "lisa", "every": 3, "layers_active": 1}, {"train": {"precision": "bf16"}}),
    "bf16 entries": ({"choice": "top-gradient", "fraction": 0.02}, {"train": {"precision": "bf16"}}),
    "pat, which counts steps": (
        [{"form": "pat", "rank": 2, "keep": 0.75, "steps": 12, "sites": ["attn.o", "ffn.down"]}],
        {},
    ),
    "sgd": (DROPOUT, {"train": {"optimiser": "sgd"}}),
}


def best_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations whose best is at a known step, before a redraw."""
    monkeypatch.setattr(events, "evaluate", lambda loop, batches: 1.0 + abs(loop.progress.step - step))


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted(name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta, sections = CASES[name]
    if name.startswith("early best"):
        best_at(4, monkeypatch)
    every = 2 if name == "early stop" else 5
    plan = world.plan(delta, checkpoint={"every": every}, **sections)
    whole = run(plan, tmp_path)
    if name == "early stop":
        assert whole.stopped and whole.stopped.startswith("early") and len(whole.curve) < 12
    rest = interrupted(plan, tmp_path, back_to=every)
    assert_same(whole, rest)
    proof = rest.record["resume_certificate"]
    assert proof["step"] == every and proof["loss_equal"] and proof["settings"] == proof["next_records"] == "same"


@pytest.mark.parametrize(
    "delta",
    [{"choice": "lisa", "every": 5, "layers_active": 1}, {"choice": "random-entries", "every": 5, "fraction": 0.1}],
)
def test_best_is_the_model_of_that_evaluation(
    delta: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where later redraws moved other parameters: those return to the base."""
    best_at(4, monkeypatch)
    rest: dict[str, Any] = {"eval_every": 2, "schedule": "constant"}
    held: dict[str, Any] = {"data": {"holdout": 8}}
    best = run(world.plan(delta, train={**rest, "keep_best": True}, **held), tmp_path / "best")
    short = run(world.plan(delta, train={**rest, "steps": 4}, **held), tmp_path / "short")
    moved = {k: v for k, v in best.delta.items() if bool(v.any())}
    assert moved
    same = {k: v for k, v in short.delta.items() if bool(v.any())}
    assert set(moved) == set(same) and all(torch.equal(moved[k], same[k]) for k in moved)


def test_resuming_twice(world: World, tmp_path: Path) -> None:
    """Resumed at 3, and again at 9 from what that resume wrote."""
    plan = world.plan(
        [DROPOUT, {"choice": "lisa", "every": 2, "layers_active": 1, "sites": "ffn"}], checkpoint={"every": 3}
    )
    whole = run(plan, tmp_path)
    assert_same(whole, interrupted(plan, tmp_path, back_to=3))
    assert_same(whole, interrupted(plan, tmp_path, back_to=9))


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint at step 5 of a LoRA run."""
    out = tmp_path_factory.mktemp("stopped")
    run(world.plan(DROPOUT, train={"steps": 6}), out)
    return out


def refused(world: World, out: Path, **sections: Any) -> str:
    train = {"steps": 6, **sections.pop("train", {})}
    with pytest.raises(LuthierError) as caught:
        build(world.plan(sections.pop("delta", DROPOUT), train=train, **sections), out, resume=True, progress=False)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"train": {"batch_size": 2}}, "train.batch_size: 4 → 2"),
        ({"train": {"lr": 1e-3}}, "train.lr: 0.01 → 0.001"),
        ({"train": {"accumulate": 2}}, "train.accumulate: 1 → 2"),
        ({"train": {"steps": 7}}, "train.steps: 6 → 7"),
        ({"train": {"seed": 1}}, "train.seed: 0 → 1"),
        ({"delta": {**DROPOUT, "rank": 8}}, "delta.0.rank: 4 → 8"),
        ({"data": {"max_length": 32}}, "data.max_length: 64 → 32"),
        ({"data": {"shuffle": False}}, "data.shuffle: True → False"),
    ],
)
def test_other_settings_are_named(sections: dict[str, Any], named: str, world: World, stopped: Path) -> None:
    assert named in refused(world, stopped, **sections)


def test_harmless_settings_may_change(world: World, stopped: Path) -> None:
    plan = world.plan(DROPOUT, train={"steps": 6, "log_every": 3}, checkpoint={"every": 2})
    assert build(plan, stopped, resume=True, progress=False).record["resume_certificate"]["loss_equal"]


def test_changed_file_is_refused(world: World, tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    write_records(data, 32)
    run(world.plan(DROPOUT, data={"train": str(data)}, train={"steps": 6}), tmp_path / "out")
    write_records(data, 32, seed=1)
    assert "data, tokenizer or template changed" in refused(world, tmp_path / "out", data={"train": str(data)})


def test_changed_template_is_refused(world: World, tmp_path: Path) -> None:
    """The plan is the same; the template lies in the tokenizer's folder and was changed there."""
    base = tmp_path / "base"
    base.mkdir()
    for path in world.base().iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    run(world.plan(DROPOUT, base=str(base), train={"steps": 6}), tmp_path / "out")
    template = base / "chat_template.jinja"
    template.write_text("\n" + template.read_text().replace("<|assistant|>", "<|assistant|> "))
    assert "data, tokenizer or template changed" in refused(world, tmp_path / "out", base=str(base))


def test_other_base_of_the_same_shapes_is_refused(world: World, tmp_path: Path) -> None:
    """Weights exchanged under the same folder name: the next loss, not the settings, gives it away."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    base.mkdir()
    for path in world.base().iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    run(world.plan(DROPOUT, base=str(base), train={"steps": 6}), tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert "next loss" in refused(world, tmp_path / "out", base=str(base))


def test_other_number_of_processes_is_refused(world: World, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.training.machine import Machine

    monkeypatch.setattr(Machine, "world", property(lambda self: 2))
    assert "the run had 1 processes, now there are 2" in refused(world, stopped)


def test_thread_count_is_told(world: World, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of threads sums in another order: no error, but on record."""
    real = certificate.versions()
    monkeypatch.setattr(certificate, "versions", lambda: real | {"threads": 16})
    record = build(world.plan(DROPOUT, train={"steps": 6}), stopped, resume=True, progress=False).record
    assert record["resume_certificate"]["changed"] == {"threads": [1, 16]}


def test_nothing_to_resume(world: World, tmp_path: Path) -> None:
    assert "nothing to resume" in refused(world, tmp_path)


def test_checkpoint_is_complete_and_plain(world: World, stopped: Path) -> None:
    """Two files, no pickle; tensors of numbers and moments; everything else in readable JSON."""
    folder = stopped / "checkpoints" / "step-00000005"
    assert sorted(p.name for p in folder.iterdir()) == ["state.json", "tensors.safetensors"]
    state = json.loads((folder / "state.json").read_text())
    assert {"plan", "progress", "data", "choices", "random", "certificate", "data_fingerprint"} <= set(state)
    assert state["certificate"]["versions"]["threads"] == torch.get_num_threads()
    assert len(state["certificate"]["next"][0]["where"]) == 4
    from luthier.training.loop import Progress

    assert set(state["progress"]) == {f.name for f in dataclasses.fields(Progress)}
