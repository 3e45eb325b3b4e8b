"""The audit on a tiny model whose delta is known: a switch that swaps weights."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.attach import Above, attached
from luthier.attach.sites import parameter_items
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.errors import LuthierError
from luthier.measuring import forward
from luthier.measuring.audit import audit
from luthier.measuring.checks import ACCURACY, LOSS, PERPLEXITY, Metric, compare
from luthier.measuring.cost import Watch, folder_bytes
from luthier.measuring.drift import drift, own_text, starts
from luthier.measuring.items import Item, Response
from luthier.measuring.norms import Change, norms
from luthier.measuring.remembered import remembered
from luthier.measuring.sources import Prepared
from luthier.parts.verdict import Verdict
from luthier.plan.schema import AuditSpec
from tests.tiny import VOCABULARY, tiny


class Swap:
    """A delta as a weight swapped in: on by default, taken off inside `off()`."""

    def __init__(self, model: Any, size: float) -> None:
        self.weight = (
            model.get_output_embeddings().weight
            if model.get_output_embeddings() is not None
            else model.classifier.weight
        )
        self.base = self.weight.detach().clone()
        g = torch.Generator().manual_seed(3)
        self.tuned = self.base + size * torch.randn(self.base.shape, generator=g)
        self.weight.data = self.tuned
        self.offs = 0

    @contextmanager
    def off(self):
        self.weight.data, self.offs = self.base, self.offs + 1
        try:
            yield
        finally:
            self.weight.data = self.tuned


class Digits:
    """A tokenizer whose tokens are their own numbers."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    padding_side = "left"

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and int(i) < 3))


def rows(count: int, seed: int = 0, kind: str = "causal") -> list[Item]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in range(count):
        ids = tuple(torch.randint(3, VOCABULARY, (4 + n % 5,), generator=g).tolist())
        weights = (0.0, *[1.0] * (len(ids) - 1)) if kind == "causal" else (1.0,) * len(ids)
        out.append(Item(str(n), f"prompt {n}", source=ids[:4], ids=ids, weights=weights, label=n % 2))
    return out


def base_of(model: Any, kind: str = "causal") -> Any:
    return SimpleNamespace(model=model, tokenizer=Digits(), kind=kind, fingerprint="abc", name="tiny")


def test_loss_equals_the_plain_one_whatever_the_batch():
    model = tiny("llama")
    items = rows(9)
    batched = forward.losses(model, "causal", items, 4)
    for item, found in zip(items, batched, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([item.ids])).logits[0]
        plain = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(item.ids[1:]))
        assert found.loss == pytest.approx(float(plain), abs=1e-5)
        assert found.tokens == len(item.ids) - 1


def test_only_weighted_tokens_count():
    model = tiny("llama")
    item = rows(1)[0]
    partial = Item("0", "", ids=item.ids, weights=(0.0, 0.0, 2.0, 1.0))
    [found] = forward.losses(model, "causal", [partial], 4)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(
            model(torch.tensor([item.ids])).logits[0][:-1], torch.tensor(item.ids[1:]), reduction="none"
        )
    assert found.loss == pytest.approx(float((2 * nll[1] + nll[2]) / 3), abs=1e-5)
    assert found.tokens == 3.0


def test_seq2seq_loss_equals_the_plain_one():
    model = tiny("t5", kind="seq2seq")
    items = rows(5, kind="seq2seq")
    for item, found in zip(items, forward.losses(model, "seq2seq", items, 5), strict=True):
        with torch.no_grad():
            plain = model(input_ids=torch.tensor([item.source]), labels=torch.tensor([item.ids])).loss
        assert found.loss == pytest.approx(float(plain), abs=1e-4)


def test_batches_hold_every_item_once_within_the_bound():
    items = rows(23)
    groups = list(forward.batches(items, 4, VOCABULARY))
    assert sorted(i for group in groups for i in group) == list(range(23))
    assert max(map(len, groups)) == 4
    assert max(map(len, forward.batches(items, 64, 1 << 25))) == 1  # a huge vocabulary: one at a time


