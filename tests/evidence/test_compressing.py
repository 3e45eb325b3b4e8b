"""One test a row of compression: what any faithful implementation shows exactly. `luthier papers ID` names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from luthier.algebra.calibrate import loss, read_text
from luthier.attach import Attached, attached
from luthier.attach.sites import sites_for, sites_of
from luthier.bases.recast import drop_channels, factor, live_channels, shrink
from luthier.bases.roles import Roles
from luthier.bridge.target import logits_of
from luthier.delta import COMPRESSIONS, FORMS, Change, Site, State
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.parts.packing import entropy
from luthier.plan.schema import SourceSpec
from luthier.verbs.compress import Compressed, compress
from luthier.verbs.load import load
from tests.contract.conformance import quiet
from tests.laws.test_compress_laws import packed_delta
from tests.rooms.test_compress import saved, tuned_of
from tests.tiny import tiny, tiny_ids, tiny_tokenizer

RECIPES = Path(__file__).parents[2] / "luthier" / "recipes"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned model and text, in one folder."""
    folder = tmp_path_factory.mktemp("evidence")
    saved(tiny(), folder / "base")
    saved(tuned_of(tiny()), folder / "tuned")
    g = torch.Generator().manual_seed(0)
    rows = ["".join(chr(97 + int(c)) for c in torch.randint(0, 26, (60,), generator=g)) for _ in range(20)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows) + "\n")
    return folder


LETTERS = 26


def sentences(rows: int, seed: int, own: float = 0.0) -> list[str]:
    """A little language: every letter is followed by one of two, of which a share is a dialect's own."""
    table, other = (
        torch.randint(0, LETTERS, (LETTERS, 2), generator=torch.Generator().manual_seed(n)) for n in (0, 78)
    )
    table = torch.where(torch.rand(LETTERS, 1, generator=torch.Generator().manual_seed(77)) < own, other, table)
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, LETTERS, (rows,), generator=g)]
    for _ in range(15):
        ids.append(table[ids[-1], (torch.rand(rows, generator=g) < 0.2).long()])
    return ["".join(chr(97 + int(c)) for c in row) for row in torch.stack(ids, 1)]


def spelt(rows: list[str]) -> Tensor:
    """Their token ids."""
    return torch.tensor([tiny_tokenizer()(row, add_special_tokens=False)["input_ids"] for row in rows])


