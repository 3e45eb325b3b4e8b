"""Every objective keeps the contract: what it declares, sums that add up, the reference that is the base, and resuming."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from luthier.data.collate import Collate
from luthier.delta import OBJECTIVES
from luthier.errors import LuthierError
from luthier.training.feed import ready, split
from luthier.training.goal import Began
from luthier.training.loop import train
from luthier.training.proof import first_rows
from luthier.training.run import Training, build
from luthier.training.view import View
from luthier.verbs.dry_run import dry_run
from luthier.verbs.tune import tune
from tests.runs.support import World, assert_same, interrupted, run

LORA, FULL = {"form": "lora", "rank": 4}, {"choice": "full"}
EVERY = {name: OBJECTIVES[name].kinds[0] for name in OBJECTIVES}
"""Objective -> a kind of base it is for."""
FAMILY = {"causal": "llama", "seq2seq": "t5", "classify": "bert"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("objectives"))


def records(kind: str, pair: bool) -> list[dict[str, Any]]:
    """Sixteen records of unequal length."""
    ones = range(1, 17)
    if kind == "classify":
        return [{"text": "abc"[n % 3] * n, "label": "abc"[n % 3]} for n in ones]
    if pair:
        return [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no" * (1 + n % 3)} for n in ones]
    return [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in ones]


def plan_of(name: str, world: World, tmp_path: Path, delta: Any = FULL, **sections: Any) -> Any:
    kind = EVERY[name]
    path = tmp_path / "records.jsonl"
    rows = records(kind, hasattr(OBJECTIVES[name], "rows"))
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    base = {"name": str(world.base(FAMILY[kind])), "kind": kind}
    return world.plan(
        delta,
        base=base | ({"labels": ["a", "b", "c"]} if kind == "classify" else {}),
        data={"train": str(path)},
        objective=sections.pop("objective", name),
        **sections,
    )


def whole(training: Training, n: int = 4) -> Any:
    """The first rows as one batch."""
    data = training.data
    lines = [[row] for row in first_rows(data, n)]
    return ready(Collate(data.pad_id, data.kind)(lines), training.base, torch.float32)


@pytest.mark.parametrize("name", EVERY)
def test_declares_what_it_is_for(name: str) -> None:
    objective = OBJECTIVES[name]
    assert set(objective.kinds) <= set(FAMILY) and objective.needs and objective.__doc__
    known = {n for n in dir(View) if not n.startswith("_")}
    assert set(objective.needs) <= known


@pytest.mark.parametrize("delta", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", EVERY)
def test_parts_add_up(name: str, delta: Any, world: World, tmp_path: Path) -> None:
    """Rows one by one, a batch in parts and the whole batch have one sum, one count and one gradient."""
    training = build(plan_of(name, world, tmp_path, delta), tmp_path / "out", progress=False)
    train(training.loop)  # away from the start, where a reference says the same as the model
    loop, data = training.loop, training.data
    training.base.model.eval()

    def taken(batches: list[Any]) -> tuple[float, float, torch.Tensor]:
        total, count = 0.0, 0.0
        for batch in batches:
            loss, weight = loop.objective(loop.view(batch))
            loss.backward()
            total, count = total + float(loss.detach()), count + float(weight)
        flat = torch.cat([p.grad.flatten() for p in loop.optimiser.names.values() if p.grad is not None])
        loop.optimiser.torch.zero_grad(set_to_none=True)
        return total, count, flat

    batch = whole(training)
    wide = batch["input_ids"].shape[1] * (2 if "pairs" in batch else 1)
    one = taken([batch])
    single = [ready(Collate(data.pad_id, data.kind)([[r]]), training.base, torch.float32) for r in first_rows(data, 4)]
    parts = split(batch, 2 * wide)
    assert len(parts) == 2 and len(single) == 4
    for other in (taken(parts), taken(single)):
        assert other[0] == pytest.approx(one[0], rel=1e-4) and other[1] == one[1]
        assert float((other[2] - one[2]).norm() / one[2].norm()) < 1e-3


@pytest.mark.parametrize("delta", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", [n for n in EVERY if "reference" in OBJECTIVES[n].needs])
def test_the_reference_is_the_base(name: str, delta: Any, world: World, tmp_path: Path) -> None:
    """After training too, bit for bit, and looking at it changes neither the model nor a gradient."""
    training = build(plan_of(name, world, tmp_path, delta), tmp_path / "out", progress=False)
    batch, loop = whole(training), training.loop
    training.base.model.eval()
    first = loop.view(batch)
    before = first.logprobs.detach().clone()
    assert torch.equal(first.reference.logprobs, before)
    train(training.loop)
    model = training.base.model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    view = loop.view(batch)
    loss, _ = loop.objective(view)
    loss.backward()
    got = {k: p.grad.clone() for k, p in loop.optimiser.names.items() if p.grad is not None}
    assert torch.equal(view.reference.logprobs, before) and not view.reference.logits.requires_grad
    assert not torch.allclose(view.logprobs, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    # the same loss with what the reference said held fixed
    loop.optimiser.torch.zero_grad(set_to_none=True)
    held = View(loop.machine.model, batch, view.selector, view.kind)
    held.__dict__["reference"] = view.reference
    loop.objective(held)[0].backward()
    for key, p in loop.optimiser.names.items():
        assert p.grad is None or torch.equal(p.grad, got[key])


def test_the_reference_keeps_earlier_deltas(world: World, tmp_path: Path) -> None:
    """A run on top of a delta is held to the base with that delta on."""
    first = tune(plan_of("sft", world, tmp_path, LORA), out=tmp_path / "first", progress=False)
    plan = plan_of("dpo", world, tmp_path, FULL)
    plan.base.deltas = [str(tmp_path / "first")]
    training = build(plan, tmp_path / "second", progress=False)
    training.base.model.eval()
    said = training.loop.view(whole(training)).reference.logprobs.clone()
    assert first.delta.pieces
    for name in list(training.pieces.parents):
        training.handle.detach(name)
    assert not torch.allclose(training.loop.view(whole(training)).reference.logprobs, said)


@pytest.mark.parametrize("delta", [LORA, FULL], ids=["lora", "full"])
def test_the_reference_is_where_a_run_goes_on_from(delta: Any, world: World, tmp_path: Path) -> None:
    """What goes on from an earlier delta is held to that delta, not to the bare base; also once it is resumed."""
    first = tune(plan_of("sft", world, tmp_path, delta), out=tmp_path / "first", progress=False)
    plan = plan_of("dpo", world, tmp_path, {**delta, "start_from": str(tmp_path / "first")})
    training = build(plan, tmp_path / "second", progress=False)
    training.base.model.eval()
    batch = whole(training)
    then = training.loop.view(batch).logprobs.detach().clone()
    bare = build(plan_of("dpo", world, tmp_path, delta), tmp_path / "bare", progress=False)
    bare.base.model.eval()
    assert first.delta.pieces and not torch.allclose(bare.loop.view(batch).logprobs, then)
    done = run(plan, tmp_path / "out")
    assert done.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    train(training.loop)
    training.base.model.eval()
    assert torch.equal(training.loop.view(batch).reference.logprobs, then)
    again = build(plan, tmp_path / "out", resume=True, progress=False)
    again.base.model.eval()
    view = again.loop.view(batch)
    assert not torch.allclose(view.logprobs, then) and torch.equal(view.reference.logprobs, then)


def test_a_wrong_reference_is_caught(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare base in place of the delta that a run goes on from, as trainers of adapters take it."""
    tune(plan_of("sft", world, tmp_path, LORA), out=tmp_path / "first", progress=False)
    plan = plan_of("dpo", world, tmp_path, {**LORA, "start_from": str(tmp_path / "first")})
    known = build(plan, tmp_path / "right", progress=False).record["known_answers"]
    assert known["starts at its reference"] == {"ok": True, "error": 0.0, "allowed": 2e-3}
    monkeypatch.setattr(Began, "off", lambda self: self.handle.off())
    with pytest.raises(LuthierError, match="the model and its reference differ by"):
        build(plan, tmp_path / "wrong", progress=False)


