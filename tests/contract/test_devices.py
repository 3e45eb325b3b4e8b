"""Every form, choice, objective, optimiser and compression works where the model is, not where the process is: on a second
device nothing is mixed with the CPU's tensors, and the numbers are the CPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._decomp import decomposition_table

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.roles import Roles
from luthier.choices.engine import SCORES, ChoiceContext
from luthier.delta import CHOICES, COMPRESSIONS, FORMS, OBJECTIVES, OPTIMISERS, Change
from luthier.delta.seals import seals_of
from luthier.parts import fused
from luthier.parts.lowrank import row_norms
from luthier.sampling.generate import Sampling, generate
from luthier.training import certificate
from luthier.training.averages import PeriodicStock, SlowWeights
from luthier.training.fast import Pruner
from luthier.training.view import HeadSelector, View
from luthier.verbs.dry_run import dry_run
from tests.contract.test_objectives import EVERY, FAMILY, records
from tests.elsewhere import THERE, Elsewhere, There, bring, run_there
from tests.runs.support import World, assert_same, interrupted, run
from tests.tiny import tiny, tiny_ids

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rank": 4}, {"rank": 4, "dropout": 0.1}],
    "dora": [{"rank": 4}],
    "sparse": [{"by": "largest"}],
    "prefix": [{}, {"inner": 8}],
    "unified": [{}, {"function": "softmax", "insertion": "parallel"}],
    "sparsifier": [{"rank": 4}],
    "pat": [{"rank": 4, "steps": 10}],
}
"""Settings other than the defaults."""
CASES = [(f, s) for f in FORMS if FORMS.make(f, {}).at != "base" for s in SETTINGS.get(f, [{}])]
LORA = {"form": "lora", "rank": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("devices"))


def tuned(form: str, settings: dict[str, Any], there: bool) -> tuple[float, dict[str, list[float]]]:
    """Loss and seals after a step of a form on a tiny model, here or there."""
    torch.manual_seed(0)
    model: Any = tiny("llama", num_hidden_layers=1)
    device = THERE if there else torch.device("cpu")
    handle, roles = attached(bring(model) if there else model), Roles(model)
    made = FORMS.make(form, settings)
    handle.add(handle.build("piece", made, sites_for(roles, made, None), seed=1), train=True)
    selector = HeadSelector(model.get_output_embeddings())
    Pruner(roles, model, selector)
    model.train()
    ids, weights = tiny_ids(2, 9, seed=1), torch.ones(2, 9)
    weights[:, :4] = 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": weights}
    view = View(model, {k: v.to(device) for k, v in batch.items()}, selector)
    loss = -(view.logprobs * view.weights).sum() + handle.penalty()
    loss.backward()
    torch.optim.SGD([p for rows in handle.trained().values() for _, p in rows], lr=1e-2).step()
    handle.after_step()
    return float(loss.detach()), seals_of(handle)


@pytest.mark.parametrize(("form", "settings"), CASES, ids=[f"{f}-{k}" for k, (f, _) in enumerate(CASES)])
def test_forms(form: str, settings: dict[str, Any]) -> None:
    here = tuned(form, settings, False)
    with Elsewhere():
        there = tuned(form, settings, True)
    assert there[0] == pytest.approx(here[0], rel=1e-5)
    assert set(there[1]) == set(here[1])
    for site, seal in here[1].items():
        assert there[1][site] == pytest.approx(seal, rel=1e-3, abs=1e-5), site


PICKS = [
    ("pick", {"score": s, "granularity": g, "fraction": 0.5, "of": ["attn"]}) for s in SCORES for g in ("row", "entry")
]


@pytest.mark.parametrize(("name", "settings"), [*((c, {}) for c in CHOICES if c not in ("pick", "bias")), *PICKS])
def test_choices(name: str, settings: dict[str, Any]) -> None:
    """Weights are on the device, gradients on the CPU, as `score_gradients` collects them; what is chosen trains."""
    settings = {"layers_active": 1} if name == "lisa" else settings

    def selected(model: Any) -> dict[str, Tensor | None]:
        table, items = dict(model.named_parameters()), parameter_items(Roles(model), model)
        drawn = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for n, p in table.items()}
        square = {n: v.square() for n, v in drawn.items()}
        context = ChoiceContext(0, 0, lambda n: table[n].detach(), drawn.get, square.get)
        selection = CHOICES.make(name, settings).select(items, context)
        for edit in attached(model).move("piece", selection):
            edit.trained.grad = None
        return selection

    here = selected(tiny("llama"))
    with Elsewhere():
        model: Any = bring(tiny("llama"))
        there = selected(model)
        model(input_ids=tiny_ids(1, 5).to(THERE)).logits.square().mean().backward()
        for edit in attached(model).edits["piece"].values():
            if edit.values is not None:
                assert isinstance(edit.values.grad, There)
                edit.values.data.add_(edit.values.grad)
            edit.write()
    assert set(here) == set(there)
    for parameter, index in here.items():
        other = there[parameter]
        assert (index is None and other is None) or torch.equal(index, other), parameter  # pyright: ignore


@pytest.mark.parametrize("name", [*OBJECTIVES, "t5"])
def test_objectives(name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, with its proofs before step one."""
    kind = EVERY.get(name, "seq2seq")
    base: dict[str, Any] = {"name": str(world.base(FAMILY[kind])), "kind": kind}
    data = world.records
    if name in OBJECTIVES:
        data = tmp_path / "records.jsonl"
        rows = records(kind, hasattr(OBJECTIVES[name], "rows"))
        data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    base |= {"labels": ["a", "b", "c"]} if kind == "classify" else {}
    objective = name if name in OBJECTIVES else "sft"
    plan = world.plan(LORA, base=base, data={"train": str(data)}, objective=objective, train={"steps": 2})
    here = run(plan, tmp_path / "here")
    run_there(monkeypatch)
    with Elsewhere():
        there = run(plan, tmp_path / "there")
    assert there.losses == pytest.approx(here.losses, rel=1e-5)


