"""Going on from a delta: every piece of it comes along, to train on or as it is, and a run begins where that one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.bases.load import load_base
from luthier.bridge.target import logits_of
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.training.run import build
from luthier.verbs.dry_run import dry_run
from luthier.verbs.load import load
from luthier.verbs.tune import tune
from luthier.verbs.verify import verify
from tests.runs.support import World, assert_same, interrupted, run
from tests.tiny import tiny_ids

LORA, SCALES = {"form": "lora", "rank": 4}, {"form": "ia3"}
NORMS, FULL = {"choice": "norm"}, {"choice": "full"}
SHORT = {"train": {"steps": 3, "lr": 1e-2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("starts"))


@pytest.fixture(scope="module")
def first(world: World) -> Path:
    """A delta of two forms and of moved norms."""
    return tuned(world, world.folder / "first", [LORA, SCALES, NORMS])


def tuned(world: World, out: Path, delta: Any, **sections: Any) -> Path:
    tune(world.plan(delta, **SHORT, **sections), out=out, progress=False)
    return out


def assert_begins_at(plan: Any, folder: Path, tmp_path: Path) -> None:
    """Before step one the run answers as the delta in `folder` does, to the rounding of the run's fused blocks."""
    training = build(plan, tmp_path / "begun", progress=False)
    delta = Delta.load(folder)
    model = load_base(str(delta.base["name"])).model
    plain = logits_of(model)(tiny_ids())
    delta.apply(model)
    tuned, begun = logits_of(model)(tiny_ids()), logits_of(training.base.model)(tiny_ids())
    assert (begun - tuned).abs().max() <= 1e-5 < 1e-3 < (tuned - plain).abs().max()


def numbers(delta: Delta, name: str) -> dict[str, torch.Tensor]:
    piece = next(p for p in delta.pieces if p.name == name)
    return {f"{key}|{k}": t for key, own in piece.p.items() for k, t in own.items()}


