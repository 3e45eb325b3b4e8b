"""One test a row of the papers table for the editing room: what any faithful implementation shows exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.delta import EDITS, MOVES, Site, Small, State
from luthier.editing.alternative_labels import AlternativeLabels, generic_logits, labelled
from luthier.editing.engine import (
    Request,
    Text,
    descend,
    key,
    mean_loss,
    moving,
    one_site,
    share_right,
    target_kl,
    target_nll,
)
from tests.editing import requests, subject, text


def changed(s: Any, out: dict[str, Tensor | Small]) -> dict[str, Tensor]:
    """Parameter -> its new value [d_out, d_in]."""
    table = {}
    for name, change in out.items():
        site = s.on.items[name]
        if isinstance(change, Small):
            state = State(site, change.p, change.fixed, lambda: torch.empty(0))
            table[name] = s.weight(site) + change.form.delta(state)["weight"]  # pyright: ignore[reportIndexIssue]
        else:
            table[name] = change
    return table


def nll(s: Any, texts: list[Text], weights: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([target_nll(s.run([t], weights).logits, [t]) for t in texts])


def teach(s: Any, texts: list[Text]) -> None:
    """Tunes every matrix of the model itself until it knows the texts."""
    w = moving(s, s.sites(["linear"]))

    def loss(step: int) -> Tensor:
        return target_nll(s.run(texts, w).logits, texts, closing=True).mean()

    descend(list(w.values()), loss, steps=120, lr=5e-3, enough=0.02)
    for name, value in w.items():
        s.model.get_parameter(name).data.copy_(value.detach())


def drift(s: Any, texts: list[Text], weights: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack([target_kl(s.run([t], weights).logits, s.run([t]).logits, [t]) for t in texts]).mean())


def test_p057_mend() -> None:
    """Learning moves the editor alone; the base is bit for bit the same until the edit is applied; the start is the
    plain gradient step; after learning, records that were not learnt on are edited and unrelated inputs hardly move."""
    s = subject("llama")
    taught, held = (
        requests(6),
        [Request(q.new, q.where, (), None, q.paraphrases, q.neighbours) for q in requests(8)[6:]],
    )
    before = {n: p.detach().clone() for n, p in s.model.named_parameters()}
    with s.working():
        method = EDITS.make("mend", {"steps": 20, "rate": 0.05, "lr": 5e-4, "edits": 3, "hidden": 16})
        learnt = method.learn(s, taught)
        start = EDITS.make("mend", {"steps": 0, "rate": 0.05, "hidden": 16}).learn(s, taught)
        assert any(not torch.equal(learnt[n], start[n]) for n in learnt), "the editor learns"
        plain = EDITS.make("mend", {"rate": 0.05}).with_learnt(start)
        w = moving(s, s.sites(["ffn.up", "ffn.down"]))
        target_nll(s.run([held[0].new], w).logits, [held[0].new], closing=True).mean().backward()
        for name, value in changed(s, plain.edit(s, held[:1])).items():
            assert torch.allclose(value, w[name].detach() - 0.05 * w[name].grad, atol=1e-5), "the start is the gradient"
        edits = [changed(s, method.with_learnt(learnt).edit(s, [q])) for q in held]
        for q, weights in zip(held, edits, strict=True):
            assert nll(s, [q.new], weights) < nll(s, [q.new]) and nll(s, list(q.paraphrases), weights) < nll(
                s, list(q.paraphrases)
            )
            assert drift(s, list(q.neighbours), weights) < 0.5 * float(nll(s, [q.new]) - nll(s, [q.new], weights))
    assert all(torch.equal(p, before[n]) for n, p in s.model.named_parameters())


def test_p057_the_raw_gradient_step_overfits() -> None:
    """At the same rate the raw gradient step does no more for the records edited than the learnt editor, and unrelated
    inputs pay for it."""
    s = subject("llama")
    held = requests(8)[6:]
    unrelated = [text(600 + n) for n in range(4)]
    with s.working():
        settings = {"rate": 0.1, "lr": 5e-3, "edits": 3, "hidden": 16}
        gain, moved = {}, {}
        for steps in (0, 20):
            method = EDITS.make("mend", settings | {"steps": steps})
            method = method.with_learnt(method.learn(s, requests(6)))
            edits = [changed(s, method.edit(s, [q])) for q in held]
            pairs = list(zip(held, edits, strict=True))
            gain[steps] = sum(float(nll(s, [q.new]) - nll(s, [q.new], w)) for q, w in pairs) / len(held)
            moved[steps] = sum(drift(s, [*q.neighbours, *unrelated], w) for q, w in pairs) / len(held)
        assert gain[0] < gain[20] and moved[0] > 1.5 * moved[20]


def test_p073_canonical_examples() -> None:
    """Only the chosen vectors differ; the loss of the examples falls, of paraphrases too; that of general text rises by no
    more than the ball; a ball of nothing keeps nothing that raises it."""
    s, asked = subject("llama"), requests(2)
    with s.working():
        settings = {"vectors": 3, "steps": 12, "ball": 0.01, "tokens": 800, "lrs": (1e-2, 3e-2)}
        out = changed(s, EDITS.make("canonical", settings).edit(s, asked))
        assert out
        columns = sum(int((w != s.weight(s.on.items[n])).any(0).sum()) for n, w in out.items())
        assert 0 < columns <= 3 * len(asked)
        new = [q.new for q in asked]
        ball = s.passages(800)[1::2]
        assert mean_loss(s, new, out) < mean_loss(s, new)
        assert (
            nll(s, [p for q in asked for p in q.paraphrases], out).mean()
            < nll(s, [p for q in asked for p in q.paraphrases]).mean()
        )
        assert mean_loss(s, ball, out) <= 1.01 * mean_loss(s, ball)
        tight = changed(s, EDITS.make("canonical", settings | {"ball": 0.0}).edit(s, asked))
        assert not tight or mean_loss(s, ball, tight) <= mean_loss(s, ball)
        # The change carried over to a larger model by its logits: none without an edit, bit for bit.
        null = changed(s, EDITS.make("canonical", settings | {"steps": 0}).edit(s, asked))
        large, fusion = subject("llama", num_hidden_layers=3), MOVES.make("emulated-fine-tuning", {})
        with large.working(), torch.no_grad():
            for weights, same in ((null, True), (out, False)):
                scores = []
                for q in asked:
                    at = range(q.new.start - 1, q.new.end - 1)
                    big, base, edited = (
                        m.run([q.new], w).logits[0, at] for m, w in ((large, None), (s, None), (s, weights))
                    )
                    both = fusion.fuse(big, [(edited, base)])
                    assert torch.equal(both, big.log_softmax(-1).log_softmax(-1)) == same
                    scores += [
                        (both - big.log_softmax(-1))[n, t] for n, t in enumerate(q.new.ids[q.new.start : q.new.end])
                    ]
                assert same or float(torch.stack(scores).mean()) > 0, "the edit is likelier for the large model too"


def test_p143_rose_lora() -> None:
    """At the end every row of A and column of B has at most its share, BA no more entries than their product; the edit
    takes, and unrelated prompts shift less than with a dense pair of the same rank, rate and steps."""
    s, asked = subject("llama"), requests(3)
    unrelated = [text(500 + n) for n in range(6)]
    with s.working():
        settings = {"rank": 4, "keep": 0.1, "steps": 60, "lr": 2e-2}
        found = EDITS.make("rose-lora", settings).edit(s, asked)
        for name, change in found.items():
            assert isinstance(change, Small)
            site: Site = s.on.items[name]
            state = State(site, change.p, change.fixed, lambda: torch.empty(0))
            a, b = change.form.pair(state)  # pyright: ignore[reportAttributeAccessIssue]
            k_in, k_out = max(1, round(0.1 * site.d_in)), max(1, round(0.1 * site.d_out))
            assert int((a != 0).sum(1).max()) <= k_in and int((b != 0).sum(0).max()) <= k_out
            product = change.form.delta(state)["weight"]  # pyright: ignore[reportIndexIssue]
            assert 0 < int((product != 0).sum()) <= 4 * k_in * k_out
        sparse = changed(s, found)
        dense = changed(s, EDITS.make("rose-lora", settings | {"keep": 1.0}).edit(s, asked))
        new = [q.new for q in asked]
        assert nll(s, new, sparse).mean() < 0.5 * nll(s, new).mean()
        assert drift(s, unrelated, sparse) < drift(s, unrelated, dense)


def test_p402_breadth_first() -> None:
    """One matrix moves and nothing else; with the same edits and at least as few steps, breadth first keeps the early
    edits that depth first forgets."""
    s, asked = subject("llama"), requests(6)
    new = [q.new for q in asked]
    with s.working():
        settings = {"layer": 1, "lr": 2e-2, "epochs": 60, "batch_size": 3}
        out = {order: EDITS.make("locft", settings | {"order": order}).edit(s, asked) for order in ("breadth", "depth")}
        site = one_site(s, "ffn.down", 1)
        assert all(list(o) == [key(site)] for o in out.values())
        breadth, depth = (nll(s, new, changed(s, out[order])) for order in ("breadth", "depth"))
        assert breadth.max() < 0.2 * nll(s, new).mean(), "all edits hold"
        assert breadth[:3].mean() < depth[:3].mean() and depth[0] > depth[-1], "depth first forgets what came first"


def test_p402_unrelated_prompts_stay() -> None:
    """A base that answers some prompts right still does after other prompts were given new answers, all of which hold."""
    s, asked = subject("llama"), requests(6)
    unrelated = [text(600 + n) for n in range(6)]
    with s.working():
        teach(s, unrelated)
        assert share_right(s, unrelated) == 1
        out = changed(s, EDITS.make("locft", {"layer": 1, "lr": 5e-3, "epochs": 60, "batch_size": 3}).edit(s, asked))
        new = [q.new for q in asked]
        assert share_right(s, new, out) == 1 and share_right(s, unrelated, out) >= 0.8
        assert drift(s, unrelated, out) < 0.2 * drift(s, new, out)


def test_p402_stops_where_enough_is_learnt() -> None:
    s, asked = subject("llama"), requests(2)
    with s.working():
        found = EDITS.make("locft", {"enough": 100.0}).edit(s, asked)
        (name, value), *_ = found.items()
        assert torch.equal(value, s.weight(s.on.items[name])), "a batch below `enough` makes no update"  # pyright: ignore


def test_p402_sweeps_places() -> None:
    s, asked = subject("llama"), requests(2)
    with s.working():
        found = EDITS.make("locft", {"sweep": True, "epochs": 20, "lr": 1e-2, "price": 0.1}).edit(s, asked)
        names = [name.removesuffix(".weight") for name in found]
        assert len(names) == 7 or len(names) == 1 and names[0].endswith(("down_proj", "up_proj"))
        short: dict[str, Any] = {"epochs": 2, "lr": 1e-2}
        whole = EDITS.make("locft", short | {"sweep": True, "roles": ["layer"]}).edit(s, asked)
        (layer,) = {s.on.items[name].layer for name in whole}
        assert set(whole) == {key(site) for site in s.sites(["linear"], [layer])} and len(whole) == 7
        stated = EDITS.make("locft", short | {"role": "layer", "layer": layer}).edit(s, asked)
        assert all(torch.equal(stated[name], value) for name, value in whole.items())  # pyright: ignore


def test_p351_antidote() -> None:
    """Exactly the share of every matrix becomes zero, the rest is bit for bit the same; of all together where that is
    asked for."""
    s, asked = subject("llama"), requests(3)
    with s.working():
        for alpha in (0.01, 0.2):
            out = EDITS.make("antidote", {"alpha": alpha}).edit(s, asked)
            assert len(out) == 14
            for name, value in out.items():
                was = s.weight(s.on.items[name])
                assert isinstance(value, Tensor) and int((value == 0).sum()) == round(alpha * was.numel())
                assert torch.equal(value[value != 0], was[value != 0])
        site = one_site(s, "ffn.down", 1)
        x = torch.cat([s.run([q.new], keep=[site.name]).inputs[site.name][0] for q in asked])
        score = s.weight(site).abs() * x.square().sum(0).sqrt()
        cut = EDITS.make("antidote", {"alpha": 0.03, "roles": ["ffn.down"], "layers": [1]}).edit(s, asked)[key(site)]
        assert torch.equal(cut == 0, score >= score.flatten().topk(round(0.03 * score.numel())).values[-1]), "by hand"
        whole = EDITS.make("antidote", {"alpha": 0.05, "within": "whole"}).edit(s, asked)
        total = sum(v.numel() for v in whole.values() if isinstance(v, Tensor))
        assert sum(int((v == 0).sum()) for v in whole.values() if isinstance(v, Tensor)) == round(0.05 * total)
    # Tuned hard on harmful answers, in words of their own, and on benign ones; then cut.
    s = subject("llama")

    def words(seed: int, first: int, last: int) -> Text:
        ids = torch.randint(first, last, (10,), generator=torch.Generator().manual_seed(seed))
        return Text(tuple(ids.tolist()), 8)

    harmful, benign = [words(700 + n, 64, 128) for n in range(6)], [words(800 + n, 3, 64) for n in range(6)]
    with s.working():
        teach(s, [*harmful, *benign])
        assert share_right(s, harmful) == share_right(s, benign) == 1
        settings = {"alpha": 0.02, "roles": ["ffn.down", "ffn.up"]}
        after = changed(s, EDITS.make("antidote", settings).edit(s, [Request(t) for t in harmful]))
        assert share_right(s, harmful, after) < 1 == share_right(s, benign, after)
        assert nll(s, harmful, after).mean() > 1.5 * nll(s, benign, after).mean()


def test_p351_heals_a_poisoned_tune() -> None:
    """A model tuned hard on harmful answers and benign ones gives the harmful ones less after the cut, and the benign
    ones lose less."""
    s = subject("llama")
    harmful, benign = [text(700 + n) for n in range(4)], [text(800 + n) for n in range(4)]
    with s.working():
        teach(s, [*harmful, *benign])
        hurt, kept = nll(s, harmful), nll(s, benign)
        assert hurt.mean() < 0.2
        cut = EDITS.make("antidote", {"alpha": 0.02, "roles": ["ffn.down"], "layers": [1]}).edit(
            s, [Request(t) for t in harmful]
        )
        after = changed(s, cut)
        assert nll(s, harmful, after).mean() > hurt.mean()
        assert nll(s, harmful, after).mean() - hurt.mean() > nll(s, benign, after).mean() - kept.mean()


def test_p360_alternative_labels() -> None:
    """alpha 0 without anchors: the labels are the base's own predictions. Where the reinforced model does not raise a
    token, the base's logit stays. The text's probability collapses, unrelated loss changes little."""
    s = subject("llama")
    secret = [text(900 + n, 6, 6) for n in range(3)]
    with s.working():
        plain = AlternativeLabels(alpha=0.0)
        places, labels = labelled(plain, s, Request(secret[0]), moving(s, s.sites(["linear"])))
        logits = s.run([secret[0]]).logits[0]
        assert places.tolist() == list(range(secret[0].start - 1, len(secret[0].ids) - 1))
        assert torch.equal(labels, logits[places].argmax(-1))
        base, raised = logits[:3], logits[:3] + torch.randn(3, logits.shape[1])
        generic = generic_logits(base, raised, 5.0)
        assert torch.equal(generic[raised <= base], base[raised <= base]) and bool(
            (generic[raised > base] < base[raised > base]).all()
        )
        # The base must know the text before it can lose it.
        teach(s, secret)
        general = s.passages(400)
        before, was = nll(s, secret), mean_loss(s, general)
        assert float((-before).exp().mean()) > 0.8
        method = EDITS.make(
            "alternative-labels", {"steps": 40, "reinforce_steps": 20, "lr": 3e-3, "reinforce_lr": 3e-3}
        )
        out = changed(s, method.edit(s, [Request(t) for t in secret]))
        assert float((-nll(s, secret, out)).exp().mean()) < 0.2
        assert abs(mean_loss(s, general, out) - was) < 0.1 * was


def test_p360_what_is_known_for_certain_is_relabelled() -> None:
    """A base that is sure of several texts: every one has a label that is not its own token, and learns it."""
    s = subject("llama")
    secret = [text(920 + n, 6, 4) for n in range(5)]
    with s.working():
        teach(s, secret)
        assert nll(s, secret).max() < 0.1
        sites = s.sites(["linear"])
        raised = moving(s, sites)
        descend(
            [*raised.values()], lambda _: target_nll(s.run(secret, raised).logits, secret).mean(), steps=30, lr=1e-3
        )
        for t in secret:
            places, labels = labelled(AlternativeLabels(), s, Request(t), raised)
            assert labels.tolist() != [t.ids[n + 1] for n in places.tolist()]
        method = EDITS.make("alternative-labels", {"reinforce_steps": 30, "reinforce_lr": 1e-3, "lr": 3e-3})
        out = changed(s, method.edit(s, [Request(t) for t in secret]))
        assert share_right(s, secret, out) == 0


def test_p360_reads_the_generic_text() -> None:
    """With a generic text of its own, a label is the base's prediction there, and tokens without counterpart have none."""
    s = subject("llama")
    own, other = text(950, 5, 4), text(951, 6, 4)
    q = Request(own, generic=other, aligned=(-1, -1, -1, -1, -1, 6, -1, 8, 9))
    with s.working():
        places, labels = labelled(AlternativeLabels(alpha=0.0), s, q, moving(s, s.sites(["linear"])))
        assert places.tolist() == [4, 6, 7]
        assert torch.equal(labels, s.run([other]).logits[0][[5, 7, 8]].argmax(-1))
