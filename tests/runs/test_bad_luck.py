"""What goes wrong during a run is told in one line, at once, and loses nothing; what proves a run is broken on purpose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.delta import OBJECTIVES
from luthier.errors import LuthierError
from luthier.training import checkpoint, events
from luthier.training.run import Training, build
from luthier.training.view import View
from tests.runs.support import World, assert_same, run

LORA = {"form": "lora", "rank": 4}


def poisoned(training: Training, steps: set[int]) -> None:
    """The loss of these steps is not a number."""
    real = training.loop.objective

    def objective(view: View) -> tuple[Any, Any]:
        total, count = real(view)
        return (total * math.nan if training.loop.progress.step + 1 in steps else total), count

    training.loop.objective = objective


def test_non_finite_loss_stops_at_that_step(world: World, tmp_path: Path) -> None:
    training = build(world.plan(LORA), tmp_path, progress=False)
    poisoned(training, {8})
    with pytest.raises(LuthierError, match="step 8: the loss is not finite; its 4 records are in .*step-00000005") as e:
        training.train()
    assert "\n" not in str(e.value)
    rows = [json.loads(line) for line in (tmp_path / "non-finite-step-8-rank-0.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all("records.jsonl" in str(r["where"]) and r["ids"] for r in rows)
    assert training.loop.progress.step == 7, "nothing was counted as done"
    for values in training.loop.optimiser.names.values():
        assert bool(values.isfinite().all()), "and nothing was stepped"
    good = build(world.plan(LORA), tmp_path, resume=True, progress=False)
    assert good.loop.progress.step == 5


def test_non_finite_gradient_stops(world: World, tmp_path: Path) -> None:
    training = build(world.plan(LORA, train={"clip": None}), tmp_path, progress=False)
    parameter = next(iter(training.loop.optimiser.names.values()))
    parameter.register_hook(lambda grad: grad * math.inf if training.loop.progress.step == 2 else grad)
    with pytest.raises(LuthierError, match="step 3: the gradient norm is not finite"):
        training.train()


def test_a_run_that_fails_leaves_the_base_its_own_forward(world: World, tmp_path: Path) -> None:
    training = build(world.plan(LORA), tmp_path, progress=False)
    assert training.fitted.fused["norms"] and training.fitted.selector is not None
    poisoned(training, {2})
    with pytest.raises(LuthierError, match="step 2"):
        training.train()
    assert not [m for m in training.base.model.modules() if "forward" in m.__dict__]
    ids = torch.tensor([[3, 4, 5]])
    assert training.base.model(input_ids=ids).logits.shape[1] == 3


def test_skipping_counts_and_goes_on(world: World, tmp_path: Path) -> None:
    training = build(world.plan(LORA, train={"non_finite": "skip"}), tmp_path, progress=False)
    poisoned(training, {3, 8})
    progress = training.train()
    assert progress.step == 12 and progress.skipped == 2
    assert [row["step"] for row in progress.curve if not math.isfinite(row["loss"])] == [3, 8]
    assert all(bool(p.isfinite().all()) for p in training.loop.optimiser.names.values())
    assert len(list(tmp_path.glob("non-finite-step-*"))) == 2


def test_too_many_skips_stop(world: World, tmp_path: Path) -> None:
    training = build(world.plan(LORA, train={"non_finite": "skip", "max_skips": 2}), tmp_path, progress=False)
    poisoned(training, {2, 4, 6, 8})
    with pytest.raises(LuthierError, match="step 6"):
        training.train()
    assert training.loop.progress.skipped == 3


@pytest.mark.parametrize(("steps", "stopped"), [(3, False), (4, False), (5, True)])
def test_a_run_of_all_its_steps_was_not_stopped_early(
    steps: int, stopped: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is best at step 2 and evaluated again at 3, by the run's end, or at 4."""
    monkeypatch.setattr(events, "evaluate", lambda loop, batches: float(loop.progress.step))
    train = {"steps": steps, "eval_every": 2, "early_stop": 1}
    end = run(world.plan(LORA, data={"holdout": 8}, train=train), tmp_path)
    assert bool(end.stopped) == stopped and len(end.evals) == 2 and len(end.curve) == min(steps, 4)


# -- rehearsal


def test_memory_failure_is_one_line_before_step_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: View) -> Any:
        if len(self.batch["where"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self)

    real = View.inputs
    monkeypatch.setattr(View, "inputs", full)
    with pytest.raises(LuthierError, match=r"the longest batch \(4 × 19 tokens\) does not fit in memory: lower") as e:
        build(world.plan(LORA), tmp_path, progress=False)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "checkpoints").exists()


