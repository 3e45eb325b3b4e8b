"""Averages taken while a run goes on: what they end with, and that a resumed run ends with the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from luthier.delta import MERGES, Stack
from luthier.errors import LuthierError
from luthier.training.feed import all_ready
from luthier.training.loop import evaluate, train
from luthier.training.run import build
from tests.runs.support import World, assert_same, interrupted, run, write_records

RECIPES = Path(__file__).parents[2] / "luthier" / "recipes"
LORA = [{"form": "lora", "rank": 2, "sites": ["attn.q"]}]
FULL = [{"choice": "full"}]
SLOW = "luthier.training.averages:SlowWeights(momentum=0.75, every=2)"
STOCK = "luthier.training.averages:PeriodicStock(every=3)"


def watched(
    world: World, out: Path, delta: Any, callback: str, steps: int = 12, **sections: Any
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The trained numbers before step one and as every step left them before the callback, and those at the end."""
    training = build(
        world.plan(delta, train={"callbacks": [callback], "steps": steps}, **sections), out, progress=False
    )
    names = training.loop.optimiser.names
    copy = lambda: {k: p.detach().clone() for k, p in names.items()}  # noqa: E731
    seen, last = [copy()], training.loop.optimiser.torch.step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = last(*args, **kwargs)
        seen.append(copy())
        return result

    training.loop.optimiser.torch.step = step
    training.train()
    return seen, copy()


@pytest.mark.parametrize("delta", [LORA, FULL])
def test_slow_weights_are_the_closed_form(delta: Any, world: World, tmp_path: Path) -> None:
    seen, end = watched(world, tmp_path, delta, SLOW)
    every = seen[2::2]
    for name, start in seen[0].items():
        closed = 0.75 ** len(every) * start
        for k, fast in enumerate(reversed(every)):
            closed = closed + 0.25 * 0.75**k * fast[name]
        assert torch.allclose(end[name], closed, atol=1e-6) and not torch.equal(end[name], seen[-1][name])


def test_a_stream_of_tasks_in_one_run_is_met_in_order_by_weights_that_train_on(world: World, tmp_path: Path) -> None:
    """As the recipe states it: one task's records after the other's, and neither fast nor slow weights set back between."""
    paths = [str(world.records), str(tmp_path / "second.jsonl")]
    write_records(Path(paths[1]), 32, seed=1)
    recipe = yaml.safe_load((RECIPES / "slow-weights.yaml").read_text(encoding="utf-8"))
    data = {"train": paths, **{k: recipe["data"][k] for k in ("shuffle", "bucket")}}
    assert recipe["train"]["schedule"] == "constant" and len(recipe["data"]["train"]) == 2
    feed = build(world.plan(LORA, data=data), tmp_path / "order", progress=False).data.batches(4)
    met = [{paths[1] in where for where in batch["where"]} for batch in feed.one_epoch()]
    assert met == [{False}] * 16 + [{True}] * 8
    seen, end = watched(world, tmp_path / "run", LORA, SLOW, 24, data=data)
    for name, start in seen[0].items():
        closed = start
        for fast in seen[2::2]:
            closed = closed.lerp(fast[name], 0.25)
        assert torch.allclose(end[name], closed, atol=1e-6) and not torch.equal(end[name], start)


def test_slow_weights_leave_the_fast_ones_alone(world: World, tmp_path: Path) -> None:
    plain = run(world.plan(LORA), tmp_path / "plain")
    slow = run(world.plan(LORA, train={"callbacks": [SLOW]}), tmp_path / "slow")
    assert slow.losses == plain.losses


@pytest.mark.parametrize("delta", [LORA, FULL])
def test_periods_merge_two_branches_of_one_point(delta: Any, world: World, tmp_path: Path) -> None:
    seen, end = watched(world, tmp_path, delta, STOCK)
    merge = MERGES.make("model_stock", {})
    assert len(seen) == 13
    for name, start in seen[0].items():
        last = merge.merge(Stack(name, [seen[9][name], seen[12][name]], start))
        assert torch.allclose(end[name], last, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
def test_periods_that_end_early_keep_what_was_trained(steps: int, world: World, tmp_path: Path) -> None:
    seen, end = watched(world, tmp_path, LORA, STOCK, steps)
    for name, start in seen[0].items():
        last = seen[-1][name]
        if steps == 5:  # within the second branch
            last = MERGES.make("model_stock", {}).merge(Stack(name, [seen[3][name], last], start))
        assert torch.allclose(end[name], last, atol=1e-7)
    assert any(not torch.equal(end[name], start) for name, start in seen[0].items())


@pytest.mark.parametrize("callback", [SLOW, STOCK])
@pytest.mark.parametrize("step", [5, 10])
def test_resumed_ends_the_same(callback: str, step: int, world: World, tmp_path: Path) -> None:
    plan = world.plan(LORA, train={"callbacks": [callback]})
    whole = run(plan, tmp_path)
    assert_same(whole, interrupted(plan, tmp_path, step))


@pytest.mark.parametrize("other", [[], [STOCK], [SLOW, STOCK], [SLOW.replace("0.75", "0.5")]])
def test_resumed_with_other_averages_is_refused(other: list[str], world: World, tmp_path: Path) -> None:
    """They decide the numbers: leaving one out, or adding one, would be another run."""
    plan = world.plan(LORA, train={"callbacks": [SLOW]})
    run(plan, tmp_path)
    with pytest.raises(LuthierError, match="train.callbacks: the checkpoint holds the state of .*SlowWeights"):
        build(world.plan(LORA, train={"callbacks": other}), tmp_path, resume=True, progress=False)


def test_callbacks_without_a_state_may_come_and_go(world: World, tmp_path: Path) -> None:
    """Also in front of one that has a state."""
    whole = run(world.plan(LORA, train={"callbacks": [SLOW]}), tmp_path)
    told = ["tests.runs.hooks:note", SLOW]
    assert_same(whole, interrupted(world.plan(LORA, train={"callbacks": told}), tmp_path, 5))


@pytest.mark.parametrize("every", [5, 12], ids=["between", "with the last step"])
def test_the_last_loss_is_of_what_the_run_ends_with(every: int, world: World, tmp_path: Path) -> None:
    plan = world.plan(LORA, train={"callbacks": [SLOW], "eval_every": every}, data={"holdout": 8})
    training = build(plan, tmp_path, progress=False)
    train(training.loop)
    training.events.finish(training.loop)
    ends = training.loop.progress.evals
    assert [e["step"] for e in ends] == [*range(every, 12, every), 12]
    held_out = training.data.eval_batches(4, 0, 1)
    assert ends[-1]["loss"] == pytest.approx(evaluate(training.loop, all_ready(held_out, training.base, torch.float32)))


@pytest.mark.parametrize(
    "text", ["SlowWeights(momentum=2)", "SlowWeights(speed=1)", "SlowWeights(0.5)", "SlowWeights("]
)
def test_wrong_settings_are_one_line(text: str, world: World, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=r"train.callbacks: .*SlowWeights") as e:
        build(world.plan(LORA, train={"callbacks": [f"luthier.training.averages:{text}"]}), tmp_path, progress=False)
    assert "\n" not in str(e.value)


def test_both_decide_how_it_ends(world: World, tmp_path: Path) -> None:
    train = {"callbacks": [SLOW], "keep_best": True, "eval_every": 4}
    with pytest.raises(LuthierError, match=r"keep_best: false"):
        build(world.plan(LORA, train=train, data={"holdout": 8}), tmp_path, progress=False)