def next_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def learn(model: Any, numbers: list[Any], ids: Tensor, steps: int) -> None:
    """AdamW on next letters; with the model left in eval mode."""
    optimiser = torch.optim.AdamW(numbers, lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        next_loss(model, ids).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learnt the language, a model tuned on its dialect, and text in both."""
    folder, model = tmp_path_factory.mktemp("speakers"), tiny()
    learn(model, list(model.parameters()), spelt(sentences(32, 1)), 80)
    saved(model, folder / "base")
    learn(model, list(model.parameters()), spelt(sentences(32, 2, 0.4)), 40)
    saved(model, folder / "tuned")
    for name, own in (("text", 0.0), ("dialect", 0.4)):
        rows = [json.dumps({"text": row}) for row in sentences(64, 5, own)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def small(place: Path, out: Path, method: str, **more: Any) -> Compressed:
    common: dict[str, Any] = {"calibration": str(place / "text.jsonl"), "tokens": 1024, "length": 32, "out": out}
    return compress(place / "base", place / "tuned", method=method, **(common | more))


def random_matrix(name: str, change: Tensor, inputs: Tensor | None = None, **more: Any) -> tuple[Tensor, int]:
    """What a compressed matrix stands for, and its bytes on disk."""
    site = Site("w", "ffn.up", 0, "linear", change.shape[1], change.shape[0])
    made = COMPRESSIONS.make(name, more).compress(Change(site, torch.zeros_like(change), change, inputs))
    stored = made.form.stored(site, made.p, made.fixed)
    taken = sum(t.numel() * t.element_size() for group in stored for t in group.values())
    back = made.form.delta(State(site, made.p, made.fixed, lambda: torch.zeros_like(change)))
    return back["weight"], taken  # pyright: ignore[reportIndexIssue]


def test_p088_bitdelta(place: Path, tmp_path: Path) -> None:
    """One bit a weight and one number a matrix; tuning the scales brings the logits nearer; the base stays as it was."""
    found = small(place, tmp_path / "d", "bitdelta", steps=30)
    piece = next(p for p in Delta.load(tmp_path / "d").pieces if p.name == "bitdelta")
    stored = load_file(tmp_path / "d" / "delta.safetensors")
    for key, site in piece.sites.items():
        own = {k: t for k, t in stored.items() if k.startswith(f"bitdelta/{key}/")}
        bits = [t for t in own.values() if t.dtype == torch.uint8]
        rest = [t for t in own.values() if t.dtype != torch.uint8]
        assert [t.numel() for t in bits] == [site.d_out * site.d_in // 8] and [t.numel() for t in rest] == [1]
    assert found.report["logits"]["tuned"] < found.report["logits"]["compressed"]
    plain = small(place, tmp_path / "e", "bitdelta", tune=False)
    base, tuned = (load(str(place / n)) for n in ("base", "tuned"))
    for key, numbers in next(p for p in plain.delta.pieces if p.name == "bitdelta").p.items():
        change = (tuned.get_submodule(key).weight - base.get_submodule(key).weight).detach()
        assert float(numbers["scale"]) == pytest.approx(float(change.abs().mean()), rel=1e-5)
    total = found.report["total"]
    assert total["matrices_bits"] < 1.1 and total["file_bits"] > 8, "kept embeddings are most of a small file"


def test_p023_mixed_bits_beat_rank_and_sign_at_equal_bits() -> None:
    """On a change with a long tail of singular values: error in the weights and in outputs on the calibration inputs below
    low rank in 16 bits and below signs, at the same bytes on disk, which are the budget's."""
    g = torch.Generator().manual_seed(0)
    rows, columns = 192, 256
    u, v = (torch.linalg.qr(torch.randn(n, rows, generator=g))[0] for n in (rows, columns))
    change = u @ torch.diag(torch.arange(1, rows + 1).float().pow(-0.8)) @ v.t() * 0.05
    x = torch.randn(500, 32, generator=g) @ torch.randn(32, columns, generator=g) + torch.randn(
        500, columns, generator=g
    )
    budget = rows * columns // 8
    mixed, taken = random_matrix("delta-come", change, x)
    assert 0.9 * budget < taken <= budget + 4
    sign, one = random_matrix("bitdelta", change)
    assert one == budget + 4
    rank = budget * 8 // (16 * (rows + columns))
    low, _ = random_matrix("svd", change, rank=rank)
    blind, _ = random_matrix("delta-come", change)
    for at, own in ((torch.eye(columns), blind), (x, mixed)):
        errors = [float(((change - back) @ at.t()).norm()) for back in (own, low, sign)]
        assert errors[0] < 0.95 * min(errors[1:]), errors
    assert ((change - mixed) @ x.t()).norm() < ((change - blind) @ x.t()).norm(), (
        "calibration inputs help on themselves"
    )


def test_p084_compeft(place: Path, speakers: Path, tmp_path: Path) -> None:
    """Exact ternary values through the file, bytes near the entropy, a factor of least loss, and sums of two."""
    change = torch.randn(512, 600, generator=torch.Generator().manual_seed(0)) * 1e-3
    for density in (0.05, 0.1, 0.2):
        _, taken = random_matrix("compeft", change, density=density)
        bits = 8 * taken / change.numel()
        assert bits == pytest.approx(entropy(density) + density, rel=0.04)
    found = small(place, tmp_path / "d", "compeft", density=0.2)
    before = next(p for p in found.delta.pieces if p.name == "compeft")
    after = next(p for p in Delta.load(tmp_path / "d").pieces if p.name == "compeft")
    for key in before.sites:
        for name, value in before.fixed[key].items():
            assert torch.equal(after.fixed[key][name], value)
        assert set(after.fixed[key]["sign"].unique().tolist()) <= {-1, 1}
    tries = {t["factor"]: t["loss"] for t in found.report["tries"]}
    assert len(tries) == len(COMPRESSIONS.make("compeft", {}).alphas)
    spec = [SourceSpec.model_validate({"path": str(place / "text.jsonl")})]
    text = read_text(spec, tiny_tokenizer(), "causal", 1024, 32)
    best = loss(logits_of(load(str(place / "base"), [tmp_path / "d"])), text)
    assert best == pytest.approx(min(tries.values()), rel=1e-4)
    held = spelt(sentences(64, 3, 0.4))
    losses = [float(next_loss(load(str(speakers / n)), held).detach()) for n in ("base", "tuned")]
    for density in (0.05, 0.2):
        out = tmp_path / f"at-{density}"
        common = {"method": "compeft", "density": density, "tokens": 1024, "length": 16, "out": out}
        compress(speakers / "base", speakers / "tuned", calibration=str(speakers / "dialect.jsonl"), **common)
        back = float(next_loss(load(str(speakers / "base"), [out]), held).detach())
        assert (losses[0] - back) / (losses[0] - losses[1]) > 0.9, "near the original's loss on text not swept on"
    both = packed_delta("compeft", 1) + packed_delta("compeft", 2)
    assert len(both.pieces) == 2 and both.apply(tiny()).fold().written


def test_p142_deltazip(place: Path, tmp_path: Path) -> None:
    """Two of four everywhere, outputs on calibration inputs nearer than plain rounding's, and both ratios reported."""
    g = torch.Generator().manual_seed(0)
    change = torch.randn(96, 256, generator=g) * 1e-3
    x = torch.randn(800, 24, generator=g) @ torch.randn(24, 256, generator=g) + 0.3 * torch.randn(800, 256, generator=g)
    for bits in (2, 4):
        blind, taken = random_matrix("deltazip", change, bits=bits)
        seeing, same = random_matrix("deltazip", change, x, bits=bits)
        assert taken == same and 8 * taken / change.numel() == pytest.approx(bits / 2 + 0.67 + 16 / 128, rel=0.02)
        assert int((seeing != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2
        assert ((change - seeing) @ x.t()).norm() < 0.8 * ((change - blind) @ x.t()).norm()
    found = small(place, tmp_path / "d", "deltazip")
    without = compress(place / "base", place / "tuned", method="deltazip", out=tmp_path / "e")
    assert found.report["total"]["matrices_bits"] == without.report["total"]["matrices_bits"] < 16 / 5
    assert found.report["total"]["file_ratio_16"] < 2, "here embeddings are most of the file"
    near = small(place, tmp_path / "f", "deltazip", bits=6)
    assert near.report["logits"]["compressed"] < found.report["logits"]["compressed"] < found.report["logits"]["base"]


def trained(handle: Attached, model: Any, steps: int, lr: float, penalty: bool = True) -> None:
    """AdamW on next tokens of random text, with the forms' penalties."""
    rows = [p for table in handle.trained().values() for _, p in table]
    optimiser = torch.optim.AdamW(rows, lr=lr, weight_decay=0.0)
    model.train()
    for k in range(steps):
        ids = tiny_ids(4, 12, seed=k)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + (handle.penalty() if penalty else 0)).backward()
        optimiser.step()
        handle.after_step()
        optimiser.zero_grad()
    model.eval()


def test_p169_gates_reach_their_share_and_closed_ones_can_go() -> None:
    """At the recipe's own rate and steps: only gates and biases move; the mean probability of an open gate comes to the
    target in every matrix; without its closed rows and columns the folded model gives the same."""
    torch.manual_seed(0)
    train = yaml.safe_load((RECIPES / "finegates.yaml").read_text(encoding="utf-8"))["train"]
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    roles, handle = Roles(model), attached(model)
    form = FORMS.make("gates", {"target": 0.5})
    base = quiet(model)
    handle.add(handle.build("gates", form, sites_for(roles, form)), train=True)
    assert torch.equal(quiet(model), base)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".luthier." not in n}
    handle.move("bias", {n: None for n in before if n.endswith("bias")})
    trained(handle, model, train["steps"], train["lr"])
    after = {n: p for n, p in model.named_parameters() if n in before}
    assert {n for n in before if not torch.equal(before[n], after[n])} <= {n for n in before if n.endswith("bias")}
    for q in handle.placed["gates"]:
        for side in ("inputs", "outputs"):
            assert float(form.open(q.state, side).detach().mean()) == pytest.approx(0.5, abs=0.05)
    gated = quiet(model)
    handle.fold()
    assert torch.allclose(quiet(model), gated, atol=1e-4)
    closed = sum(int((p == 0).all(1).sum()) for n, p in model.named_parameters() if "proj.weight" in n)
    assert closed > 0 and shrink(model, roles) < 0.95
    assert torch.allclose(quiet(model), gated, atol=1e-4)


@pytest.mark.parametrize("target", [0.32, 0.35])
def test_p169_accuracy_with_a_share_removed(target: float, speakers: Path) -> None:
    """With 20 to 40 % of the numbers physically gone the accuracy is that of the gated model, and little below the base's."""
    model = load(str(speakers / "base"))
    roles, handle, ids, held = Roles(model), attached(model), spelt(sentences(32, 1)), spelt(sentences(64, 3))

    def accuracy() -> float:
        with torch.no_grad():
            logits = model(input_ids=held, use_cache=False).logits
        return float((logits[:, :-1].argmax(-1) == held[:, 1:]).float().mean())

    whole, form = accuracy(), FORMS.make("gates", {"target": target})
    handle.add(handle.build("gates", form, sites_for(roles, form)), train=True)
    rows = [p for table in handle.trained().values() for _, p in table]
    optimiser = torch.optim.AdamW(rows, lr=0.05, weight_decay=0.0)
    model.train()
    torch.manual_seed(0)
    for _ in range(80):
        (next_loss(model, ids) + handle.penalty()).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    gated = accuracy()
    handle.fold()
    left = shrink(model, roles)
    assert 0.6 < left < 0.8 and accuracy() == pytest.approx(gated, abs=0.01)
    assert gated > 0.9 * whole


def test_p343_pela(speakers: Path, tmp_path: Path) -> None:
    """A factor-th of the numbers by the paper's formula, features nearer to the frozen base's after the stage between,
    and two thin maps in the place of each matrix give what the delta gives."""
    found = compress(
        speakers / "base", method="pela", out=tmp_path / "d", calibration=str(speakers / "text.jsonl"), tokens=1024, length=16,
        steps=40, lr=0.05,
    )  # fmt: skip
    piece = next(p for p in found.delta.pieces if p.name == "pela")
    for key, site in piece.sites.items():
        r = site.d_in * site.d_out // (2 * (site.d_in + site.d_out))
        assert piece.p[key]["A"].shape == (r, site.d_in) and piece.p[key]["B"].shape == (site.d_out, r)
        assert piece.form.count(site) <= site.d_in * site.d_out / 2
    assert found.report["logits"]["tuned_features"] < 0.9 * found.report["logits"]["features"]
    model = load(str(speakers / "base"), [tmp_path / "d"])
    attachedly, numbers = quiet(model), sum(p.numel() for n, p in model.named_parameters() if ".luthier." not in n)
    attached(model).detach()
    assert factor(model, {k: (t["A"], t["B"]) for k, t in piece.p.items()}) < 0.8 * numbers
    assert torch.allclose(quiet(model), attachedly, atol=1e-4, rtol=1e-3)
    plain = compress(speakers / "base", method="pela", out=tmp_path / "e")
    drift = {}
    for name, delta in (("plain", plain.delta), ("tuned", found.delta)):
        own = next(p for p in delta.pieces if p.name == "pela")
        drift[name] = float(sum((own.p[k]["B"] @ own.p[k]["A"]).norm() for k in own.sites))
    assert drift["plain"] != drift["tuned"], "the stage between trains the factors"
    downstream = {}
    for name in ("d", "e"):
        model = load(str(speakers / "base"), [tmp_path / name])
        numbers = [v.requires_grad_(True) for q in attached(model).placed["pela"] for v in q.state.p.values()]
        learn(model, numbers, spelt(sentences(32, 2, 0.4)), 10)
        downstream[name] = float(next_loss(model, spelt(sentences(64, 3, 0.4))).detach())
    assert downstream["d"] < downstream["e"] - 0.01, "tuned on as they stand, it does better than by SVD alone"
    saved(tiny("gpt2"), tmp_path / "gpt2")
    other = compress(tmp_path / "gpt2", method="pela", out=tmp_path / "f").delta.pieces
    assert [p.form.matrices for p in (piece, other[0])] == [7, 4], "the penalty is averaged over what a layer has"


SPARSE = ["embed", "attn.o", "ffn.down"]


def test_p114_sparsified_channels_can_go(tmp_path: Path) -> None:
    """Identity at the start; the same channels closed at every site; folded and physically smaller, an ordinary checkpoint
    gives the masked model's logits with fewer multiplications."""
    model = tiny()
    base = quiet(model)
    start = attached(model)
    form = FORMS.make("sparsifier", {"rank": 6})
    start.add(start.build("hsm", form, sites_for(Roles(model), form, SPARSE)))
    assert torch.equal(quiet(model), base)
    start.detach()
    dropped = [1, 4, 9, 13, 20, 22, 27, 31]
    form = FORMS.make("sparsifier", {"rank": 6, "dropped": dropped})
    roles, handle = Roles(model), attached(model)
    handle.add(handle.build("hsm", form, sites_for(roles, form, SPARSE)), train=True)
    trained(handle, model, 5, 0.01)
    masked = quiet(model)
    whole = sum(p.numel() for n, p in model.named_parameters() if ".luthier." not in n)
    with pytest.raises(LuthierError, match="still written to"):
        drop_channels(tiny(), Roles(tiny()), torch.arange(24))
    handle.fold()
    kept = live_channels(model, roles)
    assert kept.tolist() == [c for c in range(32) if c not in dropped]
    folded = tiny()
    with torch.no_grad():
        for name, p in folded.named_parameters():
            p.copy_(model.get_parameter(name))
    drop_channels(folded, Roles(folded), kept)
    assert torch.allclose(quiet(folded), masked, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in folded.parameters()) == pytest.approx(0.75 * whole, rel=0.01)
    folded.save_pretrained(tmp_path / "small")
    again = type(folded).from_pretrained(tmp_path / "small")
    assert again.config.hidden_size == 24 and torch.allclose(quiet(again), masked, atol=1e-5, rtol=1e-4)


def test_p114_the_trained_mask(tmp_path: Path) -> None:
    """Identity at the start; one mask for all sites, that reaches the share asked for and is then fixed; folded and without
    its channels an ordinary checkpoint gives the masked model's logits by as many fewer operations."""
    model, steps = tiny(), 60
    base, roles, handle = quiet(model), Roles(model), attached(model)
    form = FORMS.make("pat", {"rank": 6, "keep": 0.75, "steps": steps})
    handle.add(handle.build("hsm", form, sites_for(roles, form, SPARSE)), train=True)
    handle.add(handle.build("lora", FORMS.make("lora", {"rank": 4}), sites_of(roles, ["linear"])), train=True)
    sites = handle.placed["hsm"]
    assert torch.equal(quiet(model), base) and torch.equal(quiet(model.train()), base)
    logits = sites[0].state.p["logits"]
    assert all(q.state.p["logits"] is logits for q in sites) and len(sites) == 5
    rows = [v for table in handle.trained().values() for _, v in table]
    assert sum(v is logits for v in rows) == 1
    optimiser, ids = torch.optim.AdamW(rows, lr=0.03, weight_decay=0.0), tiny_ids(8, 16)
    hard = []
    for step in range(steps):
        handle.ctx.step = step
        optimiser.zero_grad()
        (model(ids, labels=ids).loss + handle.penalty()).backward()
        optimiser.step()
        hard.append(logits.detach().clone())
    assert abs(int((hard[-1] >= 0).sum()) - 24) <= 4, "the penalty closes about a quarter"
    assert all(torch.equal(m, hard[47]) for m in hard[48:]) and not torch.equal(hard[46], hard[47]), (
        "fixed from 0.8 T on"
    )
    stays = form.mask(sites[0].state, still=True).detach()
    put = form.delta(sites[1].state)["weight"].detach() + sites[1].state.W()
    assert torch.equal(put.abs().sum(1) > 0, stays > 0), "folding takes the mask as it ends, not as it trains"
    model.eval()
    masked = quiet(model)
    assert torch.equal(form.mask(sites[0].state).detach(), stays)
    assert stays.unique().tolist() == [0, 1] and int(stays.sum()) == 24, "and the mask exactly a quarter"
    handle.delta().save(tmp_path / "delta")
    again = tiny()
    Delta.load(tmp_path / "delta").apply(again)
    assert torch.equal(quiet(again), masked), "no step is known where a delta is loaded, and the mask is the same"
    with FlopCounterMode(display=False) as whole:
        quiet(tiny())
    handle.fold()
    kept = live_channels(model, roles)
    assert torch.equal(kept, stays.nonzero()[:, 0])
    folded = tiny()
    with torch.no_grad():
        for name, p in folded.named_parameters():
            p.copy_(model.get_parameter(name))
    drop_channels(folded, Roles(folded), kept)
    assert torch.allclose(quiet(folded), masked, atol=1e-5, rtol=1e-4)
    with FlopCounterMode(display=False) as fewer:
        quiet(folded)
    assert 0.74 < fewer.get_total_flops() / whole.get_total_flops() < 0.8, "but for attention itself a quarter goes"
    with pytest.raises(LuthierError, match="one width"):
        other = tiny()
        uneven = sites_for(Roles(other), form, ["ffn.down", "ffn.up"])
        attached(other).add(attached(other).build("hsm", form, uneven), train=True)