def test_other_errors_are_not_called_memory(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = View.inputs

    def wrong(self: View) -> Any:
        if len(self.batch["where"]) > 3:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return real(self)

    monkeypatch.setattr(View, "inputs", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        build(world.plan(LORA), tmp_path, progress=False)


@pytest.mark.parametrize(
    "delta",
    [
        {**LORA, "dropout": 0.3},
        {"choice": "full"},
        {"choice": "top-gradient", "fraction": 0.02},
        [{"choice": "lisa", "every": 3, "layers_active": 1}],
    ],
    ids=["lora", "full", "entries", "lisa"],
)
def test_rehearsal_changes_nothing(delta: Any, world: World, tmp_path: Path) -> None:
    """Numbers, base, moments and random state are bitwise what they are without it; so is the run."""
    with_it = build(world.plan(delta), tmp_path / "a", progress=False)
    state = torch.get_rng_state()
    without = build(world.plan(delta, train={"rehearse": False}), tmp_path / "b", progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert "rehearsal" in with_it.record and "rehearsal" not in without.record
    assert with_it.record["rehearsal"]["length"] == 19
    one, two = (checkpoint.tensors_of(t.handle, t.loop.optimiser) for t in (with_it, without))
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    assert not any(k.startswith("optimiser|") for k in one)
    base = dict(with_it.base.model.named_parameters())
    assert all(torch.equal(v, base[k]) for k, v in without.base.model.named_parameters())
    assert all(p.grad is None for p in base.values())
    assert_same(
        run(world.plan(delta), tmp_path / "c"), run(world.plan(delta, train={"rehearse": False}), tmp_path / "d")
    )


# -- known answers


def test_mean_instead_of_sum_is_caught(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classical fault: rows of unequal length averaged one by one."""
    real = OBJECTIVES["sft"].__call__

    def averaged(self: Any, view: View) -> tuple[Any, Any]:
        total, count = real(self, view)
        return total / count, count / count

    monkeypatch.setattr(OBJECTIVES["sft"], "__call__", averaged)
    lines = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "a", "completion": "long answer " * 2}]
    path = tmp_path / "unequal.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in lines * 4))
    with pytest.raises(LuthierError, match="k small batches and one large batch differ"):
        build(world.plan(LORA, data={"train": str(path)}), tmp_path / "out", progress=False)


def test_leaking_mask_is_caught(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.training import feed

    real = feed.segment_mask
    monkeypatch.setattr(feed, "segment_mask", lambda segments, dtype: real(segments.clamp(max=1), dtype))
    with pytest.raises(LuthierError, match="packed and unpacked records differ"):
        build(world.plan(LORA, data={"packing": True}), tmp_path, progress=False)


def test_positions_that_do_not_restart_are_caught(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = View.inputs

    def running(self: View) -> Any:
        given = real(self)
        if "mask_4d" in self.batch:
            given["position_ids"] = torch.arange(given["input_ids"].shape[1]).expand_as(given["input_ids"])
        return given

    monkeypatch.setattr(View, "inputs", running)
    with pytest.raises(LuthierError, match="packed and unpacked records differ"):
        build(world.plan(LORA, data={"packing": True}, base=str(world.base("gpt2"))), tmp_path, progress=False)


PACKS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox"]
PACKS += ["opt", "mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("family", PACKS)
def test_families_that_pack(family: str, world: World, tmp_path: Path) -> None:
    """Packed records give the log-probabilities they give alone."""
    plan = world.plan({"choice": "norm"}, data={"packing": True}, base=str(world.base(family)))
    found = build(plan, tmp_path, progress=False).record["known_answers"]["packed = unpacked"]
    assert found["ok"] and found["error"] < 1e-4


def test_a_family_that_cannot_pack_is_refused_packing(world: World, tmp_path: Path) -> None:
    """BLOOM's positions come from a mask of whole rows, and cannot restart; unpacked it trains."""
    base = str(world.base("bloom"))
    with pytest.raises(LuthierError, match="does not take the mask of packed records .* set data.packing: false"):
        build(world.plan({"choice": "norm"}, data={"packing": True}, base=base), tmp_path / "a", progress=False)
    assert len(run(world.plan({"choice": "norm"}, base=base, train={"steps": 2}), tmp_path / "b").curve) == 2
