"""Effects that wait for their method: a plain loop of the method shows that the task can bear the effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from luthier.effects.contract import Cell
from luthier.effects.known import preferences, rewards
from luthier.effects.lab import Lab, Model
from luthier.practice.world import Record, verify
from luthier.sampling.generate import Sampling

AS_IT_COMES = Sampling(1.0)


def a_lab(arm: str, scratch: Path) -> Lab:
    return Lab("practice", Cell(arm, 1e-4, 0), scratch)


def likely(m: Model, asked: Sequence[Record], said: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Log-probability of what is said, its end included, and its number of tokens: [records] each."""
    prompts = [m._prompt(r) for r in asked]
    rows = [torch.tensor([*p, *m.tokenizer(s)["input_ids"], m.end]) for p, s in zip(prompts, said, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=m.tokenizer.pad_token_id)
    first, last = torch.tensor([len(p) for p in prompts])[:, None], torch.tensor([len(r) for r in rows])[:, None]
    at = torch.arange(1, ids.shape[1])[None]
    ours = (at >= first) & (at < last)
    states = m.model.model(input_ids=ids, attention_mask=(torch.arange(ids.shape[1])[None] < last).long())[0][:, :-1]
    told = m.model.lm_head(states[ours]).log_softmax(-1).gather(1, ids[:, 1:][ours][:, None])[:, 0]
    return torch.zeros(len(rows)).index_add(0, ours.nonzero()[:, 0], told), ours.sum(1)


def steps(m: Model, count: int, rate: float, loss: Callable[[int], Tensor]) -> None:
    """AdamW steps on ``loss(step)``."""
    optimiser = torch.optim.AdamW(m.model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(count):
        optimiser.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(m.model.parameters(), 1.0)
        optimiser.step()


def teach(m: Model, told: Sequence[Record], count: int, size: int = 16) -> None:
    """Tunes on what is told, from where it stands."""

    def loss(step: int) -> Tensor:
        part = told[step * size : (step + 1) * size]
        sums, tokens = likely(m, part, [r["messages"][-1]["content"] for r in part])
        return -sums.sum() / tokens.sum()

    steps(m, count, 1e-3, loss)


def preferred(m: Model, pairs: Sequence[dict[str, Any]], count: int, beta: float = 0.1, size: int = 32) -> Model:
    """DPO (Rafailov et al. 2023): -log sigmoid(beta · (change of log p(chosen) - change of log p(rejected)))."""
    new = Model(deepcopy(m.model), m.tokenizer)

    def loss(step: int) -> Tensor:
        part = pairs[step * size : (step + 1) * size]
        asked = [p["record"] for p in part] * 2
        said = [p[side][0]["content"] for side in ("chosen", "rejected") for p in part]
        with torch.no_grad():
            before = likely(m, asked, said)[0]
        chosen, rejected = (likely(new, asked, said)[0] - before).chunk(2)
        return -logsigmoid(beta * (chosen - rejected)).mean()

    steps(new, count, 3e-4, loss)
    return new


def rewarded(m: Model, prompts: Sequence[Record], count: int, size: int = 8, k: int = 8) -> None:
    """GRPO (Shao et al. 2024) on its own policy, where nothing is clipped: a reward less its group's mean, over the group's
    deviation. Equal answers to a record are weighed once."""

    def loss(step: int) -> Tensor:
        asked = [r for r in prompts[step * size : (step + 1) * size] for _ in range(k)]
        said = m.says(asked, 16, Sampling(1.0, seed=step))
        got = torch.tensor([verify(r, s).reward for r, s in zip(asked, said, strict=True)]).view(size, k)
        worth = ((got - got.mean(1, keepdim=True)) / (got.std(1, keepdim=True) + 1e-4)).flatten().tolist()
        each = {(r["id"], s): (r, s) for r, s in zip(asked, said, strict=True)}
        sums = dict.fromkeys(each, 0.0)
        for r, s, w in zip(asked, said, worth, strict=True):
            sums[r["id"], s] += w
        of = [key for key, w in sums.items() if w]
        if not of:  # all groups are of one mind
            return torch.zeros((), requires_grad=True)
        told, _ = likely(m, [each[key][0] for key in of], [each[key][1] for key in of])
        return -(torch.tensor([sums[key] for key in of]) * told).sum() / len(asked)

    steps(m, count, 6e-4, loss)


def errors(before: Sequence[float], after: Sequence[float]) -> float:
    """The mean difference, in standard errors over items."""
    apart = torch.tensor(after) - torch.tensor(before)
    return float(apart.mean() / (apart.std() / sqrt(len(apart))))


def test_pairs_raise_gold_or_what_a_vain_annotator_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The practice base, told of lists right and wrong, with idle words and without, then tuned on pairs: an honest
    annotator's raise gold; a vain one's raise what that one likes, more than the honest one's do, and gold falls."""
    monkeypatch.setattr(preferences, "ITEMS", 240)
    told = {arm: preferences.tasks(lab, lab.cell) for arm in preferences.ARMS for lab in [a_lab(arm, tmp_path)]}
    with a_lab("start", tmp_path).untouched() as m:
        teach(m, told["start"].told, 60)
        arms = {"start": m} | {arm: preferred(m, told[arm].pairs, 6) for arm in ("honest", "vain")}
        asked = told["start"].asked
        got = {arm: preferences.scores(asked, x.says(asked, 24, AS_IT_COMES), arm) for arm, x in arms.items()}
    assert errors(got["start"]["gold"], got["honest"]["gold"]) > 4
    assert errors(got["start"]["vain"], got["vain"]["vain"]) > 4
    assert errors(got["honest"]["vain"], got["vain"]["vain"]) > 4
    assert errors(got["honest"]["gold"], got["vain"]["gold"]) < -4


def test_rewards_raise_what_is_likely_not_what_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The practice base, told of lists of which half are wrong, then tuned on the verifier's rewards alone."""
    monkeypatch.setattr(rewards, "K", 16)
    lab = a_lab("tuned", tmp_path)
    told = rewards.tasks(lab, lab.cell)
    found = []
    with lab.untouched() as m:
        teach(m, told.told, rewards.TOLD)
        for rounds in (0, 12):
            rewarded(m, told.prompts, rounds)
            said = m.says(rewards.repeated(told.asked), 16, AS_IT_COMES)
            found.append(rewards.scores(told.asked, said))
    before, after = found
    assert 0.05 < mean(before["pass1"]) < 0.4
    assert errors(before["pass1"], before["passk"]) > 4
    assert errors(before["pass1"], after["pass1"]) > 4
    gained = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in before}
    assert errors(gained["passk"], gained["pass1"]) > 4
