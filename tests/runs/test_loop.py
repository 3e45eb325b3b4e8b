"""What the loop must not let leak: evaluations into training, one piece's rate into another's, a skipped step into moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.training import loop as loop_room
from luthier.training.loop import evaluate
from luthier.training.run import build
from luthier.training.schedule import factor
from tests.runs.support import World, run

DROPOUT = {"form": "lora", "rank": 4, "dropout": 0.3}
NOISY = [DROPOUT, {"form": "gates", "sites": ["ffn"], "lr": 1e-3}]


def test_evaluations_change_nothing(world: World, tmp_path: Path) -> None:
    """Neither the random numbers of dropout and gates, nor the mode, nor the order of records."""
    held: dict[str, Any] = {"data": {"holdout": 8}, "train": {"steps": 8}}
    quiet = run(world.plan(NOISY, **held), tmp_path / "quiet")
    held["train"] = {"steps": 8, "eval_every": 1, "eval_batch_size": 3}
    watched = run(world.plan(NOISY, **held), tmp_path / "watched")
    assert quiet.losses == watched.losses and len(watched.evals) == 8
    assert all(torch.equal(v, watched.delta[k]) for k, v in quiet.delta.items())


def test_an_evaluation_draws_nothing(world: World, tmp_path: Path) -> None:
    training = build(world.plan(NOISY, data={"holdout": 8}), tmp_path, progress=False)
    training.base.model.train()
    state = torch.get_rng_state()
    losses = [evaluate(training.loop, training.data.eval_batches(size)) for size in (1, 4, 4)]
    assert losses[1] == losses[2] and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert training.base.model.training and torch.equal(state, torch.get_rng_state())


def test_a_piece_has_its_own_rate_and_decay(world: World, tmp_path: Path) -> None:
    """One step of plain gradient descent: each number moves by its piece's rate times its gradient."""
    pieces = [
        {"form": "lora", "name": "a", "sites": "attn.q", "lr": 1e-2},
        {"form": "lora", "name": "b", "sites": "attn.v", "weight_decay": 0.5},
        {"choice": "norm", "lr": 1e-4},
    ]
    train = {"optimiser": "sgd", "lr": 1e-3, "warmup": 0, "schedule": "constant", "clip": None, "steps": 1}
    training = build(world.plan(pieces, train=train), tmp_path, progress=False)
    numbers = training.loop.optimiser.names
    before = {k: v.detach().clone() for k, v in numbers.items()}
    grads: dict[str, torch.Tensor] = {}
    step = training.loop.optimiser.torch.step
    training.loop.optimiser.torch.step = lambda: (grads.update({k: v.grad.clone() for k, v in numbers.items()}), step())  # pyright: ignore
    training.train()
    rates = {"a": 1e-2, "b": 1e-3, "norm": 1e-4}
    assert {k.partition("/")[0] for k in numbers} == set(rates)
    for name, value in numbers.items():
        piece = name.partition("/")[0]
        decay = 0.5 * before[name] if piece == "b" else 0.0
        wanted = before[name] - rates[piece] * (grads[name] + decay)
        assert torch.allclose(value.detach(), wanted, atol=1e-7), name


def test_a_skipped_step_moves_nothing_and_counts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step's loss is no number: numbers and moments stay, the rate goes on as planned."""
    plan = world.plan(
        DROPOUT, train={"steps": 5, "non_finite": "skip", "accumulate": 2, "schedule": "linear", "warmup": 2}
    )
    training = build(plan, tmp_path, progress=False)
    seen: list[dict[str, torch.Tensor]] = []
    whole = loop_room.gradients

    def faulty(loop: Any, batches: Any) -> tuple[float, float]:
        names = loop.optimiser.names
        seen.append({k: v.detach().clone() for k, v in (names | loop.optimiser.state()).items()})
        total, weight = whole(loop, batches)
        return (float("nan"), weight) if loop.progress.step == 2 else (total, weight)

    monkeypatch.setattr(loop_room, "gradients", faulty)
    progress = training.train()
    assert progress.skipped == 1 and progress.step == 5 and training.loop.spec.max_skips >= 1
    assert all(torch.equal(v, seen[3][k]) for k, v in seen[2].items())
    assert any(not torch.equal(v, seen[4][k]) for k, v in seen[3].items())
    planned = [1e-2 * factor(s, 5, "linear", 2, 0.0) for s in range(5)]
    assert [row["lr"] for row in progress.curve] == pytest.approx(planned)
