"""Assemblies: several models that answer as one, exactly as the formulas say; saved, loaded, checked, drafted."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.attach import attached
from luthier.attach.assembly import Assembly, Parts, Voice
from luthier.bridge.target import target
from luthier.delta import MOVES
from luthier.errors import LuthierError
from luthier.sampling.generate import Sampling, generate
from luthier.sampling.speculative import speculate
from luthier.verbs import inspect, load, verify
from luthier.verbs.assemble import assemble, load_assembly
from luthier.verbs.audit import audit
from luthier.verbs.generate import Speaker
from tests.moves import base_at, delta_of, full_of
from tests.tiny import tiny_ids

IDS = tiny_ids(2, 10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small and large: bases of one vocabulary. lora, full, prompt: deltas of small."""
    folder = tmp_path_factory.mktemp("assembly")
    base_at(folder / "small")
    base_at(folder / "large", num_hidden_layers=3, seed=7, size=0.1)
    delta_of(folder / "small", "lora", rank=4, size=0.2).save(folder / "lora")
    full_of(folder / "small", size=0.1, seed=9).save(folder / "full")
    delta_of(folder / "small", "prompt", length=3, size=0.5).save(folder / "prompt")
    return folder


@torch.no_grad()
def logits(base: Path, delta: Path | None = None) -> torch.Tensor:
    model = load(str(base), [delta] if delta else [])
    return model(input_ids=IDS, use_cache=False).logits.float()


def plan(place: Path, *experts: str, large: str = "large", **settings: Any) -> dict[str, Any]:
    return {"large": str(place / large), "pairs": [str(place / e) for e in experts], **settings}


def fused(model: Assembly) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("expert", ["lora", "full", "prompt"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("proxy", {"alpha": 0.7}), ("emulated-fine-tuning", {"beta": 0.7}), ("dynamic-fusion", {})],
)
def test_it_answers_as_the_formula_says(place: Path, expert: str, method: str, settings: dict[str, Any]) -> None:
    made = assemble(plan(place, expert, method=method, **settings))
    L, e, b = logits(place / "large"), logits(place / "small", place / expert), logits(place / "small")
    want = MOVES.make(method, settings).fuse(L.flatten(0, 1), [(e.flatten(0, 1), b.flatten(0, 1))]).view(L.shape)
    assert torch.allclose(fused(made.model), want, atol=1e-4)
    with made.model.off():
        assert torch.allclose(fused(made.model), L.log_softmax(-1), atol=1e-6)
    assert torch.allclose(fused(made.model), want, atol=1e-4)
    assert len(made.model.voices) == 3 and len(made.model.models) == 2


@pytest.mark.parametrize("method", ["proxy", "emulated-fine-tuning"])
@pytest.mark.parametrize("expert", ["lora", "full", "prompt"])
def test_a_large_model_equal_to_the_small_base_gives_the_tuned_one(place: Path, method: str, expert: str) -> None:
    made = assemble(plan(place, expert, large="small", method=method))
    assert torch.allclose(fused(made.model), logits(place / "small", place / expert).log_softmax(-1), atol=1e-5)
    assert len(made.model.voices) == 2 and len(made.model.models) == 1


@pytest.mark.parametrize(("method", "zero"), [("proxy", {"alpha": 0.0}), ("emulated-fine-tuning", {"beta": 0.0})])
def test_zero_gives_the_large_model(place: Path, method: str, zero: dict[str, Any]) -> None:
    made = assemble(plan(place, "lora", method=method, **zero))
    assert torch.equal(fused(made.model), logits(place / "large").log_softmax(-1).log_softmax(-1)) or torch.allclose(
        fused(made.model), logits(place / "large").log_softmax(-1), atol=1e-6
    )


def test_one_base_in_memory_for_all_that_stand_on_it(place: Path) -> None:
    """Two experts, one of them moving every weight, over one small base: held once, none sees the other."""
    made = assemble(plan(place, "lora", "full", "prompt", large="small", method="proxy"))
    assert len(made.model.models) == 1 and len(made.model.voices) == 4
    b = logits(place / "small")
    want = b + sum(logits(place / "small", place / e) - b for e in ("lora", "full", "prompt"))
    for _ in range(2):
        assert torch.allclose(fused(made.model), want.log_softmax(-1), atol=1e-4)
    with made.model.off():
        assert torch.allclose(fused(made.model), b.log_softmax(-1), atol=1e-6)


