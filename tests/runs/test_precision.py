"""The table of docs/precision.md, read off running models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.delta import FORMS
from luthier.errors import LuthierError
from luthier.parts import attention
from luthier.plan.load import load_plan
from luthier.training.precision import precision_of
from luthier.training.run import Training, build
from luthier.training.view import BLOCK
from luthier.verbs.tune import _probes
from tests.runs.support import World, run

F, B = torch.float32, torch.bfloat16
LORA = {"form": "lora", "rank": 2}
FULL = {"choice": "full"}
HFT = {"choice": "hft"}
ENTRIES = {"choice": "random-entries", "fraction": 0.05}
# delta, precision -> frozen base, what trains, gradients, moments, output of a linear layer, is autocast on
TABLE: list[tuple[Any, str, tuple[Any, ...]]] = [
    (LORA, "fp32", (F, F, F, F, F, False)),
    (FULL, "fp32", (None, F, F, F, F, False)),
    (HFT, "fp32", (F, F, F, F, F, False)),
    (ENTRIES, "fp32", (F, F, F, F, F, False)),
    (LORA, "bf16", (B, F, F, F, B, False)),
    (FULL, "bf16", (None, F, F, F, B, True)),
    (HFT, "bf16", (B, F, F, F, B, True)),
    (ENTRIES, "bf16", (B, F, F, F, B, True)),
    ([LORA, {"choice": "norm"}], "bf16", (B, F, F, F, B, True)),
]


def observed(training: Training) -> dict[str, Any]:
    """Types met in two steps of training."""
    seen: dict[str, Any] = {"outputs": set(), "autocast": set(), "gradients": set()}
    module = training.base.model.get_submodule("model.layers.0.mlp.gate_proj")

    def look(_: Any, args: Any, out: Any) -> None:
        seen["outputs"].add(out.dtype)
        seen["autocast"].add(torch.is_autocast_enabled("cpu"))

    module.register_forward_hook(look)
    optimiser = training.loop.optimiser.torch
    optimiser.register_step_pre_hook(
        lambda o, *_: seen["gradients"].update(p.grad.dtype for g in o.param_groups for p in g["params"])
    )
    training.train()
    moving = {id(p) for p in training.loop.optimiser.names.values()}
    edited = {id(e.parameter) for t in training.handle.edits.values() for e in t.values()}
    base = [p for n, p in training.base.model.named_parameters() if ".luthier." not in n]
    seen["frozen"] = {p.dtype for p in base if id(p) not in moving | edited}
    seen["trained"] = {p.dtype for p in training.loop.optimiser.names.values()} | {
        p.dtype for p in base if id(p) in edited
    }
    seen["moments"] = {v.dtype for k, v in training.loop.optimiser.state().items() if not k.endswith("//step")}
    return seen


@pytest.mark.parametrize(("delta", "precision", "types"), TABLE)
def test_types_are_as_the_table_says(
    delta: Any, precision: str, types: tuple[Any, ...], world: World, tmp_path: Path
) -> None:
    plan = world.plan(delta, train={"steps": 2, "precision": precision}, checkpoint={"every": 0})
    seen = observed(build(plan, tmp_path, progress=False))
    frozen, trained, gradients, moments, outputs, autocast = types
    assert seen["frozen"] == ({frozen} if frozen else set())
    assert seen["trained"] == {trained}
    assert seen["gradients"] == {gradients}
    assert seen["moments"] == {moments}
    assert seen["outputs"] == {outputs}
    assert seen["autocast"] == {autocast}


@pytest.mark.parametrize("delta", [LORA, FULL, ENTRIES], ids=["lora", "full", "entries"])
def test_bf16_follows_fp32(delta: Any, world: World, tmp_path: Path) -> None:
    """Within the rounding of bfloat16: losses are summed in float32."""
    losses = [
        run(world.plan(delta, train={"precision": p}, checkpoint={"every": 0}), tmp_path / p).losses
        for p in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_small_updates_are_not_rounded_away(world: World, tmp_path: Path) -> None:
    """Weights moved in bfloat16 would stand still at this rate; float32 masters do not."""
    plan = world.plan(FULL, train={"lr": 1e-6, "steps": 3, "precision": "bf16"}, checkpoint={"every": 0})
    training = build(plan, tmp_path, progress=False)
    training.train()
    edit = next(e for k, e in training.handle.edits["full"].items() if "q_proj" in k)
    moved = edit.parameter.detach() != edit.original
    assert float(moved.float().mean()) > 0.9
    assert bool((edit.parameter.detach().bfloat16() == edit.original.bfloat16()).float().mean() > 0.9)


def resolved(hardware: bool, delta: Any = LORA, dtype: str = "auto", precision: str = "auto") -> tuple[Any, ...]:
    plan = {"base": {"name": "b", "dtype": dtype}, "data": "d.jsonl", "delta": delta, "train": {"precision": precision}}
    found, base = precision_of(load_plan(plan), hardware)
    return found.name, base.dtype, found.autocast, bool(found.note)


def test_what_is_resolved_from_plan_and_hardware() -> None:
    assert resolved(True) == ("bf16", "bfloat16", None, False)
    assert resolved(False) == ("fp32", "float32", None, False)
    assert resolved(True, FULL) == ("bf16", "auto", "bfloat16", False)
    assert resolved(False, precision="bf16") == ("fp32", "float32", None, True)
    assert resolved(False, dtype="bfloat16", precision="bf16") == ("bf16", "bfloat16", None, False)
    assert resolved(True, dtype="float32", precision="bf16") == ("bf16", "float32", "bfloat16", False)
    assert resolved(True, dtype="float16", precision="bf16") == ("bf16", "float16", "bfloat16", False)
    for bad in (
        {"dtype": "bfloat16", "precision": "fp32"},
        {"dtype": "float16", "delta": FULL},
        {"dtype": "float16"},
        {"dtype": "float16", "precision": "fp32"},
    ):
        with pytest.raises(LuthierError, match="dtype"):
            resolved(True, **bad)


def test_probes_of_a_full_tune_under_autocast_are_of_base_and_tuned(world: World, tmp_path: Path) -> None:
    """They are what the model gives once loaded, and neither stands in for the other through a cast that was kept."""
    base = {"name": str(world.base()), "dtype": "float32"}
    plan = world.plan(FULL, base=base, train={"precision": "bf16", "steps": 2, "lr": 5e-2}, checkpoint={"every": 0})
    training = build(plan, tmp_path, progress=False)
    training.train()
    probes, model, handle = _probes(training), training.base.model.eval(), training.handle
    rows = [row[None].long() for row in probes["tokens"].split(probes["lengths"].tolist())]

    def largest() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [model(input_ids=ids, use_cache=False).logits[0].float().topk(64, -1).values for ids in rows]
            )

    tuned = largest()
    with handle.off():
        untuned = largest()
    assert float((tuned - untuned).abs().max()) > 0.5
    assert probes["base.top"].shape == untuned.shape
    assert torch.allclose(probes["base.top"].float(), untuned, atol=2e-3)
    assert torch.allclose(probes["tuned.top"].float(), tuned, atol=2e-3)


def test_a_moved_weight_is_read_anew_when_a_delta_goes_off_within_one_autocast(world: World, tmp_path: Path) -> None:
    """Autocast keeps casts of parameters that train; one made of the base's values may not stand in for the tuned ones."""
    base = {"name": str(world.base()), "dtype": "float32"}
    plan = world.plan(FULL, base=base, train={"precision": "bf16", "steps": 2, "lr": 5e-2}, checkpoint={"every": 0})
    training = build(plan, tmp_path, progress=False)
    training.train()
    model, handle = training.base.model.eval(), training.handle
    ids = torch.arange(12)[None]

    def logits() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.float()

    context = training.machine.precision.context
    with torch.no_grad():
        with context(training.machine.device):
            tuned = logits()
        with handle.off(), context(training.machine.device):
            untuned = logits()
        with context(training.machine.device):
            within = [logits()]
            with handle.off():
                within.append(logits())
            within.append(logits())
    assert float((tuned - untuned).abs().max()) > 0.5
    assert all(torch.equal(a, b) for a, b in zip(within, (tuned, untuned, tuned), strict=True))


