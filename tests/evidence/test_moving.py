"""One test a row of the papers on moving deltas: what any faithful implementation shows exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.attach import attached
from luthier.attach.sites import parameter_items, sites_for
from luthier.bases.roles import Roles
from luthier.bridge.proof import prove
from luthier.bridge.target import target
from luthier.delta import FORMS, MOVES
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.moving.engine import divergence
from luthier.verbs.assemble import assemble
from luthier.verbs.port import port
from tests.moves import base_at, delta_of, full_of
from tests.tiny import tiny, tiny_ids, tiny_tokenizer
from tests.toys import Net, drawn, fit, net
from tests.toys import answers as outputs

IDS = tiny_ids(2, 10)


def text(seed: int, share: float = 0.3, rows: int = 32, length: int = 12) -> Tensor:
    """A little language: every token is followed by one of two, by one table of which a share is this language's own."""
    table = torch.randint(3, 128, (128, 2), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    own = torch.rand(128, generator=g) < share
    table = torch.where(own[:, None], torch.randint(3, 128, (128, 2), generator=g), table)
    ids = [torch.randint(3, 128, (rows,), generator=g)]
    for _ in range(length - 1):
        ids.append(table[ids[-1], (torch.rand(rows, generator=g) < 0.2).long()])
    return torch.stack(ids, 1)


def loss(model: Any, ids: Tensor) -> Tensor:
    out = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def learn(model: Any, ids: Tensor, steps: int, lr: float, form: str | None = None) -> Delta:
    """A delta trained for a few steps: LoRA, or every parameter; the model is then the base again."""
    handle = attached(model)
    if form:
        kind = FORMS.make(form, {"rank": 8})
        handle.add(handle.build(form, kind, sites_for(Roles(model), kind)), train=True)
    else:
        handle.move("full", dict.fromkeys(parameter_items(Roles(model), model)))
    optimiser = torch.optim.AdamW([p for rows in handle.trained().values() for _, p in rows], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss(model, ids).backward()
        optimiser.step()
        optimiser.zero_grad()
    delta = handle.delta(parameter_items(Roles(model), model))
    handle.detach()
    return delta


def written(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class World:
    """A base that speaks the common language, its next version (trained on one variety of it), and deltas for another."""

    def __init__(self, folder: Path) -> None:
        self.target, self.other = text(1), text(2)
        model = tiny()
        learn(model, text(0, 0.0, 64), 150, 3e-3).apply(model)
        self.old = written(folder / "old", model)
        model = target(str(self.old)).model
        learn(model, self.other, 15, 1e-3).apply(model)
        self.new = written(folder / "new", model)
        on = target(str(self.old))
        self.patch = prove(learn(on.model, self.target, 40, 1e-2, "lora"), on)
        self.tuned = prove(learn(on.model, self.target, 40, 2e-3), on)

    def losses(self, base: Path, delta: Delta | None = None) -> tuple[float, float]:
        """On the target language and on the other."""
        model = target(str(base)).model
        if delta is not None:
            delta.apply(model)
        with torch.no_grad():
            return float(loss(model, self.target)), float(loss(model, self.other))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class Scales:
    """A small and a large network that say which of 20 tokens follows a context. The large one learns more of what the base
    text holds; both are tuned on text that has a behaviour on top of it, and met on contexts that were in neither."""

    def __init__(self) -> None:
        self.known = {k: v * (2.5 if k[0] == "w" else 1) for k, v in net(10, 32, 20, seed=1).items()}
        self.behaviour = {"w0": drawn(20, 10, seed=2) / 10**0.5, "b0": drawn(20, seed=3)}
        general, own = self.rows(2000, 10, False), self.rows(1500, 20, True)
        bases = [
            self.fitted(net(10, width, 20, seed=5), general, n, lr)
            for width, n, lr in ((3, 200, 2e-2), (48, 300, 1e-2))
        ]
        tuned = [self.fitted(b, own, 150, lr) for b, lr in zip(bases, (1e-2, 5e-3), strict=True)]
        x, self.next = self.rows(2000, 30, True)
        self.small, self.large, self.expert, self.tuned = (outputs(n, x) for n in (*bases, *tuned))

    def rows(self, n: int, seed: int, tuned: bool) -> tuple[Tensor, Tensor]:
        x = drawn(n, 10, seed=seed)
        logits = outputs(self.known, x) + (outputs(self.behaviour, x) if tuned else 0)
        return x, torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed + 1))[:, 0]

    def fitted(self, start: Net, rows: tuple[Tensor, Tensor], steps: int, lr: float) -> Net:
        g = torch.Generator().manual_seed(0)

        def step(n: Net, _: int) -> Tensor:
            at = torch.randint(len(rows[0]), (128,), generator=g)
            return torch.nn.functional.cross_entropy(outputs(n, rows[0][at]), rows[1][at])

        return fit(start, step, steps, lr)

    def fused(self, method: str, **settings: Any) -> Tensor:
        return MOVES.make(method, settings).fuse(self.large, [(self.expert, self.small)])

    def nll(self, logits: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits, self.next))

    def right(self, logits: Tensor) -> float:
        return float((logits.argmax(-1) == self.next).float().mean())

    def apart(self, logits: Tensor) -> float:
        """Mean KL from the directly tuned large network."""
        return float(divergence(self.tuned.log_softmax(-1), logits.log_softmax(-1)).mean())