AVERAGES = [f"luthier.training.averages:{c.__name__}(every=1)" for c in (SlowWeights, PeriodicStock)]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_optimisers_and_resuming(optimiser: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows, evaluations and averages of weights in a run that is taken up again, bit for bit."""
    average = AVERAGES[list(OPTIMISERS).index(optimiser) % len(AVERAGES)]
    train = {"steps": 7, "optimiser": optimiser, "callbacks": [average], "eval_every": 3}
    plan = world.plan(LORA, data={"packing": True, "holdout": 8}, train=train)
    here = run(plan, tmp_path / "here")
    run_there(monkeypatch)
    with Elsewhere():
        there = run(plan, tmp_path / "there")
        assert_same(interrupted(plan, tmp_path / "there", 5), there)
    assert there.losses == pytest.approx(here.losses, rel=1e-4)


@pytest.mark.parametrize("method", [m for m in COMPRESSIONS if not COMPRESSIONS[m].alone])
def test_compressions(method: str) -> None:
    """The change comes from files, the inputs from a model."""
    g = torch.Generator().manual_seed(0)
    base, change, inputs = (torch.randn(16, 32, generator=g) for _ in range(3))
    site = sites_for(Roles(tiny("llama")), FORMS.make("lora", {}), ["ffn.down"])[0]
    site = type(site)(**{**site.__dict__, "d_in": 32, "d_out": 16, "shape": (16, 32)})

    def small(x: Tensor) -> dict[str, Tensor]:
        made = COMPRESSIONS.make(method, {}).compress(Change(site, base, change, x, torch.Generator(), 1))
        return {**made.p, **made.fixed}

    here = small(inputs)
    with Elsewhere():
        there = small(inputs.to(THERE))
    assert all(torch.equal(value, there[k]) for k, value in here.items())


def test_answers() -> None:
    """Greedy and drawn tokens are the same wherever the model is."""
    prompts = [tiny_ids(1, n)[0].tolist() for n in (3, 6, 4)]
    for how in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)):
        here = generate(tiny("llama"), None, prompts, 5, 2, (), how)
        with Elsewhere():
            assert generate(bring(tiny("llama")), None, prompts, 5, 2, (), how) == here


def test_row_norms_without_asking_the_device() -> None:
    """DoRA's norms: exact without a change, and where change and weight cancel."""
    g = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*s, generator=g) for s in ((12, 20), (3, 20), (12, 3)))
    w[:4] = -2.0 * (b[:4] @ a) * (1 + 1e-4)
    w2 = w.square().sum(1)
    wanted = (w.double() + 2.0 * (b.double() @ a.double())).norm(dim=1)
    with Elsewhere():
        w, w2, a, b = (t.to(THERE) for t in (w, w2, a, b))
        found = row_norms(w, w2, a, b, 2.0).cpu().double()
        assert torch.equal(row_norms(w, w2, a, torch.zeros_like(b), 2.0).cpu(), w2.sqrt().cpu())
    assert torch.allclose(found, wanted, rtol=2e-3)


def test_dora_is_predicted(world: World) -> None:
    """A dry run has no values to ask either."""
    found = dry_run(world.plan({"form": "dora", "rank": 4}))
    assert found.tensors > found.weights > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_one_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA has a kernel for, worked out by torch's own decomposition of it: output and gradients of the other way."""
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(*s, generator=g).to(dtype) for s in ((2, 3, 16), (16,), (2, 3, 16)))
    name = "_fused_rms_norm_backward"

    def learnt() -> list[Tensor]:
        own, gain = x.clone().requires_grad_(True), w.clone().requires_grad_(True)
        y = fused.rms_norm(own, gain, 1e-6)
        y.backward(grad)
        return [y.detach(), own.grad, gain.grad]  # pyright: ignore[reportReturnType]

    plain = learnt()
    monkeypatch.setattr(fused, "one_kernel", lambda x, w: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(name, decomposition_table[getattr(torch.ops.aten, name).default], "CPU")
        found = learnt()
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype == dtype
        assert (one - other).float().norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * other.float().norm()


def test_a_resumed_loss_on_a_gpu_is_right_to_rounding() -> None:
    class On:
        """As much of a machine as is looked at."""

        def __init__(self, device: str, compute: torch.dtype) -> None:
            self.device, self.compute = torch.device(device), compute

    same: Any = certificate.same_loss
    assert same(2.0, 2.0, On("cpu", torch.float32)) and not same(2.0, 2.00001, On("cpu", torch.float32))
    assert same(2.0, 2.00001, On("cuda", torch.float32)) and not same(2.0, 2.01, On("cuda", torch.float32))
    assert same(2.0, 2.01, On("cuda", torch.bfloat16)) and not same(2.0, 2.1, On("cuda", torch.bfloat16))
    assert not same(float("nan"), 2.0, On("cuda", torch.float32))