def test_measuring_leaves_mode_and_random_state_alone():
    model = tiny("llama").train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    forward.losses(model, "causal", rows(2), 2)
    assert model.training and torch.equal(torch.rand(1), expected)


def test_loss_check_is_token_weighted_and_paired():
    items = rows(6)
    before = [Response(loss=2.0 + n, tokens=float(1 + n)) for n in range(6)]
    after = [Response(loss=1.5 + n, tokens=float(1 + n)) for n in range(6)]
    found = compare("text", "guard", LOSS, items, before, after)
    weighted = sum((2.0 + n) * (1 + n) for n in range(6)) / 21
    assert found.before.value == pytest.approx(weighted)
    assert (found.difference.low, found.difference.high) == pytest.approx((-0.5, -0.5))
    assert found.better == "lower" and found.flips is None
    folded = compare("text", "guard", PERPLEXITY, items, before, after)
    assert folded.before.value == pytest.approx(math.exp(weighted))
    assert folded.difference.value == pytest.approx(math.exp(weighted - 0.5) - math.exp(weighted))


def verify(record: dict[str, Any], response: str) -> Verdict:
    if response == "?":
        return Verdict(1.0, "cannot tell", decided=False)
    return Verdict(float(response == record["answer"]), f"expected {record['answer']}")


def answered(texts: str) -> list[Response]:
    return [Response(text=t) for t in texts]


def test_answer_check_counts_flips_and_never_passes_the_undecided():
    items = [Item(f"r{n}", "q", "a", {"answer": "a"}) for n in range(5)]
    found = compare(
        "t", "target", Metric("mine", "answer", verify=verify), items, answered("aabb?"), answered("abab?"), samples=3
    )
    assert found.flips == {"negative": 1, "positive": 1, "negative_ids": ["r1"], "positive_ids": ["r2"]}
    assert (found.before.value, found.after.value) == (0.4, 0.4)
    assert found.undecided == {"before": 1, "after": 1}
    assert [s["flip"] for s in found.samples] == ["negative", "positive", None]
    assert found.samples[0]["before"] == {"text": "a", "value": 1.0, "reason": "expected a", "decided": True}


def test_all_right_after_all_wrong_is_a_gain_with_a_width():
    items = [Item(str(n), "q", "a", {"answer": "a"}) for n in range(30)]
    found = compare(
        "t", "target", Metric("mine", "answer", verify=verify), items, answered("b" * 30), answered("a" * 30)
    )
    assert found.difference.value == 1.0 and 0.8 < found.difference.low < 1.0


def test_answers_of_which_none_changed_leave_room_for_what_so_few_cannot_show():
    items = [Item(str(n), "q", "a", {"answer": "a"}) for n in range(40)]
    texts = "a" * 25 + "b" * 15
    found = compare("t", "guard", Metric("mine", "answer", verify=verify), items, answered(texts), answered(texts))
    assert found.difference.value == 0 and 0.08 < found.difference.high == -found.difference.low < 0.1


@pytest.mark.parametrize(("reward", "told"), [(1.5, "between 0 and 1"), (math.nan, "between 0 and 1")])
def test_a_reward_out_of_bounds_is_an_error(reward, told):
    metric = Metric("mine", "answer", verify=lambda record, response: reward)
    with pytest.raises(LuthierError, match=told):
        compare("t", "target", metric, [Item("r7", "q")], answered("a"), answered("a"))


def test_errors_name_the_record_or_the_check():
    with pytest.raises(LuthierError, match="check 'empty' has no record"):
        compare("empty", "guard", LOSS, [], [], [])
    with pytest.raises(LuthierError, match="record r9 has no token"):
        compare("t", "guard", LOSS, [Item("r9", "")], [Response()], [Response()])
    with pytest.raises(LuthierError, match="record r9 is nan"):
        compare(
            "t", "guard", LOSS, [Item("r9", "")], [Response(loss=1.0, tokens=1)], [Response(loss=math.nan, tokens=1)]
        )