@pytest.mark.parametrize("delta", [LORA, FULL, [LORA, {"form": "ia3"}]], ids=["lora", "full", "two"])
def test_preference_loss_starts_at_ln_2(delta: Any, world: World, tmp_path: Path) -> None:
    done = run(plan_of("dpo", world, tmp_path, delta, train={"steps": 1}), tmp_path / "out")
    assert done.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def by_hand(training: Training, batch: Any, model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p of the supervised tokens, as [2B, T] with zeros elsewhere; and where they are."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    told = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    here = (batch["weights"][:, 1:] > 0).float()
    return told * here, here, batch["weights"].amax(1)


def test_preferences_by_hand(world: World, tmp_path: Path) -> None:
    """DPO and ORPO from the model's logits and those of a copy of the base, by their formulas."""
    plan = plan_of("dpo", world, tmp_path, FULL)
    base = copy.deepcopy(build(plan, tmp_path / "x", progress=False).base.model)
    training = build(plan, tmp_path / "out", progress=False)
    train(training.loop)
    batch = whole(training)
    training.base.model.eval()
    with torch.no_grad():
        told, here, _ = by_hand(training, batch, training.base.model)
        then, _, _ = by_hand(training, batch, base.eval())
        view = training.loop.view(batch)
        change = told.sum(1) - then.sum(1)
        margin = 0.3 * (change[:4] - change[4:])
        dpo = OBJECTIVES.make("dpo", {"beta": 0.3, "smoothing": 0.1})
        total, count = dpo(view)
        wanted = -(0.9 * logsigmoid(margin) + 0.1 * logsigmoid(-margin)).sum()
        assert float(total) == pytest.approx(float(wanted), rel=1e-4) and float(count) == 4
        p = (told.sum(1) / here.sum(1)).exp()
        odds = p / (1 - p)
        total, count = OBJECTIVES.make("orpo", {"weight": 0.7})(view)
        wanted = (-p[:4].log() - 0.7 * logsigmoid((odds[:4] / odds[4:]).log())).sum()
        assert float(total) == pytest.approx(float(wanted), rel=1e-3) and float(count) == 4


def test_an_anchor_by_hand(world: World, tmp_path: Path) -> None:
    """Nothing at the start; then KL over the vocabulary, or mean squares of logits; and it holds."""
    plans = {
        w: plan_of("anchored", world, tmp_path, FULL, objective={"name": "anchored", "weight": w}) for w in (0, 50)
    }
    told = plan_of("sft", world, tmp_path, FULL)
    free, held = (run(p, tmp_path / f"w{w}") for w, p in plans.items())
    plain = run(told, tmp_path / "plain")
    assert free.losses == pytest.approx(plain.losses, rel=1e-4)
    assert held.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    training = build(plans[50], tmp_path / "again", progress=False)
    train(training.loop)
    training.base.model.eval()
    with torch.no_grad():
        view = training.loop.view(whole(training))
        now, then = view.logits.log_softmax(-1), view.reference.logits.log_softmax(-1)
        kl = torch.nn.functional.kl_div(now, then, log_target=True, reduction="none").sum(-1)
        squares = (view.logits - view.reference.logits).square().mean(-1)
        for distance, apart in {"kl": kl, "mse": squares}.items():
            total, count = OBJECTIVES.make("anchored", {"weight": 3.0, "distance": distance})(view)
            assert float(total) == pytest.approx(float((3 * apart - view.logprobs).sum()), rel=1e-4)
            assert float(count) == len(apart)
    loose = build(plans[0], tmp_path / "loose", progress=False)
    train(loose.loop)
    loose.base.model.eval()
    with torch.no_grad():
        free_view = loose.loop.view(whole(loose))
        assert (free_view.logits - free_view.reference.logits).norm() > 2 * (view.logits - view.reference.logits).norm()


def test_preferences_are_learnt(world: World, tmp_path: Path) -> None:
    """The better answer gains on the worse one, under both objectives."""
    for name in ("dpo", "orpo"):
        training = build(plan_of(name, world, tmp_path, LORA, train={"steps": 25}), tmp_path / name, progress=False)
        train(training.loop)
        with torch.no_grad():
            view = training.loop.view(whole(training, 8))
            off = View(view.model, view.batch, view.selector, off=training.handle.off)
            gained = view.answers.logprobs - off.reference.answers.logprobs
        assert float((gained[:8] - gained[8:]).mean()) > 1


@pytest.mark.parametrize("name", EVERY)
def test_resumes_bit_for_bit(name: str, world: World, tmp_path: Path) -> None:
    plan = plan_of(name, world, tmp_path, FULL)
    assert_same(run(plan, tmp_path / "out"), interrupted(plan, tmp_path / "out", back_to=5))


@pytest.mark.parametrize("name", ["dpo", "orpo", "anchored"])
def test_dry_run_traces_it(name: str, world: World, tmp_path: Path) -> None:
    """Its step on tensors without numbers; the reference takes memory, but no gradient's."""
    plan = plan_of(name, world, tmp_path, LORA)
    assert dry_run(plan).tensors > dry_run(plan_of("sft", world, tmp_path, LORA)).weights


def test_what_does_not_fit_is_one_line(world: World, tmp_path: Path) -> None:
    plan = plan_of("sft", world, tmp_path, LORA)
    plan.objective.name = "dpo"
    with pytest.raises(LuthierError, match="give chosen and rejected"):
        build(plan, tmp_path / "a", progress=False)
    plan = plan_of("classification", world, tmp_path, LORA)
    plan.objective.name = "orpo"
    with pytest.raises(
        LuthierError, match="objective 'orpo' is for bases of kind causal, this one is of kind classify"
    ):
        build(plan, tmp_path / "b", progress=False)
    with pytest.raises(LuthierError, match="beta must be above 0"):
        OBJECTIVES.make("dpo", {"beta": 0})


@pytest.mark.parametrize("name", ["sft", "classification"])
def test_smoothing_is_a_share(name: str) -> None:
    with pytest.raises(LuthierError, match=rf"objective '{name}': smoothing must lie in \[0, 1\), got 1.5"):
        OBJECTIVES.make(name, {"smoothing": 1.5})
