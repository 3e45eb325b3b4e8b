"""Two processes give what one gives, under DDP and under FSDP2; each test proves that there were two, wrapped as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.attach import attached
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.training.run import build
from luthier.verbs.tune import tune
from tests.runs.processes import launch
from tests.runs.support import End, World, end_of, interrupted, run
from tests.tiny import tiny, tiny_ids

LORA = {"form": "lora", "rank": 4}
FULL = {"choice": "full"}
LISA = {"choice": "lisa", "every": 2, "layers_active": 1}
HFT = {"choice": "hft", "every": 3}
ENTRIES = {"choice": "top-gradient", "fraction": 0.02}
WRAPPERS = {False: "DistributedDataParallel", True: "FSDPLlamaForCausalLM"}


def two(plan: Any, out: Path, *, resume: bool = False) -> list[End]:
    """The run on two processes; asserts that there were two, in the wrapper that was asked for."""

    def work(rank: int) -> None:
        training = build(plan, out / "run", resume=resume, progress=False)
        machine = training.machine
        started = torch.distributed.get_world_size()
        before = type(machine.model).__name__
        training.train()
        kinds = sorted({type(p).__name__ for p in machine.model.parameters()})
        shards = [
            (p.to_local().numel(), p.numel())  # pyright: ignore
            for p in training.base.model.parameters()
            if type(p).__name__ == "DTensor"
        ]
        wrapper = type(machine.model).__name__
        facts = {"world": started, "wrapper": wrapper, "before": before, "kinds": kinds, "shards": shards}
        torch.save((end_of(training), facts), out / f"end-{rank}.pt")

    failures = launch(work, out)
    assert not any(failures), "\n".join(failures)
    both = [torch.load(out / f"end-{rank}.pt", weights_only=False) for rank in range(2)]
    for _, facts in both:
        assert facts["world"] == 2
        assert facts["wrapper"] == facts["before"] == WRAPPERS[plan.train.fsdp]
        assert facts["kinds"] == (["DTensor"] if plan.train.fsdp else ["Parameter"])
        assert not plan.train.fsdp or 2 * sum(mine for mine, _ in facts["shards"]) == sum(n for _, n in facts["shards"])
    ends = [end for end, _ in both]
    assert all(torch.equal(v, ends[1].delta[k]) for k, v in ends[0].delta.items()), "both hold the same delta"
    assert ends[0].record["world"] == 2
    return ends


def values(end: End, model: Any = None) -> dict[str, torch.Tensor]:
    """Trained numbers of forms, and tuned values of what choices moved (a delta stores differences of bit patterns)."""
    return {k: v for k, v in end.delta.items() if v.is_floating_point()}


def assert_close(one: End, other: End, tolerance: float = 2e-5) -> None:
    assert set(one.delta) == set(other.delta) and one.delta
    for a, b in zip(one.curve, other.curve, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=20 * tolerance)
    assert [e["loss"] for e in one.evals] == pytest.approx([e["loss"] for e in other.evals], rel=tolerance)
    compared = 0
    for key, value in values(one).items():
        torch.testing.assert_close(value, other.delta[key], rtol=1e-2, atol=2e-3)
        compared += value.numel()
    assert {k: v.shape for k, v in one.moments.items()} == {k: v.shape for k, v in other.moments.items()}
    assert compared or all(v.dtype == torch.int32 for v in one.delta.values() if v.numel() > 1)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LORA, {}),
    "full": (FULL, {}),
    "lisa": (LISA, {}),
    "hft redrawn": (HFT, {}),
    "clipped hard": ([LORA, {"choice": "norm"}], {"train": {"clip": 0.05}}),
    "evaluated, packed": (LORA, {"data": {"holdout": 7, "packing": True}, "train": {"eval_every": 3}}),
    "best kept": (LISA, {"data": {"holdout": 7}, "train": {"eval_every": 1, "keep_best": True, "lr": 3e-2}}),
    "checkpointed activations": (LORA, {"train": {"checkpointing": True}}),
    "bf16 form": (LORA, {"train": {"precision": "bf16"}}),
    "bf16 lisa": (LISA, {"train": {"precision": "bf16"}}),
}


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_two_are_one(name: str, fsdp: bool, world: World, tmp_path: Path) -> None:
    """Rows of unequal length; two processes with accumulation 2 make the step of one process with accumulation 4."""
    delta, sections = CASES[name]
    rest = dict(sections)
    train = {"batch_size": 2, "steps": 6, "eps": 1e-4, **rest.pop("train", {})}
    plans = [world.plan(delta, train={**train, "accumulate": k, "fsdp": fsdp}, **rest) for k in (4, 2)]
    whole = run(plans[0], tmp_path / "one")
    parts = two(plans[1], tmp_path / "two")
    assert_close(whole, parts[0], 2e-2 if train.get("precision") == "bf16" else 2e-5)


def test_entries_are_averaged_too(world: World, tmp_path: Path) -> None:
    """Their gradients do not go through DDP; forms on the same model do."""
    train = {"batch_size": 2, "steps": 6, "eps": 1e-4}
    plans = [world.plan([ENTRIES, LORA], train={**train, "accumulate": k}) for k in (4, 2)]
    whole = run(plans[0], tmp_path / "one")
    parts = two(plans[1], tmp_path / "two")
    assert_close(whole, parts[0])
    moments = {k: v for k, v in whole.moments.items() if k.startswith("top-gradient") and k.endswith("exp_avg")}
    assert moments
    for key, value in moments.items():
        torch.testing.assert_close(parts[0].moments[key], value, rtol=1e-3, atol=1e-5)


def test_entries_are_refused_sharded(world: World, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(LuthierError, match="single entries of .* would train .*set train.fsdp: false"):
            build(world.plan(ENTRIES, train={"fsdp": True}), tmp_path / "run", progress=False)

    assert not any(launch(work, tmp_path))


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_a_larger_batch_is_two_smaller_ones(fsdp: bool, world: World, tmp_path: Path) -> None:
    """In file order, one process with rows 4 by 4 and two with 2 by 2 see the same steps."""
    order = {"shuffle": False, "bucket": 1}
    plans = [
        world.plan(FULL, data=order, train={"batch_size": k, "steps": 5, "eps": 1e-4, "fsdp": fsdp}) for k in (4, 2)
    ]
    assert_close(run(plans[0], tmp_path / "one"), two(plans[1], tmp_path / "two")[0])


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("delta", [{**LORA, "dropout": 0.2}, LISA], ids=["lora", "lisa"])
def test_resumed_on_two(delta: Any, fsdp: bool, world: World, tmp_path: Path) -> None:
    """Bit for bit, each process with its own random state."""
    import shutil

    plan = world.plan(delta, train={"steps": 8, "fsdp": fsdp}, checkpoint={"every": 3})
    whole = two(plan, tmp_path)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    rest = two(plan, tmp_path, resume=True)[0]
    assert whole.curve == rest.curve
    assert all(torch.equal(v, rest.delta[k]) for k, v in whole.delta.items())
    assert all(torch.equal(v, rest.moments[k]) for k, v in whole.moments.items())
    assert rest.record["resume_certificate"]["loss_equal"]
    with pytest.raises(LuthierError, match="the run had 2 processes, now there are 1"):
        interrupted(plan, tmp_path / "run", back_to=3)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("delta, start", [(LORA, True), (FULL, True), (FULL, False)], ids=["lora", "full", "anew"])
def test_two_have_the_reference_of_one(delta: Any, start: bool, fsdp: bool, world: World, tmp_path: Path) -> None:
    """A preference run is held to the base, or the delta that it goes on from, whatever the wrapper made of the numbers."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no" * (1 + n % 3)} for n in range(1, 17)]
    pairs.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if start:
        tune(world.plan(delta, train={"steps": 3}, checkpoint={"every": 0}), out=tmp_path / "first", progress=False)
        delta = {**delta, "start_from": str(tmp_path / "first")}
    train = {"batch_size": 2, "steps": 4, "eps": 1e-4}
    plans = [
        world.plan(
            delta,
            objective="dpo",
            data={"train": str(pairs)},
            train={**train, "accumulate": k, "fsdp": fsdp},
        )
        for k in (4, 2)
    ]
    assert_close(run(plans[0], tmp_path / "one"), two(plans[1], tmp_path / "two")[0])


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("delta", [LORA, LISA], ids=["lora", "lisa"])
def test_the_verb_saves_a_whole_delta(delta: Any, fsdp: bool, world: World, tmp_path: Path) -> None:
    """One process writes; the files hold every number, and on a fresh base they give the logits of the run."""
    plan = world.plan(delta, train={"steps": 5, "fsdp": fsdp}, checkpoint={"every": 0})
    ids = tiny_ids()

    def work(rank: int) -> None:
        result = tune(plan, out=tmp_path / "run", progress=False)
        assert not torch.distributed.is_initialized()
        if rank == 0:
            assert result.report["cost"]["processes"] == 2
            assert result.report["proof"]["probes"]["ok"], result.report["proof"]["probes"]

    failures = launch(work, tmp_path)
    assert not any(failures), "\n".join(failures)
    whole = tune(
        world.plan(delta, train={"steps": 5, "batch_size": 4, "accumulate": 2}), out=tmp_path / "one", progress=False
    )
    saved, there = Delta.load(tmp_path / "run"), Delta.load(tmp_path / "one")
    assert {k: v.shape for k, v in saved._flat()} == {k: v.shape for k, v in there._flat()}
    assert saved.count() == whole.delta.count() > 0
    model, other = tiny(), tiny()
    base = model(input_ids=ids).logits.detach()
    saved.apply(model, strict=False)
    there.apply(other, strict=False)
    attached(model)
    got, wanted = model(input_ids=ids).logits.detach(), other(input_ids=ids).logits.detach()
    assert float((got - base).norm()) > 20 * float((got - wanted).norm()) > 0 or torch.equal(got, wanted)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["cost"]["steps"] == 5