def test_drift_of_nothing_is_nothing_and_of_something_is_the_plain_kl():
    model = tiny("llama")
    items = rows(8)
    switch = Swap(model, 0.0)
    none = drift(model, switch, items)
    assert none is not None and none.kl.value == 0.0 and none.agreement.value == 1.0
    switch = Swap(model, 0.5)
    found = drift(model, switch, items)
    total, tokens, same = 0.0, 0, 0
    for item in items:
        with torch.no_grad():
            q = model(torch.tensor([item.ids])).logits[0, :-1].log_softmax(-1)
            with switch.off():
                p = model(torch.tensor([item.ids])).logits[0, :-1].log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    assert found is not None and found.tokens == tokens and found.sequences == 8
    assert found.kl.value == pytest.approx(total / tokens, rel=1e-4)
    assert found.agreement.value == pytest.approx(same / tokens)
    assert found.kl.low < found.kl.value < found.kl.high


def test_own_text_is_the_bases_seeded_and_of_the_asked_length():
    model = tiny("llama")
    switch = Swap(model, 1.0)
    one = own_text(model, Digits(), switch, [[1], [1, 5, 9]], 60, seed=4)
    again = own_text(model, Digits(), switch, [[1], [1, 5, 9]], 60, seed=4)
    other = own_text(model, Digits(), switch, [[1], [1, 5, 9]], 60, seed=5)
    assert [i.ids for i in one] == [i.ids for i in again] != [i.ids for i in other]
    assert 0 < sum(sum(i.weights) for i in one) <= 60
    assert all(i.weights[0] == 0 for i in one)
    with switch.off():
        untouched = own_text(model, Digits(), switch, [[1], [1, 5, 9]], 60, seed=4)
    assert [i.ids for i in untouched] == [i.ids for i in one]
    with pytest.raises(LuthierError, match="start from"):
        own_text(model, Digits(), switch, [], 10)


def test_starts_fall_back_to_the_start_token():
    assert starts(Digits(), [(4, 5)]) == [[4, 5]]
    assert starts(Digits(), []) == [[1]]
    assert starts(SimpleNamespace(bos_token_id=None, eos_token_id=2), []) == [[2]]
    assert starts(SimpleNamespace(bos_token_id=None, eos_token_id=None), []) == []


def checks(count: int = 12) -> list[Prepared]:
    items = [Item(i.id, i.prompt, "1", {"answer": "1"}, source=i.source) for i in rows(count, 2)]
    parity = Metric("mine", "answer", verify=lambda r, a: Verdict(float(sum(map(int, a.split())) % 2), "odd or even"))
    return [Prepared("odd", "target", parity, items, 3), Prepared("text", "guard", LOSS, rows(count, 1))]


def test_audit_whole(monkeypatch, tmp_path):
    model = tiny("llama")
    switch = Swap(model, 0.8)
    monkeypatch.setattr("luthier.measuring.audit.prepare_checks", lambda *_: checks())
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    spec = AuditSpec(drift_tokens=200, resamples=200, samples=2)
    said: list[str] = []
    found = audit(base_of(model), switch, spec, progress=said.append)
    table = found.to_dict()
    assert [c["name"] for c in table["target"]] == ["odd"] and [c["name"] for c in table["guards"]] == ["text"]
    assert table["guards"][0]["difference"]["value"] > 0 and table["drift"]["kl"]["value"] > 0
    assert table["verdict"]["status"] in ("got worse", "learned at a cost", "learned", "learned nothing clear")
    assert said == ["odd: base", "text: base", "odd: tuned", "text: tuned", "drift"]
    assert torch.equal(switch.weight, switch.tuned)

    again = audit(base_of(model), switch, spec).to_dict()
    assert [c["cached"] for c in again["target"] + again["guards"]] == [True, True]
    for one, two in zip(table["target"] + table["guards"], again["target"] + again["guards"], strict=True):
        assert {k: v for k, v in one.items() if k not in ("seconds", "cached")} == {
            k: v for k, v in two.items() if k not in ("seconds", "cached")
        }
    assert again["drift"] == table["drift"]
    other = base_of(model)
    other.fingerprint = "another"
    assert not any(c.cached for c in audit(other, switch, spec).target)


