"""Rebase: deltas under other scales, the rule that chooses, and whole rebases of tiny models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.algebra.rescale import by_depth, rescaled
from luthier.bridge.target import logits_of, target
from luthier.cli import main
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.measuring import stats
from luthier.measuring.checks import Metric, Score
from luthier.measuring.items import Item, Response
from luthier.measuring.rebase import Replies, Way, choose
from luthier.measuring.sources import Prepared
from luthier.plan.schema import AuditSpec
from luthier.verbs import load, rebase
from tests.rooms.test_verify import made, saved
from tests.tiny import tiny_ids

SPEC = AuditSpec(resamples=200)  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The old base, and the new one: the same under a little noise."""
    folder = tmp_path_factory.mktemp("bases")
    return saved(folder / "old"), saved(folder / "new", seed=5)


@pytest.fixture(scope="module")
def delta(bases: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(bases[0], rank=4).save(tmp_path_factory.mktemp("delta") / "delta")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    for name, letters in (("target", "abcdef"), ("guard", "uvwxyz")):
        rows = [{"prompt": f"{letters[i % 6]}{i}=", "completion": letters[(i + 1) % 6] * 4} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def check(name: str) -> dict[str, Any]:
        return {"name": name, "source": {"path": str(folder / f"{name}.jsonl")}, "metric": "loss"}

    return {
        "data": {"train": {"path": str(folder / "target.jsonl")}, "max_length": 64},
        "delta": [{"form": "lora", "rank": 4}],
        "train": {"batch_size": 8, "lr": 3e-2, "precision": "fp32"},
        "audit": {"target": [check("target")], "guards": [check("guard")], "drift_tokens": 0, "resamples": 200},
        "gate": {"tolerance": 2.0},
        "rebase": {"factors": [0.5], "lines": [0.25], "steps": 4},
    }


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- other scales


def test_one_factor_scales_every_change(delta: Path, bases: tuple[Path, Path]) -> None:
    own = Delta.load(delta)
    for (name, a), (other, b) in zip(own.tensors(), rescaled(own, lambda _: -0.25).tensors(), strict=True):
        assert name == other and torch.equal(-0.25 * a, b)


def test_by_depth_rises_from_the_first_layer_to_the_last(bases: tuple[Path, Path]) -> None:
    own = made(bases[0], rank=2)
    scaled = rescaled(own, by_depth(0.25, 2))
    want = {0: 0.25, 1: 1.0}
    assert len(scaled.pieces) == 2 and sum(len(p.sites) for p in scaled.pieces) == len(own.pieces[0].sites)
    before = dict(own.tensors())
    for piece in scaled.pieces:
        for site in piece.sites.values():
            assert site.layer is not None and piece.scale == want[site.layer]
    for name, change in scaled.tensors():
        layer = int(name.split("layers.")[1].split(".")[0])
        assert torch.equal(change, before[name] * want[layer])
    rule = by_depth(0.2, 5)
    site = next(iter(own.pieces[0].sites.values()))
    told = [rule(type(site)(**{**vars(site), "layer": layer})) for layer in (0, 1, 2, 3, 4, None)]
    assert told == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.2])


def test_what_cannot_be_scaled_says_so(bases: tuple[Path, Path]) -> None:
    own = made(bases[0], "prompt", length=2)
    assert rescaled(own, lambda _: 1.0).pieces[0].form == own.pieces[0].form
    with pytest.raises(LuthierError, match="cannot be scaled: a prompt"):
        rescaled(own, lambda _: 0.5)


def test_exact_differences_under_a_scale_still_attach(bases: tuple[Path, Path], tmp_path: Path) -> None:
    on = target(str(bases[0]))
    site = on.site("model.layers.0.mlp.up_proj.weight")
    base = on.tensor("model.layers.0.mlp.up_proj.weight").clone()
    from luthier.delta.artefact import Piece
    from luthier.parts.bits import encode

    change = 0.1 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    key = "model.layers.0.mlp.up_proj.weight"
    piece = Piece("full", FORMS.make("dense", {"dtype": "float32"}), {key: site}, {key: {"bits": encode(base + change, base)}}, {key: {}})  # fmt: skip
    half = rescaled(Delta([piece]), lambda _: 0.5)
    half.apply(on.model)
    assert torch.allclose(on.tensor(key), base + 0.5 * change, atol=1e-6)
    half.detach(on.model)
    assert torch.equal(on.tensor(key), base)


# -- the rule


def way(name: str, values: list[float], within: bool = True) -> tuple[Way, Replies]:
    interval = stats.bootstrap(np.array(values), resamples=200)
    scores = [[Score(v) for v in values]]
    replies = Replies([[Response(text="")] * len(values)], scores, 0.0)
    return Way(name, "", interval, interval, [], within, 0, 0.0), replies


def chosen(*ways: tuple[Way, Replies]) -> tuple[str | None, str]:
    n = len(ways[0][1].scores[0])
    check = Prepared("t", "target", Metric("exact", "answer"), [Item(str(i), "") for i in range(n)])
    at, why = choose([w for w, _ in ways], [r for _, r in ways], [check], SPEC, 0)
    return (None if at is None else ways[at][0].name), why


def test_a_dearer_way_is_shipped_only_where_it_is_shown_to_be_better() -> None:
    cheap, close = [1.0] * 30 + [0.0] * 30, [1.0] * 29 + [0.0] + [1.0] * 4 + [0.0] * 26
    far = [1.0] * 55 + [0.0] * 5
    assert chosen(way("a", cheap), way("b", close))[0] == "a"
    name, why = chosen(way("a", cheap), way("b", close))
    assert "cheaper" in why and "not shown to be worse" in why
    assert chosen(way("a", cheap), way("b", far))[0] == "b"
    assert chosen(way("a", cheap), way("b", far, within=False))[0] == "a"
    assert chosen(way("a", cheap, within=False), way("b", close, within=False))[0] is None
    assert chosen(way("a", cheap), way("b", cheap))[0] == "a"


