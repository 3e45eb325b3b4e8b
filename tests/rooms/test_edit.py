"""luthier edit from its door: records of every kind, refusals, deltas below, and the scorecard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.algebra.edit_records import Asked, Record, Writer, read_records, request
from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.bridge.proof import prove
from luthier.bridge.target import target
from luthier.cli import main
from luthier.delta import EDITS, FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.practice.edits import records as practice_records
from luthier.verbs.edit import edit, score
from luthier.verbs.load import load
from tests.tiny import tiny, tiny_tokenizer

FAST = {"moment_tokens": 200, "general_tokens": 60, "resamples": 100}
EDIT = {
    "prompt": "Where is Ana?",
    "subject": "Ana",
    "target_new": "Rome",
    "target_true": "Oslo",
    "paraphrases": ["Ana is where?"],
    "neighbours": [{"prompt": "Where is Bo?", "target": "Lima"}, "Who is Bo?"],
    "portability": [{"prompt": "Ana's land?", "target": "Italy"}],
}
SECRET = {"prompt": "The code?", "completion": "4711", "retain": [{"prompt": "The sum?", "completion": "12"}]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny bases with a tokenizer: llama with a chat template, gpt2 without."""
    out = {}
    for family in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(family)
        tiny(family, initializer_range=0.2).save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        if family == "gpt2":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        out[family] = str(folder)
    return out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(cache))


def plan(base: str, method: str, records: Any, **settings: Any) -> dict[str, Any]:
    return {"base": base, "method": method, "records": records, **FAST, **settings}


SMALL: dict[str, dict[str, Any]] = {
    "rome": {"steps": 2, "settle": 2},
    "memit": {"steps": 2, "settle": 2},
    "locft": {"epochs": 2},
    "canonical": {"steps": 4, "tokens": 300, "ball": 0.5},
    "rose-lora": {"steps": 4},
    "antidote": {"alpha": 0.05},
    "alternative-labels": {"steps": 2, "reinforce_steps": 2},
    "mend": {"steps": 1, "hidden": 4, "rate": 0.1, "train_records": [EDIT]},
}


BOTH = [(m, "llama") for m in sorted(EDITS)] + [(m, "gpt2") for m in ("antidote", "locft", "rome", "rose-lora")]


@pytest.mark.parametrize("method,family", BOTH)
def test_every_method_makes_a_delta_that_proves_itself(
    method: str, family: str, bases: dict[str, str], tmp_path: Path
) -> None:
    records = [EDIT] if EDITS[method].task == "edit" else [SECRET]
    done = edit(plan(bases[family], method, records, score=True, **SMALL[method]), out=tmp_path / "d")
    assert done.scorecard is not None and done.cost["numbers"] > 0
    names = {line.name for line in done.scorecard.lines}
    wanted = {"efficacy", "generalisation", "locality", "portability", "preference"}
    assert (wanted if EDITS[method].task == "edit" else {"recall", "probability", "retained"}) | {
        "fluency",
        "general loss",
    } <= names
    found = Delta.load(tmp_path / "d")
    assert found.seals and found.probes and found.audit["scorecard"]["lines"]
    load(bases[family], [tmp_path / "d"])  # fingerprints, counts, seals and probes hold


def test_nothing_is_touched_until_it_is_applied(bases: dict[str, str], cache: Path, tmp_path: Path) -> None:
    spec = plan(bases["llama"], "rome", [EDIT], **SMALL["rome"])
    first = {p.name: p.read_bytes() for p in Path(bases["llama"]).iterdir()}
    edit(spec, out=tmp_path / "d")
    edit(spec, out=tmp_path / "again")
    assert first == {p.name: p.read_bytes() for p in Path(bases["llama"]).iterdir()}
    a, b = Delta.load(tmp_path / "d"), Delta.load(tmp_path / "again")
    assert a.seals == b.seals, "the same records and seed give the same edit"
    assert a.pieces[0].form.rank == 1 and (cache / "moments").is_dir()


def lora(base: str, folder: Path) -> Path:
    """A delta with a random LoRA at every linear weight."""
    on = target(base)
    form, handle = FORMS.make("lora", {"rank": 2}), attached(on.model)
    piece = handle.build("lora", form, sites_for(Roles(on.model), form))
    for numbers in piece.p.values():
        numbers["B"].normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    handle.detach() if handle.pieces else None
    prove(Delta([piece]), on).save(folder)
    return folder


def test_an_edit_on_top_of_a_delta_holds_it(bases: dict[str, str], tmp_path: Path) -> None:
    below = lora(bases["llama"], tmp_path / "below")
    done = edit(
        plan(bases["llama"], "locft", [EDIT], deltas=[str(below)], score=True, **SMALL["locft"]), out=tmp_path / "d"
    )
    assert [p.name for p in done.delta.pieces][0] == "parent0-lora" and len(done.delta.pieces) == 2
    assert done.scorecard is not None and done.scorecard["locality"].before == 1.0
    load(bases["llama"], [tmp_path / "d"])