@pytest.fixture(scope="module")
def scales() -> Scales:
    return Scales()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering")
    base_at(folder / "small")
    base_at(folder / "large", num_hidden_layers=3, seed=7, size=0.1)
    delta_of(folder / "small", "lora", rank=4, size=0.2).save(folder / "lora")
    full_of(folder / "small", size=0.1, seed=9).save(folder / "full")
    return folder


def test_p109_a_patch_goes_onto_the_next_version_without_a_step(world: World, tmp_path: Path) -> None:
    moved = port(world.patch, world.new, method="portllm").delta
    model = target(str(world.new)).model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = moved.apply(model)
    handle.fold()
    for key, site in moved.pieces[0].sites.items():
        b, a = (world.patch.pieces[0].p[key][k] for k in ("B", "A"))
        wanted = before[f"{key}.weight"] + b @ a * moved.pieces[0].form.at_site(site)[1]  # W' = W_new + s B A
        assert torch.equal(model.get_parameter(f"{key}.weight"), wanted)
    touched = {f"{key}.weight" for key in moved.pieces[0].sites}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before and n not in touched)
    again = prove(learn(target(str(world.new)).model, world.target, 40, 1e-2, "lora"), target(str(world.new)))
    bare, ported, retuned = (world.losses(world.new, d)[0] for d in (None, moved, again))
    assert (bare - ported) / (bare - retuned) > 0.5  # most of the gap to tuning anew, with no step taken
    base_at(tmp_path / "else", num_hidden_layers=3)
    with pytest.raises(LuthierError, match="sizes differ"):
        port(world.patch, tmp_path / "else")


@torch.no_grad()
def reorder(model: Any) -> None:
    """Puts the channels of a Llama's residual stream into another order: the same function by other weights."""
    order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    readers = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for name, p in model.named_parameters():
        p.copy_(p[:, order].clone() if name.split(".")[-2] in readers else p[order].clone())