def test_answers_of_a_base_that_its_fingerprint_does_not_say_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("luthier.measuring.audit.prepare_checks", lambda *_: checks())
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    spec = AuditSpec(drift_tokens=0, resamples=100)
    for drawn in ("new_rows", "new_parameters", "fresh"):
        model = tiny("llama")
        base = base_of(model)
        setattr(base, drawn, ("a",))
        audit(base, Swap(model, 0.8), spec)
    model = tiny("llama")
    handle = attached(model)
    site = next(s for s in parameter_items(Roles(model), model).values() if s.role == "attn.q")
    handle.add(handle.build("parent0-lora", FORMS.make("lora", {"rank": 2}), [site]))
    audit(base_of(model), Above(handle, frozenset({"parent0-lora"})), spec)
    assert not list(tmp_path.rglob("*.json"))
    audit(base_of(model), handle, spec)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_audit_of_an_unchanged_model_claims_nothing(monkeypatch):
    model = tiny("gpt2")
    monkeypatch.setattr("luthier.measuring.audit.prepare_checks", lambda *_: checks())
    found = audit(base_of(model), Swap(model, 0.0), AuditSpec(drift_tokens=64, resamples=100), cache=False)
    table = found.to_dict()
    assert table["verdict"]["status"] == "learned nothing clear"
    assert table["guards"][0]["difference"]["value"] == 0.0
    assert table["target"][0]["flips"]["positive"] == 0 and table["drift"]["kl"]["value"] == 0.0


def test_audit_of_a_classifier(monkeypatch):
    model = tiny("bert", kind="classify")
    monkeypatch.setattr(
        "luthier.measuring.audit.prepare_checks", lambda *_: [Prepared("sides", "target", ACCURACY, rows(20))]
    )
    found = audit(base_of(model, "classify"), Swap(model, 1.0), AuditSpec(drift_tokens=64, resamples=100), cache=False)
    [check] = found.target
    assert (
        0 <= check.after.value <= 1 and check.calibration is not None and set(check.calibration) == {"before", "after"}
    )
    assert found.drift is not None and found.drift.kl.value > 0 and found.drift.tokens == 20


def test_audit_switched_off():
    assert audit(None, None, AuditSpec(enabled=False)).to_dict()["verdict"]["status"] == "not measured"  # type: ignore[arg-type]


def test_a_broken_cache_file_is_made_anew(tmp_path):
    calls = []

    def run() -> list[Response]:
        calls.append(1)
        return [Response(text="x")]

    asked = {"needs": "answer"}
    assert remembered(tmp_path, "f", asked, rows(1), run) == ([Response(text="x")], False)
    assert remembered(tmp_path, "f", asked, rows(1), run) == ([Response(text="x")], True)
    [path] = tmp_path.iterdir()
    path.write_text("{")
    assert remembered(tmp_path, "f", asked, rows(1), run) == ([Response(text="x")], False)
    assert remembered(tmp_path, "f", asked, rows(1, seed=1), run)[1] is False  # other tokens asked
    assert remembered(None, "f", asked, rows(1), run)[1] is False and len(calls) == 4


def test_norms_by_hand():
    found = norms([
        Change("a", "attn.q", 0, torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])),
        Change("b", "ffn.up", 1, torch.tensor([[0.0, 2.0]]).to_sparse()),
        Change("c", "embed", None, note="edits the input"),
    ])  # fmt: skip
    assert (found[0].norm, found[0].base_norm, found[0].relative) == (5.0, 10.0, 0.5)
    assert (found[1].norm, found[1].relative) == (2.0, None)
    assert (found[2].norm, found[2].note) == (None, "edits the input")


def test_cost_counts(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "sub" / "b").write_bytes(b"x" * 5)
    assert folder_bytes(tmp_path) == 15 and folder_bytes(tmp_path / "a") == 10
    with Watch() as watch:
        pass
    assert watch.seconds >= 0