CASES: dict[str, tuple[list[dict[str, Any]], set[str], set[str]]] = {
    "one form": ([LORA], {"lora"}, {"ia3", "norm"}),
    "two forms": ([LORA, SCALES], {"lora", "ia3"}, {"norm"}),
    "a choice": ([NORMS], {"norm"}, {"lora", "ia3"}),
    "all": ([LORA, SCALES, NORMS], {"lora", "ia3", "norm"}, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_delta_is_dropped(case: str, world: World, first: Path, tmp_path: Path) -> None:
    """The run begins at the delta's own logits; what no delta of the plan takes is saved as it was, bit for bit."""
    specs, trains, stays = CASES[case]
    plan = world.plan([{**s, "start_from": str(first)} for s in specs], **SHORT)
    assert_begins_at(plan, first, tmp_path)
    tune(plan, out=tmp_path / "out", progress=False)
    delta, old = Delta.load(tmp_path / "out"), Delta.load(first)
    assert {p.name for p in delta.pieces} == trains | stays == {p.name for p in old.pieces}
    for name in stays:
        assert all(torch.equal(t, numbers(old, name)[k]) for k, t in numbers(delta, name).items())
    for name in trains:
        assert any(not torch.equal(t, numbers(old, name)[k]) for k, t in numbers(delta, name).items())


def test_a_choice_over_what_came_along_is_refused(world: World, first: Path, tmp_path: Path) -> None:
    plan = world.plan([{**LORA, "start_from": str(first)}, NORMS])
    with pytest.raises(LuthierError, match="would both move model.layers.0.input_layernorm.weight"):
        build(plan, tmp_path / "out", progress=False)


def test_it_resumes_with_what_came_along(world: World, first: Path, tmp_path: Path) -> None:
    plan = world.plan([{**NORMS, "start_from": str(first)}])
    whole = run(plan, tmp_path / "out")
    assert_same(whole, interrupted(plan, tmp_path / "out", 7))


def test_choices_go_on_with_their_own(world: World, tmp_path: Path) -> None:
    two = [{"choice": "norm"}, {"choice": "full", "name": "head", "sites": ["head"]}]
    parent = tuned(world, tmp_path / "parent", two)
    on = [{**s, "start_from": str(parent)} for s in two]
    assert_begins_at(world.plan(on), parent, tmp_path)
    other = [on[0], {**on[1], "name": "other"}]
    with pytest.raises(LuthierError, match="'other': .* holds no moved parameters .* it has norm, head"):
        build(world.plan(other), tmp_path / "out", progress=False)


def test_one_piece_goes_on_once(world: World, first: Path, tmp_path: Path) -> None:
    twice = [{**LORA, "start_from": str(first)}] * 2
    with pytest.raises(LuthierError, match="piece 'lora' of .* goes on as 'lora' already"):
        build(world.plan(twice), tmp_path / "out", progress=False)


@pytest.mark.parametrize("delta", [LORA, FULL], ids=["lora", "full"])
def test_a_fresh_head_trains_on(delta: dict[str, Any], world: World, tmp_path: Path) -> None:
    """The checkpoint lacks it: it was drawn in the first run, and the second goes on with what that one learnt."""
    rows = [{"text": "abc"[n % 3] * (n % 9 + 1), "label": "abc"[n % 3]} for n in range(32)]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    base = {"name": str(world.base("llama")), "kind": "classify", "labels": ["a", "b", "c"]}
    parts = {"base": base, "data": {"train": str(path)}}
    parent = tuned(world, tmp_path / "parent", delta, **parts)
    old = Delta.load(parent)
    assert "new" in {p.name for p in old.pieces}
    plan = world.plan({**delta, "start_from": str(parent)}, **SHORT, **parts)
    training = build(plan, tmp_path / "begun", progress=False)
    head = training.base.model.get_parameter("score.weight")
    edit = training.handle.edits["new"]["score.weight"]
    assert edit.trained.requires_grad and not torch.equal(head, edit.original)
    tune(plan, out=tmp_path / "out", progress=False)
    done = Delta.load(tmp_path / "out")
    assert {p.name for p in done.pieces} == {p.name for p in old.pieces}
    assert not torch.equal(numbers(done, "new")["score.weight|bits"], numbers(old, "new")["score.weight|bits"])


@pytest.fixture(scope="module")
def worded(world: World) -> Path:
    """A delta of a form and of a row for one new token, which started from seed 0."""
    return tuned(world, world.folder / "worded", LORA, base={"name": str(world.base()), "new_tokens": ["<hm>"]})


@pytest.mark.parametrize("how", ["start_from", "base.deltas"])
def test_new_tokens_come_along(how: str, world: World, worded: Path, tmp_path: Path) -> None:
    """Unstated, and whatever the run's own seed: their rows start as they did for the delta, whose differences rest on it."""
    delta, base = (
        ({**LORA, "start_from": str(worded)}, {}) if how == "start_from" else (LORA, {"deltas": [str(worded)]})
    )
    plan = world.plan(delta, base={"name": str(world.base()), **base}, train={"steps": 3, "lr": 1e-2, "seed": 5})
    training = build(plan, tmp_path / "begun", progress=False)
    model = load(str(world.base()), deltas=[str(worded)])
    assert torch.equal(model.get_input_embeddings().weight, training.base.model.get_input_embeddings().weight)
    tune(plan, out=tmp_path / "out", progress=False)
    done = Delta.load(tmp_path / "out")
    assert done.base["new_tokens"] == ["<hm>"] and done.base["seed"] == 0 and "tokenizer.json" in done.files
    assert verify(tmp_path / "out")
    other = world.plan(delta, base={"name": str(world.base()), "new_tokens": ["<x>"], **base})
    with pytest.raises(LuthierError, match=r"base.new_tokens: .*worded was made with \['<hm>'\], not with \['<x>'\]"):
        build(other, tmp_path / "other", progress=False)


def test_new_tokens_that_started_apart_are_refused(world: World, worded: Path, tmp_path: Path) -> None:
    base = {"name": str(world.base()), "new_tokens": ["<hm>"]}
    tune(world.plan(LORA, base=base, train={"steps": 2, "seed": 3}), out=tmp_path / "b", progress=False)
    plan = world.plan(LORA, base={**base, "deltas": [str(worded), str(tmp_path / "b")]})
    with pytest.raises(LuthierError, match="started their new numbers from different seeds"):
        build(plan, tmp_path / "out", progress=False)


@pytest.mark.parametrize("spec", [LORA, NORMS], ids=["form", "choice"])
def test_a_dry_run_stands_on_the_same(spec: Any, world: World, first: Path, worded: Path, tmp_path: Path) -> None:
    for plan in (
        world.plan({**spec, "start_from": str(first)}),
        world.plan(spec, base={"name": str(world.base()), "deltas": [str(worded)]}),
    ):
        training = build(plan, tmp_path / "run", progress=False)
        moved = sum(p.numel() for p in training.loop.optimiser.names.values())
        assert dry_run(plan).moved == moved > 0


def test_kind_and_labels_come_along(world: World, tmp_path: Path) -> None:
    rows = [{"text": "abc"[n % 3] * (n % 9 + 1), "label": "abc"[n % 3]} for n in range(32)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    base, data = {"name": str(world.base("llama"))}, {"data": {"train": str(tmp_path / "records.jsonl")}}
    named = {**base, "kind": "classify", "labels": ["c", "b", "a"]}
    parent = tuned(world, tmp_path / "parent", LORA, base=named, **data)
    plan = world.plan({**LORA, "start_from": str(parent)}, base=base, **data, train={"steps": 2, "seed": 4})
    tune(plan, out=tmp_path / "out", progress=False)
    done = Delta.load(tmp_path / "out")
    assert (done.base["kind"], done.base["labels"], done.base["seed"]) == ("classify", ["c", "b", "a"], 0)
    assert verify(tmp_path / "out")
    with pytest.raises(LuthierError, match=r"bases of different kinds \(causal, classify\)"):
        load(str(world.base("llama")), deltas=[str(tuned(world, tmp_path / "causal", LORA)), str(parent)])
    other = world.plan({**LORA, "start_from": str(parent)}, base={**base, "kind": "seq2seq"}, **data)
    with pytest.raises(LuthierError, match="base.kind: .*parent was made with classify, not with seq2seq"):
        build(other, tmp_path / "other", progress=False)