def test_a_checkpoint_may_be_the_expert(place: Path, tmp_path: Path) -> None:
    from luthier.verbs import export

    export(place / "lora", to="hf", out=tmp_path / "tuned")
    pair = {"expert": str(tmp_path / "tuned"), "base": str(place / "small")}
    a = assemble({"large": str(place / "large"), **pair, "method": "proxy"})
    b = assemble(plan(place, "lora", method="proxy"))
    assert torch.allclose(fused(a.model), fused(b.model), atol=1e-4)
    with pytest.raises(LuthierError, match="state base"):
        assemble({"large": str(place / "large"), "expert": str(tmp_path / "tuned")})


def test_the_large_one_may_carry_deltas_itself(place: Path) -> None:
    """Scaling down: a small model steered by what tuning did to another."""
    delta = str(place / "full")
    made = assemble({"large": delta, "pairs": [{"expert": str(place / "lora"), "base": str(place / "small")}]})
    want = logits(place / "small", place / "full") + logits(place / "small", place / "lora") - logits(place / "small")
    assert torch.allclose(fused(made.model), want.log_softmax(-1), atol=1e-4)


def test_saved_loaded_verified(place: Path, tmp_path: Path) -> None:
    made = assemble(plan(place, "lora", "full", method="dynamic-fusion"), out=tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "assembly.json",
        "deltas",
        "probes.safetensors",
    ]
    model, on, wiring = load_assembly(tmp_path / "a")
    assert torch.equal(fused(model), fused(made.model))
    assert wiring.fingerprint == made.wiring.fingerprint == on.fingerprint
    report = verify(tmp_path / "a")
    assert report.ok and report.kind == "assembly", str(report)
    seen = inspect(tmp_path / "a")
    assert [m["part"] for m in seen["members"]] == ["large", "expert 1", "base 1", "expert 2", "base 2"]
    again = assemble(plan(place, "lora", "full", method="dynamic-fusion"))
    assert again.wiring.fingerprint == wiring.fingerprint
    other = assemble(plan(place, "lora", "full", method="dynamic-fusion", most=1.5))
    assert other.wiring.fingerprint != wiring.fingerprint


def test_what_is_altered_is_found(place: Path, tmp_path: Path) -> None:
    assemble(plan(place, "lora", method="proxy"), out=tmp_path / "a")

    def broken(change: Any) -> LuthierError:
        folder = tmp_path / "b"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "a", folder)
        change(folder)
        assert not verify(folder).ok
        with pytest.raises(LuthierError) as caught:
            load_assembly(folder)
        assert "\n" not in str(caught.value)
        return caught.value

    def edit(folder: Path, **entries: Any) -> None:
        path = folder / "assembly.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    assert "altered" in str(broken(lambda f: edit(f, fusion={"name": "proxy", "settings": {"alpha": 3.0}})))
    assert "missing" in str(broken(lambda f: (f / "deltas/0/delta.safetensors").unlink()))
    assert "probes" in str(broken(lambda f: (f / "probes.safetensors").write_bytes(b"x")))
    with pytest.raises(LuthierError, match="did you mean 'proxy'"):
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / "c"))
        edit(folder, fusion={"name": "prxy", "settings": {}})
        load_assembly(folder)
    with pytest.raises(LuthierError, match="not JSON"):
        (tmp_path / "c" / "assembly.json").write_text("{")
        verify(tmp_path / "c")


def test_another_base_is_found(place: Path, tmp_path: Path) -> None:
    base_at(tmp_path / "large", num_hidden_layers=3, seed=7, size=0.1)
    assemble({"large": str(tmp_path / "large"), "expert": str(place / "lora")}, out=tmp_path / "a")
    shutil.rmtree(tmp_path / "large")
    base_at(tmp_path / "large", num_hidden_layers=3, seed=8, size=0.1)
    report = verify(tmp_path / "a")
    assert [c.name for c in report.failed] == ["large: base"]
    with pytest.raises(LuthierError, match="another base"):
        load_assembly(tmp_path / "a")