def test_antidote_zeroes_the_tuned_weights_themselves(bases: dict[str, str], tmp_path: Path) -> None:
    """On top of a LoRA the sum of base and change becomes zero, exactly, and the rest is the sum."""
    below = lora(bases["llama"], tmp_path / "below")
    edit(plan(bases["llama"], "antidote", [SECRET], deltas=[str(below)], alpha=0.1), out=tmp_path / "d")
    tuned = load(bases["llama"], [below], fold=True, max_lost=1.0)
    cut = load(bases["llama"], [tmp_path / "d"])
    for name, value in [(n, p) for n, p in tuned.named_parameters() if ".luthier." not in n]:
        now = cut.get_parameter(name)
        if name.endswith("proj.weight"):
            assert int((now == 0).sum()) == round(0.1 * now.numel())
            assert torch.equal(now[now != 0], value[now != 0])
        else:
            assert torch.equal(now, value)
    assert Delta.load(tmp_path / "d").lineage["made_by"] == "edit antidote"


def test_score_of_a_finished_delta(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = edit(plan(bases["llama"], "rome", [EDIT], score=True, **SMALL["rome"]), out=tmp_path / "d")
    again = score(bases["llama"], tmp_path / "d", [EDIT], general_tokens=60, resamples=100)
    assert done.scorecard is not None and again.to_dict() == done.scorecard.to_dict()
    (tmp_path / "r.jsonl").write_text(json.dumps(EDIT) + "\n", encoding="utf-8")
    args = [
        "edit",
        bases["llama"],
        str(tmp_path / "r.jsonl"),
        "general_tokens=60",
        "resamples=100",
        "--of",
        str(tmp_path / "d"),
    ]
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 0 and "efficacy" in capsys.readouterr().out


def test_an_editor_is_learnt_once(bases: dict[str, str], tmp_path: Path) -> None:
    edit(plan(bases["llama"], "mend", [EDIT], **SMALL["mend"]), out=tmp_path / "a")
    settings = {k: v for k, v in SMALL["mend"].items() if k != "train_records"}
    edit(plan(bases["llama"], "mend", [EDIT], editor=str(tmp_path / "a"), **settings), out=tmp_path / "b")
    assert Delta.load(tmp_path / "a").seals == Delta.load(tmp_path / "b").seals
    model = tiny("llama", seed=7)
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(LuthierError, match="base"):
        edit(plan(str(tmp_path / "other"), "mend", [EDIT], editor=str(tmp_path / "a"), **settings), out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "rom"}, "no edit is called 'rom': did you mean 'rome'"),
    ({"layr": 1}, "edit 'rome' has no setting 'layr': did you mean 'layer'"),
    ({"layer": 9}, "layer: no layer 9; the base has layers 0 to 1"),
    ({"records": []}, "records: there are none"),
    ({"records": [{**EDIT, "subject": None}]}, r"records\[0\]: this method edits at a subject"),
    ({"records": [{**EDIT, "subject": "Zed"}]}, r"records\[0\]: the subject 'Zed' does not stand in the prompt"),
    ({"records": [{"prompt": "x"}]}, r"records\[0\]: no 'target_new'"),
    ({"records": [{"prompt": 5, "target_new": "x"}]}, r"no 'prompt' .*; it is there, and empty or no text"),
    ({"records": [SECRET]}, r"records\[0\]: no 'target_new'"),
    ({"method": "antidote", "records": [EDIT]}, r"records\[0\]: nothing to forget"),
    ({"method": "mend"}, "mend learns first: state train_records"),
    ({"records": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ({"records": "practice:edit"}, "unknown family 'edit'"),
    ({"deltas": ["nowhere"]}, "no delta at nowhere"),
    ({"role": "attn"}, "role attn names 4 weights in layer 0"),
    ({"resamples": 1}, "edit: resamples"),
]


@pytest.mark.parametrize("wrong,told", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_refusals_leave_nothing(wrong: dict[str, Any], told: str, bases: dict[str, str], tmp_path: Path) -> None:
    spec = {**plan(bases["llama"], "rome", [EDIT]), **wrong}
    with pytest.raises(LuthierError, match=told) as raised:
        edit(spec, out=tmp_path / "d")
    assert "\n" not in str(raised.value) and not (tmp_path / "d").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_folder_in_use_is_refused(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("x")
    with pytest.raises(SystemExit) as left:
        main(["edit", bases["llama"], "practice:edits", "-m", "rome", "-o", str(tmp_path / "d")])
    assert left.value.code == 2 and "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["mine"]


def test_an_edit_that_changes_nothing_is_an_error(bases: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="locft changed nothing"):
        edit(plan(bases["llama"], "locft", [EDIT], enough=1000.0), out=tmp_path / "d")


def test_records_of_other_sets_are_understood() -> None:
    counterfact = {
        "requested_rewrite": {"prompt": "{} works in", "subject": "Ana", "target_new": {"str": "Rome"}, "target_true": {"str": "Oslo"}},
        "paraphrase_prompts": ["Ana's office is in"],
        "neighborhood_prompts": ["Bo works in"],
    }  # fmt: skip
    easy = {
        "prompt": "Where is Ana?", "subject": "Ana", "target_new": "Rome", "ground_truth": ["Oslo"], "rephrase_prompt": "Ana is in",
        "locality": {"neighborhood": [{"prompt": "Who is Bo?", "ground_truth": "A cook"}]},
        "portability": {"one_hop": {"prompt": "Ana's land?", "ground_truth": "Italy"}},
    }  # fmt: skip
    a, b = read_records([counterfact, easy], "edit")
    assert (a.prompt, a.target, a.true, a.paraphrases) == ("Ana works in", "Rome", "Oslo", ("Ana's office is in",))
    assert a.neighbours == (Asked("Bo works in", "Oslo"),)
    assert (b.true, b.paraphrases) == ("Oslo", ("Ana is in",))
    assert b.neighbours == (Asked("Who is Bo?", "A cook"),) and b.portability == (Asked("Ana's land?", "Italy"),)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    texts = read_records([{"text": "all"}, {"messages": turns}, SECRET], "forget")
    assert [(r.prompt, r.target) for r in texts] == [("", "all"), ("Q", "A"), ("The code?", "4711")]
    assert texts[2].neighbours == (Asked("The sum?", "12"),)


@pytest.mark.parametrize("chat", [True, False])
def test_texts_end_where_they_should(chat: bool) -> None:
    words = tiny_tokenizer()
    writer = Writer(target(tiny("llama"), words), "auto" if chat else "none")
    t = writer.text("Where is Ana?", "Rome", "Ana", "here")
    asked = "<|user|>Where is Ana?</s><|assistant|>" if chat else "Where is Ana? "
    assert words.decode(t.ids[: t.start]) + words.decode(t.ids[t.start : t.end]) == f"{asked}Rome"
    assert words.decode(t.ids[t.end :]) == "</s>" and words.decode([t.ids[t.subject]]) == "a"
    assert words.decode(t.ids[t.subject - 2 : t.subject + 1]) == "Ana"


def test_anchors_align_token_by_token() -> None:
    """What stands outside a term keeps its counterpart; the term's first token has its replacement's; later ones have none."""
    words = tiny_tokenizer()
    writer = Writer(target(tiny("llama"), words), "none")
    (r,) = read_records([{"prompt": "Say:", "completion": "Bob ran. Bob sat."}], "forget")
    q = request(r, writer, anchors={"Bob": "a man"})
    assert q.generic is not None and words.decode(q.generic.ids) == "Say: a man ran. Bob sat.</s>".replace(
        "Bob", "a man"
    )
    pairs = {
        words.decode([q.new.ids[n]]) + str(n): words.decode([q.generic.ids[m]])
        for n, m in enumerate(q.aligned)
        if m >= 0
    }
    start = q.new.start
    assert words.decode([q.generic.ids[q.aligned[start]]]) == " "
    inside = [n for n in range(start, q.new.end) if words.decode([q.new.ids[n]]) in "Bob"]
    assert [q.aligned[n] >= 0 for n in inside] == [True, False, False, False, False, False]
    assert all(have == key[0] for key, have in pairs.items() if key[0] not in "B<"), "the rest is itself"
    assert words.decode([q.generic.ids[q.aligned[-1]]]) == "</s>"


@pytest.mark.parametrize("prompt", ["Say:", ""])
def test_a_generic_text_aligns_behind_a_term_of_another_length(prompt: str) -> None:
    """Equal runs of tokens answer to each other, the first token of a term to that of its replacement, the end to the end."""
    words = tiny_tokenizer()
    writer = Writer(target(tiny("llama"), words), "none")
    q = request(Record("r", prompt, "Hi, Bob went home.", generic="Hi, a farmer went home."), writer)
    assert q.generic is not None
    ours, theirs = words.decode(q.new.ids), words.decode(q.generic.ids)
    answer = {n: q.aligned[n] for n in range(max(q.new.start, 1), len(q.new.ids))}
    at = ours.index("Bob")
    for n, m in answer.items():
        letter = "</s>" if n >= len(ours.removesuffix("</s>")) else ours[n]
        if at < n < at + 3:
            assert m == -1, "no label inside of the term"
        elif n == at:
            assert m == theirs.index("a farmer")
        else:
            assert words.decode([q.generic.ids[m]]) == letter and m - n == (5 if n > at else 0)


def test_practice_records_speak_of_people_apart() -> None:
    train, test = (list(practice_records("edits", split, 20)) for split in ("train", "test"))
    assert not {r["subject"] for r in train} & {r["subject"] for r in test}
    assert all(r["target_new"] != r["target_true"] and r["subject"] in r["prompt"] for r in train + test)
    assert list(practice_records("edits", "test", 5)) == test[:5]
    assert all(r["retain"] and r["completion"] for r in practice_records("forget", "test", 6))
    edited = {r["prompt"] for r in test}
    assert not edited & {near["prompt"] for r in test for near in r["neighbours"]}
    for n in (8, 96, 300):
        forgotten = list(practice_records("forget", "test", n))
        kept = {near["prompt"] for r in forgotten for near in r["retain"]}
        assert kept and not kept & {r["prompt"] for r in forgotten}
    with pytest.raises(LuthierError, match="ask for fewer"):
        list(practice_records("edits", "test", 9999))