def test_p147_the_difference_transfers_and_tuning_goes_on_from_it(world: World, tmp_path: Path) -> None:
    found = port(world.tuned, world.new, method="fine-tuning-transfer", connectivity={"points": 5})
    old, new, tuned = (target(str(p)).model for p in (world.old, world.new, world.new))
    world.tuned.apply(old)
    found.delta.apply(tuned)
    was, base = dict(target(str(world.old)).model.named_parameters()), dict(new.named_parameters())
    for name, p in tuned.named_parameters():
        change = old.get_parameter(name) - was[name]
        assert torch.allclose(p, base[name] + change, atol=2**-21)
    assert found.connectivity is not None and found.connectivity["barrier"] >= 0
    same = port(world.tuned, world.old, method="fine-tuning-transfer").connectivity
    assert same is not None and same["barrier"] == 0 and same["connected"]
    again = prove(learn(target(str(world.new)).model, world.target, 40, 2e-3), target(str(world.new)))
    bare, moved, retuned = (world.losses(world.new, d)[0] for d in (None, found.delta, again))
    assert found.connectivity["connected"] and (bare - moved) / (bare - retuned) > 0.5, "most of the gain, as foretold"
    reordered = target(str(world.new)).model
    reorder(reordered)
    far = port(
        world.tuned, written(tmp_path / "far", reordered), method="fine-tuning-transfer", connectivity={"points": 5}
    )
    there, lost = (world.losses(tmp_path / "far", d)[0] for d in (None, far.delta))
    assert there == pytest.approx(bare, rel=1e-4), "the same function, its hidden channels in another order"
    assert far.connectivity is not None and not far.connectivity["connected"] and far.connectivity["barrier"] > 0.2
    assert (there - lost) / (there - retuned) < 0.2, "a barrier, and next to nothing is recovered"
    fresh, recycled = target(str(world.new)), target(str(world.new))
    handle = attached(recycled.model)
    found.delta.apply(recycled.model)
    for model in (fresh.model, recycled.model):
        with torch.no_grad():
            start = float(loss(model, world.target))
        assert (start == bare) == (model is fresh.model)
    short = 5
    values = {n: p.detach().clone() for n, p in recycled.model.named_parameters()}
    handle.detach()
    with torch.no_grad():
        for n, p in recycled.model.named_parameters():
            p.copy_(values[n])  # the transferred weights are the start, as the paper has it
    ends = []
    for on in (fresh, recycled):
        delta = learn(on.model, world.target, short, 2e-3)
        on.fingerprint = None
        delta.apply(on.model)
        with torch.no_grad():
            ends.append(float(loss(on.model, world.target)))
    assert ends[1] < ends[0]


def test_p335_the_residual_keeps_both(world: World, tmp_path: Path) -> None:
    moved = port(world.tuned, world.new, method="instruction-residual")
    both = world.losses(world.new, moved.delta)
    instructed = target(str(world.old))
    world.tuned.apply(instructed.model)
    values = {n: p.detach().clone() for n, p in instructed.model.named_parameters()}
    attached(instructed.model).detach()
    with torch.no_grad():
        for n, p in instructed.model.named_parameters():
            p.copy_(values[n])
    learn(instructed.model, world.other, 15, 1e-3).apply(instructed.model)  # the other order: it is trained on itself
    with torch.no_grad():
        after = float(loss(instructed.model, world.target))
    assert both[0] < after  # what was instructed is kept better
    assert both[1] < world.losses(world.old)[1]  # and the new text still helps
    base_at(tmp_path / "wide", vocab_size=160)
    with pytest.raises(LuthierError, match="vocabularies differ"):
        port(world.tuned, tmp_path / "wide", method="instruction-residual")
    adapter = delta_of(world.old, "adapter", width=4)
    with pytest.raises(LuthierError, match="no change of weights"):
        port(adapter, world.new, method="instruction-residual")