def test_different_draws_are_caught(world: World, tmp_path: Path) -> None:
    """Processes that drew different layers would train two models."""

    def work(rank: int) -> None:
        training = build(world.plan(LISA, train={"steps": 6}), tmp_path / "run", progress=False)
        training.pieces.seed += rank
        with pytest.raises(LuthierError, match="the processes drew different parameters"):
            for step in range(2, 40, 2):
                training.pieces.draw(step)
                from luthier.training import certificate

                names = sorted(name for rows in training.handle.trained().values() for name, _ in rows)
                certificate.same_on_all(training.machine, names)

    failures = launch(work, tmp_path)
    assert not any(failures), "\n".join(failures)


def test_one_is_asked_to_stop_and_both_leave(world: World, tmp_path: Path) -> None:
    """A signal reaches one process; all save the same checkpoint and leave."""

    def work(rank: int) -> None:
        training = build(world.plan(LORA, train={"steps": 500}), tmp_path / "run", progress=False)
        real = training.events.tell

        def tell(event: str, loop: Any) -> None:
            if event == "step" and loop.progress.step == 4 and rank == 1:
                training.events.stop("SIGTERM")
            real(event, loop)

        training.events.tell = tell  # type: ignore[method-assign]
        progress = training.train()
        assert progress.step == 4 and progress.stopped

    failures = launch(work, tmp_path)
    assert not any(failures), "\n".join(failures)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").exists()


def test_launcher_and_accelerate_must_agree(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two started, but each on its own: not two independent runs in one folder, but an error."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LuthierError, match="the launcher started 2 processes, accelerate sees 1"):
        build(world.plan(LORA), tmp_path, progress=False)


SCRIPT = """
import sys
from luthier.verbs.tune import tune
tune(sys.argv[1], out=sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_torchrun(world: World, tmp_path: Path) -> None:
    """The command that docs/multi-process.md names for machines without a GPU, as it is."""
    import yaml

    plan = world.plan(LORA, train={"steps": 3}, checkpoint={"every": 0})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    (tmp_path / "go.py").write_text(SCRIPT)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "go.py"), str(tmp_path / "plan.yaml"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cost"]["processes"] == 2