@pytest.mark.parametrize("form", [n for n in FORMS if FORMS[n].at != "base"])
def test_every_form_trains_in_bfloat16(form: str, world: World, tmp_path: Path) -> None:
    """Through the feed of a whole run: batches filled up to blocks, cut and padded."""
    plan = world.plan({"form": form}, train={"precision": "bf16", "steps": 2}, checkpoint={"every": 0})
    done = run(plan, tmp_path)
    assert len(done.losses) == 2 and all(0 < x < 20 for x in done.losses)


def test_filled_up_batches_keep_the_causal_kernel(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask is made for them, as none is for batches that are not."""
    seen: set[tuple[str, bool, int]] = set()
    own, library = attention.causal_attention, torch.nn.functional.scaled_dot_product_attention

    def ours(q: Any, *rest: Any) -> Any:
        seen.add(("ours", True, q.shape[0] * q.shape[2] % BLOCK))
        return own(q, *rest)

    def theirs(q: Any, k: Any, v: Any, attn_mask: Any = None, **rest: Any) -> Any:
        seen.add(("library", attn_mask is None and rest.get("is_causal", False), q.shape[0] * q.shape[2] % BLOCK))
        return library(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(attention, "causal_attention", ours)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", theirs)
    run(world.plan(LORA, train={"precision": "bf16"}, checkpoint={"every": 0}), tmp_path / "short")
    assert seen == {("ours", True, 0)}
    monkeypatch.setattr(attention, "LONGEST", 8)
    run(world.plan(LORA, train={"precision": "bf16"}, checkpoint={"every": 0}), tmp_path / "long")
    assert seen == {("ours", True, 0), ("library", True, 0)}


def test_positions_are_not_filled_up_beyond_a_table_of_them(world: World, tmp_path: Path) -> None:
    """GPT-2's has 100 places here; a batch of that width stays as it is."""
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "' + "a" * 200 + '"}\n')
    base = str(world.base("gpt2", n_positions=100))
    data = {"train": str(path), "max_length": 100}
    plan = world.plan(LORA, base=base, data=data, train={"precision": "bf16", "steps": 1, "batch_size": 1})
    assert len(run(plan, tmp_path / "out").losses) == 1
