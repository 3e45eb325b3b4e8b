"""What draws anew while a run goes on: released entries, entries that become whole, scores, decay, and evaluations without a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.choices.engine import Choice, ChoiceContext, Items, Selection
from luthier.delta import CHOICES
from luthier.training import events
from luthier.training.run import Training, build
from tests.runs.support import World, assert_same, interrupted, run

NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"
DRAWS: list[Selection] = []
"""What the choice below takes in its draws, one after another."""


@dataclass(frozen=True)
class Stated(Choice):
    """Takes what DRAWS states."""

    def select(self, items: Items, ctx: ChoiceContext) -> Selection:
        return dict(DRAWS[ctx.step // self.every])


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the draws of the choice 'stated'."""
    CHOICES["full"]  # everything is read by now
    monkeypatch.setitem(CHOICES._found, "stated", Stated)

    def draws(*selections: Mapping[str, Tensor | None]) -> None:
        DRAWS[:] = [dict(s) for s in selections]

    return draws


def ended(plan: Any, out: Path) -> tuple[Training, dict[str, Tensor]]:
    """A trained run and its changes of the base, by parameter."""
    training = build(plan, out, progress=False)
    before = {n: p.detach().clone() for n, p in training.base.model.named_parameters() if ".luthier." not in n}
    training.train()
    model = training.base.model
    return training, {n: (model.get_parameter(n).detach() - v).flatten() for n, v in before.items()}


def test_released_entries_return(stated: Any, world: World, tmp_path: Path) -> None:
    """Entries of a parameter that goes on moving in others, and those of one that is left alone."""
    first, then = torch.arange(0, 40), torch.arange(20, 60)
    stated({NAME: first, OTHER: first}, {NAME: then})
    delta = {"choice": "stated", "every": 5, "released": "return"}
    plan = world.plan(delta, train={"steps": 10})
    whole = run(plan, tmp_path / "whole")
    training, moved = ended(plan, tmp_path / "again")
    assert not moved[OTHER].any()
    assert moved[NAME].nonzero().flatten().tolist() == then.tolist()
    assert training.loop.progress.step == 10
    assert_same(whole, interrupted(plan, tmp_path / "whole", back_to=5))


def test_released_entries_stay(stated: Any, world: World, tmp_path: Path) -> None:
    first, then = torch.arange(0, 40), torch.arange(20, 60)
    stated({NAME: first, OTHER: first}, {NAME: then})
    _, moved = ended(world.plan({"choice": "stated", "every": 5}, train={"steps": 10}), tmp_path)
    assert moved[OTHER].nonzero().flatten().tolist() == first.tolist()
    assert moved[NAME].nonzero().flatten().tolist() == list(range(60))


def test_entries_that_become_whole(stated: Any, world: World, tmp_path: Path) -> None:
    """A parameter of which entries moved and that is then drawn whole moves as a whole, and resumes."""
    stated({NAME: torch.arange(0, 40)}, {NAME: None}, {NAME: torch.arange(7)})
    plan = world.plan({"choice": "stated", "every": 4}, checkpoint={"every": 6})
    whole = run(plan, tmp_path / "whole")
    _, moved = ended(plan, tmp_path / "again")
    assert bool((moved[NAME] != 0).all())
    assert_same(whole, interrupted(plan, tmp_path / "whole", back_to=6))


def test_entries_of_a_matrix_decay_as_the_matrix_does(stated: Any, world: World, tmp_path: Path) -> None:
    """Their rate of decay is that of the parameter they are entries of: a matrix decays, a norm does not."""
    norm = "model.layers.0.input_layernorm.weight"
    stated({NAME: torch.arange(0, 40), norm: torch.arange(3)})
    training = build(
        world.plan({"choice": "stated", "every": 99}, train={"weight_decay": 0.1}), tmp_path, progress=False
    )
    found = {len(p): g["weight_decay"] for g in training.loop.optimiser.torch.param_groups for p in g["params"]}
    assert found == {40: 0.1, 3: 0.0}


def test_an_evaluation_without_a_number_is_not_the_best(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([float("nan"), 2.0, 3.0, float("nan"), 1.0, 4.0])
    monkeypatch.setattr(events, "evaluate", lambda loop, batches: next(losses))
    plan = world.plan(
        {"form": "lora", "rank": 2}, data={"holdout": 8}, train={"eval_every": 2, "keep_best": True, "early_stop": 4}
    )
    training = build(plan, tmp_path, progress=False)
    training.train()
    assert training.loop.progress.best == {"step": 10, "loss": 1.0}


def test_fisher_is_the_mean_of_squares_not_the_square_of_the_mean(world: World, tmp_path: Path) -> None:
    """Over the first 32 rows of the data, one by one; the same entries as by hand."""
    order: dict[str, Any] = {"data": {"shuffle": False, "bucket": 1}}
    drawn = build(world.plan({"choice": "norm", "fraction": 0.25}, **order), tmp_path, progress=False).handle.edits
    training = build(world.plan({"choice": "norm"}, **order), tmp_path / "whole", progress=False)
    model, data = training.base.model.eval(), training.data
    norms = list(training.handle.edits["norm"])
    squares, sums = {n: torch.tensor(0.0) for n in norms}, {n: torch.tensor(0.0) for n in norms}
    for row in range(32):
        model.zero_grad()
        loss, count = training.loop.objective(training.loop.view(data._collate(False)([[data.train[row]]])))
        (loss / count).backward()
        for n in norms:
            grad = model.get_parameter(n).grad
            squares[n], sums[n] = squares[n] + grad.square(), sums[n] + grad

    def best(scores: dict[str, Tensor]) -> set[tuple[str, int]]:
        places = [(n, k) for n in norms for k in range(len(scores[n]))]
        flat = torch.cat([scores[n] for n in norms])
        return {places[k] for k in flat.topk(round(0.25 * len(flat))).indices.tolist()}

    taken = {(n, int(k)) for n, e in drawn["norm"].items() for k in (e.index if e.index is not None else range(32))}
    assert taken == best(squares) != best({n: v.square() for n, v in sums.items()})