def test_generation_reads_with_caches_what_full_passes_read(place: Path) -> None:
    made = assemble(plan(place, "lora", "prompt", method="proxy", alpha=0.5))
    prompts = [IDS[0, :4].tolist(), IDS[1, :7].tolist(), IDS[0, :6].tolist()]
    answers = generate(made.model, made.base.tokenizer, prompts, 8, stop=())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            assert int(made.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    few = generate(made.model, made.base.tokenizer, prompts, 8, stop=(), batch_size=1)
    assert few == answers


@pytest.mark.parametrize("width", [1, 3, 5])
def test_drafting_greedily_writes_the_same(place: Path, width: int) -> None:
    made = assemble(plan(place, "lora", "full", method="dynamic-fusion"))
    prompts = [IDS[0, :4].tolist(), IDS[1, :7].tolist()]
    plain = generate(made.model, made.base.tokenizer, prompts, 12, stop=())
    found = speculate(made.model, made.base.tokenizer, prompts, 12, width=width, stop=())
    assert found.answers == plain
    assert found.passes <= sum(map(len, plain)) and found.kept <= found.drafted
    same = assemble(plan(place, "full", large="small", method="proxy"))  # what is steered to is what drafts
    found = speculate(same.model, None, prompts, 12, width=width, stop=())
    assert found.share == 1 and found.passes == 2 * -(-12 // (width + 1))


def test_drafting_draws_from_the_same_distribution(place: Path) -> None:
    """Chi-square over all pairs of tokens that nucleus 3 leaves, against their exact probabilities."""
    made = assemble(plan(place, "full", method="proxy"))
    prompt, sampling = IDS[0, :3].tolist(), Sampling(temperature=1.5, top_k=3, seed=1)

    def following(ids: list[int]) -> dict[int, float]:
        top = (made.model(input_ids=torch.tensor([ids])).logits[0, -1] / 1.5).topk(3)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    exact = {
        (a, b): p * q for a, p in following(prompt).items() for b, q in following([*prompt, a]).items()
    }  # fmt: skip
    n = 150
    found = Counter(
        map(tuple, speculate(made.model, None, [prompt] * n, 2, width=2, stop=(), sampling=sampling).answers)
    )
    assert set(found) <= set(exact)
    statistic = sum((found[k] - n * p) ** 2 / (n * p) for k, p in exact.items())
    assert statistic < 26.1  # 8 degrees of freedom, one false alarm in a thousand seeds


def test_padded_tables_share_a_vocabulary(place: Path, tmp_path: Path) -> None:
    base_at(tmp_path / "wide", vocab_size=160, num_hidden_layers=3)
    made = assemble({"large": str(tmp_path / "wide"), "expert": str(place / "lora")})
    assert made.model.vocabulary == 128 and fused(made.model).shape[-1] == 128


def test_refusals_are_one_line(place: Path, tmp_path: Path) -> None:
    base_at(tmp_path / "bare", words=False, vocab_size=160)
    base_at(tmp_path / "else")
    path = tmp_path / "else" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"§":', 1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    one = plan(place, "lora")
    cases: list[tuple[dict[str, Any], str]] = [
        (one | {"large": str(tmp_path / "else")}, "unequal vocabularies"),
        (one | {"large": str(tmp_path / "bare")}, "tokenizer"),
        (one | {"large": str(tmp_path / "nowhere")}, "no such folder"),
        (one | {"method": "porxy"}, "did you mean 'proxy'"),
        (one | {"method": "portllm"}, "luthier port"),
        (one | {"alpah": 1}, "did you mean 'alpha'"),
        (one | {"alpha": "much"}, "alpha"),
        (one | {"method": "emulated-fine-tuning", "mix": [0.5, 0.5]}, "2 shares for 1 pairs"),
        (one | {"method": "emulated-fine-tuning", "mix": [0.5]}, "add up to 1"),
        (one | {"method": "emulated-fine-tuning", "top_p": 0}, "top_p"),
        (one | {"method": "dynamic-fusion", "most": 0}, "most"),
        (one | {"pairs": []}, "pairs"),
        ({"pairs": one["pairs"]}, "large"),
        (one | {"pairs": [{"expert": one["pairs"][0], "bsae": "x"}]}, "did you mean 'base'"),
        (one | {"pairs": [{"expert": {"deltas": ["gone"]}}]}, "no delta at gone"),
    ]
    for source, words in cases:
        with pytest.raises(LuthierError, match=words) as caught:
            assemble(source, out=tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists(), source
    with pytest.raises(LuthierError, match="not empty"):
        assemble(one, out=tmp_path / "full")
    assemble(one, out=tmp_path / "a")
    with pytest.raises(LuthierError, match="load it alone"):
        load(tmp_path / "a", [place / "lora"])
    with pytest.raises(LuthierError, match="only an assembly"):
        Speaker(str(place / "small")).answer(["a"], draft=2)
    made = assemble(one)
    with pytest.raises(LuthierError, match="stays where"):
        made.model.to(torch.float16)


def test_speaker_and_audit_take_an_assembly(place: Path, tmp_path: Path) -> None:
    assemble(plan(place, "lora", method="proxy"), out=tmp_path / "a")
    speaker = Speaker(tmp_path / "a")
    asked = ["ab", "c"]
    plain = speaker.answer(asked, max_new_tokens=6)
    assert speaker.answer(asked, max_new_tokens=6, draft=3) == plain
    assert speaker.drafting is not None and speaker.drafting.drafted > 0
    alone = Speaker(str(place / "large")).answer(asked, max_new_tokens=6)
    assert speaker.answer(asked, max_new_tokens=6, without=True) == alone
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {c}", "completion": c}) + "\n" for c in "abcdefgh"))
    check = {"source": {"path": str(rows)}, "metric": "loss"}
    spec = {"data": str(rows), "delta": "lora", "audit": {"target": [check], "guards": [check], "drift_tokens": 64}}
    found = audit(tmp_path / "a", spec, out=tmp_path / "audit").report["audit"]
    assert found["target"][0]["before"]["value"] != found["target"][0]["after"]["value"]
    assert found["drift"]["kl"]["value"] > 0
    with pytest.raises(LuthierError, match="holds no plan"):
        audit(tmp_path / "a")


def test_voices_leave_the_base_as_it_was(place: Path) -> None:
    on = target(str(place / "small"))
    before = {n: p.detach().clone() for n, p in on.model.named_parameters()}
    from luthier.attach.assembly import dress
    from luthier.delta.artefact import Delta

    deltas = [Delta.load(place / name) for name in ("lora", "full", "prompt")]
    voices = [Voice(str(n), on.model, [d]) for n, d in enumerate(deltas)]
    bare = Voice("base", on.model)
    made = Assembly(MOVES.make("proxy", {}), [bare, *voices], Parts(0, ((1, 0), (2, 0), (3, 0))))
    for _ in range(2):
        fused(made)
    dress(on.model, None)
    assert all(torch.equal(before[n], p) for n, p in on.model.named_parameters() if n in before)
    assert not any(attached(on.model).on(p) for p in attached(on.model).pieces)
    for a, b in itertools.pairwise(voices):
        dress(on.model, a)
        dress(on.model, b)
        assert attached(on.model).kept == b.pieces


def test_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from luthier.cli import main

    def run(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(w) for w in words])
        said = capsys.readouterr()
        return int(str(left.value.code)), said.out, said.err

    base_at(tmp_path / "newer", seed=4)
    code, out, err = run("port", place / "lora", "--onto", tmp_path / "newer", "--out", tmp_path / "moved", "scale=0.5")
    assert code == 0 and "bit for bit" in out, err
    code, out, _ = run(
        *("assemble", "--large", place / "large", "--expert", place / "lora", "--expert", place / "full"),
        *("--method", "emulated-fine-tuning", "--out", tmp_path / "a", "mix=[0.5, 0.5]"),
    )
    assert code == 0 and "4 voices of 2 models" in out
    code, out, err = run("generate", tmp_path / "a", "-p", "ab", "--max-new-tokens", 4, "--draft", 2)
    assert code == 0 and "of the large model" in err
    assert run("verify", tmp_path / "a")[0] == 0
    assert "emulated-fine-tuning" in run("inspect", tmp_path / "a")[1]
    for words, told in (
        (("port", place / "lora", "--onto", tmp_path / "newer"), "--out"),
        (("port", place / "lora", "--out", tmp_path / "b"), "onto"),
        (("port", place / "lora", "--onto", tmp_path / "newer", "--out", tmp_path / "b", "sclae=2"), "scale"),
        (("assemble", "--large", place / "large", "--out", tmp_path / "b"), "--expert"),
        (("assemble", "--large", place / "large", "--expert", place / "lora", "--out", tmp_path / "a"), "not empty"),
        (("generate", place / "small", "-p", "a", "--draft", 2), "only an assembly"),
    ):
        code, _, err = run(*words)
        assert code == 2 and told in err and err.strip().splitlines()[-1].startswith("error: "), (words, err)
    assert not (tmp_path / "b").exists()
