"""port: the additive change arrives on the new base, and what cannot be carried is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.algebra.port import reads_base
from luthier.bridge.target import logits_of, target
from luthier.cli import main
from luthier.delta import MOVES
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.moving.engine import Transport
from luthier.verbs import verify
from luthier.verbs.port import port
from tests.moves import base_at, delta_of, full_of, tuned
from tests.tiny import tiny_ids

FORMS = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "sparse": {},
    "bias": {},
    "ia3": {},
    "scale-shift": {"shift": False},
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_at(tmp_path_factory.mktemp("bases") / "old")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_at(tmp_path_factory.mktemp("bases") / "new", seed=5)


def changes(base: Path, delta: Delta) -> dict[str, torch.Tensor]:
    values = tuned(base, delta)
    return {n: v - values[f"base:{n}"] for n, v in values.items() if not n.startswith("base:")}


@pytest.mark.parametrize("form", [f for f in FORMS if f != "bias"])
def test_the_additive_change_is_the_same(old: Path, new: Path, form: str) -> None:
    delta = delta_of(old, form, **FORMS[form])
    found = port(delta, new)
    before, after = changes(old, delta), changes(new, found.delta)
    assert any(bool(v.any()) for v in before.values())
    for name, change in before.items():
        assert torch.allclose(after[name], change, atol=2e-6), name
    assert found.delta.base["fingerprint"] == target(str(new)).card()["fingerprint"] != delta.base["fingerprint"]
    assert found.delta.lineage["ported_from"]["fingerprint"] == delta.base["fingerprint"]
    carried = found.pieces[0]
    assert ("bit for bit" in carried.preserved) == (carried.now == form) == (not reads_base(delta.pieces[0]))


@pytest.mark.parametrize("form", ["lora", "sparse", "bias"])
def test_numbers_that_know_no_base_are_carried_bit_for_bit_and_back(old: Path, new: Path, form: str) -> None:
    delta = delta_of(old, form, **FORMS[form])
    there = port(delta, new).delta
    back = port(there, old, base=new).delta
    for a, b, c in zip(delta.pieces, there.pieces, back.pieces, strict=True):
        for key in a.sites:
            for name, value in a.p[key].items():
                assert torch.equal(value, b.p[key][name]) and torch.equal(value, c.p[key][name])
    assert back.base["fingerprint"] == delta.base["fingerprint"] and back.seals == delta.seals


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_exact_differences_are_written_anew(old: Path, new: Path, share: float) -> None:
    delta = full_of(old, share=share)
    there = port(delta, new, method="fine-tuning-transfer", connectivity=False)
    before, after = changes(old, delta), changes(new, there.delta)
    for name, change in before.items():
        assert float((after[name] - change).abs().max()) <= 2**-22, name
    assert [type(p.form) for p in there.delta.pieces] == [type(p.form) for p in delta.pieces]
    assert there.delta.nbytes() == delta.nbytes()
    back = changes(old, port(there.delta, old, base=new).delta)
    assert all(float((back[n] - before[n]).abs().max()) <= 2**-21 for n in before)


def test_on_the_same_base_it_is_the_same_delta(old: Path) -> None:
    for delta in (delta_of(old, "lora", rank=2), full_of(old)):
        same = port(delta, old).delta
        for a, b in zip(delta.pieces, same.pieces, strict=True):
            assert all(torch.equal(a.p[k][n], b.p[k][n]) for k in a.sites for n in a.p[k])


def test_several_pieces_keep_their_sum(old: Path, new: Path) -> None:
    """LoRA below (IA)³, which reads what LoRA made of the outputs: the sum of changes is what it was."""
    lora, ia3 = delta_of(old, "lora", rank=2, seed=1), delta_of(old, "ia3", seed=2)
    both = lora + ia3
    both.base = dict(lora.base)
    there = port(both, new).delta
    assert {p.name for p in there.pieces} == {"lora", "ported"}
    before, after = changes(old, both), changes(new, there)
    for name, change in before.items():
        assert torch.allclose(after[name], change, atol=3e-6), name


def test_scale_multiplies_the_change(old: Path, new: Path) -> None:
    for delta in (delta_of(old, "lora", rank=2), delta_of(old, "dora", rank=2), full_of(old)):
        once, half = changes(new, port(delta, new).delta), changes(new, port(delta, new, scale=0.5).delta)
        assert all(torch.allclose(half[n], once[n] / 2, atol=2e-6) for n in once)


def test_numbers_may_be_kept_instead(old: Path, new: Path) -> None:
    delta = delta_of(old, "dora", rank=4)
    there = port(delta, new, keep="numbers")
    piece = there.delta.pieces[0]
    assert there.pieces[0].now == "dora"
    weights = target(str(new))
    for key, site in piece.sites.items():
        assert all(torch.equal(piece.p[key][n], delta.pieces[0].p[key][n]) for n in ("A", "B", "m"))
        w2 = weights.tensor(f"{site.name}.weight").square().sum(1)
        assert torch.allclose(piece.fixed[key]["w2"], w2)


def test_written_folder_is_a_delta_of_the_new_base(old: Path, new: Path, tmp_path: Path) -> None:
    delta_of(old, "dora", rank=2).save(tmp_path / "delta")
    found = port(tmp_path / "delta", new, out=tmp_path / "moved")
    assert found.out == tmp_path / "moved"
    report = verify(tmp_path / "moved")
    assert report.ok, str(report)
    assert verify(tmp_path / "moved", base=old).ok is False


def test_a_plan_says_the_same(old: Path, new: Path, tmp_path: Path) -> None:
    delta_of(old, "lora", rank=2).save(tmp_path / "delta")
    plan = tmp_path / "port.yaml"
    plan.write_text(f"delta: {tmp_path / 'delta'}\nonto: {new}\nmethod: instruction-residual\n")
    a = port(plan, out=tmp_path / "a").delta
    b = port({"delta": str(tmp_path / "delta"), "onto": str(new), "method": "portllm"}, out=tmp_path / "b").delta
    assert a.seals == b.seals and a.lineage["move"]["name"] == "instruction-residual"


def test_onto_a_delta_means_the_model_it_makes(old: Path, tmp_path: Path) -> None:
    full_of(old, seed=8).save(tmp_path / "newer")
    delta = delta_of(old, "lora", rank=2)
    found = port(delta, tmp_path / "newer", out=tmp_path / "moved")
    assert (tmp_path / "moved" / "base" / "config.json").exists()
    assert verify(tmp_path / "moved").ok
    values = tuned(old, Delta.load(tmp_path / "newer"))
    loaded = target(str(tmp_path / "moved" / "base"))
    assert all(torch.equal(p, values[n]) for n, p in loaded.model.named_parameters())
    assert found.delta.base["name"].endswith("moved/base")


def test_forms_without_a_weight_change(old: Path, new: Path) -> None:
    delta = delta_of(old, "adapter", width=4)
    found = port(delta, new)
    assert "no change of weights" in found.pieces[0].preserved
    on = target(str(new))
    before = logits_of(on.model)(tiny_ids())
    found.delta.apply(on.model)
    assert not torch.equal(logits_of(on.model)(tiny_ids()), before)
    for method in ("fine-tuning-transfer", "instruction-residual"):
        with pytest.raises(LuthierError, match="portllm"):
            port(delta, new, method=method)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocab_size": 160}, "vocabularies differ"),
        ({"num_hidden_layers": 3}, "sizes differ"),
        ({"intermediate_size": 64}, "sizes differ"),
        ({"family": "qwen2"}, "one architecture"),
    ],
)
def test_another_architecture_is_refused(old: Path, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    base_at(tmp_path / "else", **settings)
    delta = delta_of(old, "lora", rank=2)
    with pytest.raises(LuthierError, match=words) as caught:
        port(delta, tmp_path / "else", out=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    del delta.base["name"]  # without the old base its own sites still tell
    if settings != {"vocab_size": 160}:
        with pytest.raises(LuthierError):
            port(delta, tmp_path / "else")


def test_another_vocabulary_of_one_size_is_refused(old: Path, tmp_path: Path) -> None:
    base_at(tmp_path / "else", seed=5)
    path = tmp_path / "else" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"§":', 1))
    with pytest.raises(LuthierError, match="other ids"):
        port(delta_of(old, "lora", rank=2), tmp_path / "else")


def test_bad_input_is_one_line(old: Path, new: Path, tmp_path: Path) -> None:
    delta = delta_of(old, "lora", rank=2)
    delta.save(tmp_path / "delta")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "detla", {"onto": new}, "did you mean 'delta'"),
        (tmp_path / "delta", {"onto": new, "method": "portlm"}, "did you mean 'portllm'"),
        (tmp_path / "delta", {"onto": new, "method": "proxy"}, "luthier assemble"),
        (tmp_path / "delta", {"onto": new, "scael": 2}, "scale"),
        (tmp_path / "delta", {"onto": new, "scale": -1}, "above 0"),
        (tmp_path / "delta", {"onto": tmp_path / "nowhere"}, "no such folder"),
        (tmp_path / "delta", {"onto": new, "out": tmp_path / "full"}, "not empty"),
        (tmp_path / "delta", {}, "onto"),
    ]
    for source, options, words in cases:
        with pytest.raises(LuthierError, match=words) as caught:
            port(source, options.pop("onto", None), **options)
        assert "\n" not in str(caught.value)
    broken = delta_of(old, "lora", rank=2)
    next(iter(broken.pieces[0].p.values()))["A"][0, 0] = float("nan")
    with pytest.raises(LuthierError, match="NaN"):
        port(broken, new)
    exact = full_of(old)
    exact.base["name"] = str(tmp_path / "gone")
    with pytest.raises(LuthierError, match="gone"):
        port(exact, new)


def test_the_side_that_is_unsound_is_named(old: Path, tmp_path: Path) -> None:
    def spoilt(name: str, seed: int = 0) -> Path:
        folder = base_at(tmp_path / name, seed=seed)
        values = load_file(folder / "model.safetensors")
        values["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder

    with pytest.raises(LuthierError, match=r"up_proj.weight is not finite .*: the new base .*new holds NaN") as caught:
        port(full_of(old), spoilt("new", 5))
    assert "\n" not in str(caught.value)
    broken = target(str(old))
    delta = full_of(old)
    broken.tensor("model.layers.0.mlp.up_proj.weight").detach()[0, 0] = float("nan")
    delta.base["fingerprint"] = None
    with pytest.raises(LuthierError, match=r"the old base .* holds NaN"):
        port(delta, base_at(tmp_path / "sound", seed=5), base=broken)


def test_what_does_not_fit_is_told_before_anything_else(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta_of(old, "lora", rank=2).save(tmp_path / "delta")
    base_at(tmp_path / "deep", num_hidden_layers=3)
    capsys.readouterr()
    for where, said in (("out", "sizes differ"), ("delta/out", "lies in")):
        with pytest.raises(SystemExit) as left:
            main(["port", str(tmp_path / "delta"), "--onto", str(tmp_path / "deep"), "--out", str(tmp_path / where)])
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and said in told


def test_connectivity(old: Path, new: Path) -> None:
    delta = delta_of(old, "lora", rank=2)
    found = port(delta, new, method="fine-tuning-transfer").connectivity
    assert found is not None and found["places"] == [0, 0.25, 0.5, 0.75, 1] and len(found["losses"]) == 5
    on = target(str(new))
    same = port(delta_of(old, "lora", rank=2), old, connectivity={"points": 3}).connectivity
    assert same is not None and same["barrier"] == 0 and same["connected"] and len(set(same["losses"])) == 1
    fresh = dict(target(str(new)).model.named_parameters())
    assert all(torch.equal(p, fresh[n]) for n, p in on.model.named_parameters())


def test_every_transport_is_one_arithmetic() -> None:
    g = torch.Generator().manual_seed(0)
    new, change = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    rows = [name for name, cls in MOVES.items() if issubclass(cls, Transport)]
    assert rows == ["fine-tuning-transfer", "instruction-residual", "portllm"]
    for name in rows:
        assert torch.equal(MOVES.make(name, {}).carry(new, change), new + change)
        assert torch.equal(MOVES.make(name, {"scale": 0.5}).carry(new, change), new + 0.5 * change)