# -- whole rebases


def test_a_rebase_ships_a_delta_that_is_proven_on_the_new_base(
    delta: Path, bases: tuple[Path, Path], plan: dict[str, Any], tmp_path: Path
) -> None:
    before = digests(delta) | digests(bases[0]) | digests(bases[1])
    done = rebase(delta, bases[1], plan, out=tmp_path / "out")
    assert digests(delta) | digests(bases[0]) | digests(bases[1]) == before
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    names = [w["name"] for w in done.report["ways"]]
    assert names == ["ported", "scaled 0.5", "lines 0.25", "tuned 4"] and done.report["not_tried"] == {}
    written = json.loads((tmp_path / "out" / "rebase.json").read_text())
    assert written["shipped"] == done.shipped and done.shipped in names
    assert f"{done.shipped} ← shipped" in (tmp_path / "out" / "rebase.md").read_text()
    header = json.loads((tmp_path / "out" / "delta.json").read_text())
    assert header["base"]["fingerprint"] == target(str(bases[1])).card()["fingerprint"]
    assert header["lineage"]["parents"] == [str(delta)]
    ids = tiny_ids()
    model = load(str(bases[1]), tmp_path / "out")  # with all its checks
    assert not torch.allclose(logits_of(model)(ids), logits_of(load(str(bases[1])))(ids))
    tuned = next(w for w in done.report["ways"] if w["name"] == "tuned 4")
    ported = next(w for w in done.report["ways"] if w["name"] == "ported")
    assert tuned["target"]["value"] > ported["target"]["value"]  # it was trained on the target
    assert done.shipped == "tuned 4"


def test_onto_its_own_base_nothing_changes(
    delta: Path, bases: tuple[Path, Path], plan: dict[str, Any], tmp_path: Path
) -> None:
    few = {**plan, "rebase": {"factors": [], "lines": [], "steps": 0}}
    done = rebase(delta, bases[0], few, out=tmp_path / "same")
    old, bare = done.report["before"]
    ported = done.report["ways"][0]
    assert done.shipped == "ported" and ported["target"] == old["target"]
    assert all(line["change"]["value"] == 0 for line in ported["guards"]) and done.report["flipped"] == []
    assert bare["over_base"]["value"] == 0
    ids = tiny_ids()
    one, other = (logits_of(load(str(bases[0]), d))(ids) for d in (delta, tmp_path / "same"))
    assert torch.equal(one, other)


def test_where_every_way_breaks_a_guard_nothing_is_shipped(
    delta: Path, bases: tuple[Path, Path], plan: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    import yaml

    strict = {**plan, "gate": {"tolerances": {"guard": -9.0}}, "rebase": {"factors": [], "lines": [0.5], "steps": 0}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(strict))
    arguments = ["rebase", delta, "--onto", bases[1], "-o", tmp_path / "none", "--plan", tmp_path / "p.yaml", "-q"]
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert left.value.code == 3
    report = json.loads((tmp_path / "none" / "rebase.json").read_text())
    assert [w["within"] for w in report["ways"]] == [False, False] and report["shipped"] is None
    assert {p.name for p in (tmp_path / "none").iterdir()} == {"rebase.json", "rebase.md"}
    assert "ship nothing" in capsys.readouterr().out


def test_what_cannot_be_tried_is_told(bases: tuple[Path, Path], plan: dict[str, Any], tmp_path: Path) -> None:
    prompt = made(bases[0], "prompt", length=2).save(tmp_path / "prompt")
    few = {**plan, "data": None, "rebase": {"factors": [0.5], "lines": [0.5], "steps": 3}}
    done = rebase(prompt, bases[1], few, out=tmp_path / "out")
    assert [w["name"] for w in done.report["ways"]] == ["ported"]
    assert "cannot be scaled" in done.report["not_tried"]["scaled 0.5"]
    assert "no data" in done.report["not_tried"]["tuned 3"]


@pytest.mark.parametrize(
    ("case", "said"),
    [("full", "not empty"), ("other", "num|layer|hidden|size|architecture|differ"), ("no plan", "holds no plan"),
     ("no target", "names no target"), ("delta", "is a delta"), ("missing", "nowhere"),
     ("two units", "words are scored by the share right, target by a loss")],
)  # fmt: skip
def test_bad_input_leaves_nothing_behind(
    case: str, said: str, delta: Path, bases: tuple[Path, Path], plan: dict[str, Any], tmp_path: Path
) -> None:
    onto, given, out = str(bases[1]), plan, tmp_path / "out"
    if case == "full":
        out.mkdir()
        (out / "mine.txt").write_text("keep")
    elif case == "other":
        onto = str(saved(tmp_path.parent / f"{tmp_path.name}-big", num_hidden_layers=3))
    elif case == "no plan":
        given = None
    elif case == "no target":
        given = {**plan, "audit": {**plan["audit"], "target": []}}
    elif case == "two units":
        own = plan["audit"]["target"]
        words = {**own[0], "name": "words", "metric": "exact"}
        given = {**plan, "audit": {**plan["audit"], "target": [*own, words]}}
    elif case == "delta":
        onto = str(delta)
    elif case == "missing":
        onto = "nowhere"
    with pytest.raises(LuthierError, match=said) as error:
        rebase(delta, onto, given, out=out)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if case == "full" else [])
    if case == "full":
        assert (out / "mine.txt").read_text() == "keep"
