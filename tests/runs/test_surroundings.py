"""What stands around a run: trackers, callbacks, the progress bar, the log, constant memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.bases.hardware import resident_memory
from luthier.errors import LuthierError
from luthier.training.run import build
from tests.runs import hooks
from tests.runs.support import World, run, write_records

LORA = {"form": "lora", "rank": 4}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_curve(world: World, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = world.plan(LORA, train={"report_to": "tensorboard", "steps": 4, "eval_every": 2}, data={"holdout": 8})
    end = run(plan, tmp_path)
    files = list((tmp_path / "logs").rglob("events.out.*"))
    assert files
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    scalars = {e.step: e.value for e in events.Scalars("loss")}
    assert scalars == pytest.approx(dict(enumerate(end.losses, 1)))
    assert [e.step for e in events.Scalars("eval_loss")] == [2, 4]


def test_missing_tracker_is_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.training import machine

    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(LuthierError, match=r"train.report_to: wandb is not installed: pip install 'luthier\[wandb\]'"):
        build(world.plan(LORA, train={"report_to": ["wandb"]}), tmp_path, progress=False)


def test_callbacks_are_told(world: World, tmp_path: Path) -> None:
    hooks.seen.clear()
    train = {"callbacks": ["tests.runs.hooks:note"], "steps": 4, "eval_every": 2}
    run(world.plan(LORA, train=train, data={"holdout": 8}, checkpoint={"every": 3}), tmp_path)
    assert hooks.seen == [
        *[("begin", 0), ("step", 1), ("eval", 2), ("step", 2), ("step", 3), ("save", 3)],
        *[("eval", 4), ("step", 4), ("end", 4)],
    ]


@pytest.mark.parametrize("name", ["tests.runs.hooks:nothing", "tests.runs.nowhere:note", "nothing"])
def test_unknown_callback_is_one_line(name: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=f"train.callbacks: cannot find '{name}'.*write module:function"):
        build(world.plan(LORA, train={"callbacks": [name]}), tmp_path, progress=False)


def test_bar_is_silent_without_a_terminal(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    training = build(world.plan(LORA, train={"steps": 3}), tmp_path, progress=True)
    training.train()
    assert training.events.bar is not None
    out, err = capfd.readouterr()
    assert out.strip() == "" and err.strip() == ""


def test_log_has_every_step(world: World, tmp_path: Path) -> None:
    end = run(world.plan(LORA, train={"log_every": 5}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [5, 10, 12]
    assert rows[-1]["loss"] == end.losses[-1] and {"lr", "grad_norm", "tokens", "seconds"} <= set(rows[-1])


@pytest.mark.slow
def test_streaming_takes_constant_memory(world: World, tmp_path: Path) -> None:
    """20,000 records go by, a window at a time."""
    path = tmp_path / "many.jsonl"
    write_records(path, 20_000)
    data: dict[str, Any] = {"train": str(path), "stream": True, "window": 256}
    training = build(world.plan(LORA, data=data, train={"batch_size": 64}), tmp_path / "out", progress=False)
    feed = training.events.batches
    for _ in range(20):
        next(feed)
    before, read = resident_memory(), 0
    for _ in range(280):
        read += len(next(feed)["where"])
    assert read > 17_000
    assert resident_memory() - before < 60 * 2**20