def answers(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def alone(base: Path, delta: Path | None = None) -> Tensor:
    model = target(str(base)).model
    if delta is not None:
        Delta.load(delta).apply(model)
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


def test_p463_proxy_tuning(place: Path, scales: Scales, tmp_path: Path) -> None:
    expert = str(place / "full")
    same = assemble({"large": str(place / "small"), "expert": expert, "method": "proxy"}).model
    assert torch.allclose(answers(same), alone(place / "small", place / "full"), atol=1e-5)  # M = M⁻ gives M⁺
    off = assemble({"large": str(place / "large"), "expert": expert, "method": "proxy", "alpha": 0.0}).model
    assert torch.allclose(answers(off), alone(place / "large"), atol=1e-6)  # α = 0 gives M
    full = assemble({"large": str(place / "large"), "expert": expert, "method": "proxy"}).model
    want = alone(place / "large") + alone(place / "small", place / "full") - alone(place / "small")
    assert torch.allclose(answers(full), want.log_softmax(-1), atol=1e-4)
    before = target(str(place / "large")).model.state_dict()
    assert all(torch.equal(v, before[n]) for n, v in full.large.model.state_dict().items())  # nothing of M is touched
    by_proxy = scales.right(scales.fused("proxy"))
    assert scales.right(scales.large) < scales.right(scales.expert) < by_proxy - 0.02
    assert by_proxy < scales.right(scales.tuned) - 0.02, "between M⁺ and M tuned itself"
    base_at(tmp_path / "else")
    path = tmp_path / "else" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"§":', 1))
    with pytest.raises(LuthierError, match="unequal vocabularies"):
        assemble({"large": str(tmp_path / "else"), "expert": expert})


def test_p160_emulated_fine_tuning(place: Path, scales: Scales) -> None:
    expert = str(place / "lora")
    same = assemble({"large": str(place / "small"), "expert": expert, "method": "emulated-fine-tuning"}).model
    assert torch.allclose(answers(same), alone(place / "small", place / "lora"), atol=1e-5)
    off = assemble(
        {"large": str(place / "large"), "expert": expert, "method": "emulated-fine-tuning", "beta": 0.0}
    ).model
    assert torch.allclose(answers(off), alone(place / "large"), atol=1e-6)
    assert scales.nll(scales.large) < scales.nll(scales.small) - 0.1, "the large base knows what the small one does not"
    scaled = scales.fused("emulated-fine-tuning")
    assert scales.nll(scaled) < min(scales.nll(scales.large), scales.nll(scales.expert)) - 0.05, (
        "better than both parents"
    )
    assert scales.apart(scaled) < 0.8 * min(scales.apart(scales.large), scales.apart(scales.expert))


def test_p267_dynamic_logits_fusion(place: Path, scales: Scales) -> None:
    fusion = MOVES.make("dynamic-fusion", {})
    g = torch.Generator().manual_seed(0)
    large, expert, base = (1.5 * torch.randn(64, 50, generator=g) for _ in range(3))
    assert torch.allclose(fusion.fuse(large, [(base, base)]), large.log_softmax(-1), atol=1e-6)  # no effect of α
    expert = base + 0.7 * (expert - base)
    p, q = large.log_softmax(-1), base.log_softmax(-1)
    wanted, found = divergence(expert.log_softmax(-1), q), divergence(fusion.fuse(large, [(expert, base)]), p)
    change = expert.log_softmax(-1) - q
    reach = divergence((p + 2 * change).log_softmax(-1), p)
    inside = wanted < reach
    assert int(inside.sum()) > 48
    assert torch.allclose(found[inside], wanted[inside], rtol=1e-3)  # the divergences match wherever α ≤ 2 can
    assert torch.allclose(found[~inside], reach[~inside], rtol=1e-3)
    dynamic = scales.fused("dynamic-fusion")
    assert scales.nll(dynamic) < min(scales.nll(scales.large), scales.nll(scales.expert)) - 0.05
    assert scales.apart(dynamic) < 0.8 * min(scales.apart(scales.large), scales.apart(scales.expert))
    made = assemble({"large": str(place / "large"), "expert": str(place / "lora"), "method": "dynamic-fusion"}).model
    far = divergence(answers(made), alone(place / "large"))
    told = divergence(alone(place / "small", place / "lora"), alone(place / "small"))
    assert bool((far <= told * 1.001 + 1e-5).all())
