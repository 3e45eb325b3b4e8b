"""Every effect of ``luthier/effects/known`` runs in small on a tiny base: its claims find finite scores that pair."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from luthier.bases import locate
from luthier.effects.contract import Cell, effect_named, effects, waiting
from luthier.effects.lab import Lab
from luthier.papers.table import papers
from luthier.practice import card
from tests.tiny import tiny

SMALL = {
    **{"STEPS": 4, "BATCH": 4, "ITEMS": 6, "KEPT": 2, "RECORDS": 16, "PEOPLE": 2, "TIMES": 2, "POOL": 40, "TRUSTED": 8},
    **{
        "CHOICE": 2,
        "PAIRS": 6,
        "PASSES": 2,
        "AGAIN": 1,
        "TOLD_AGAIN": 2,
        "UNLEARN": {"steps": 2, "reinforce_steps": 2},
    },
}
"""What the effects' constants of these names are here; one that an effect's run is long by has one of these names."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the practice tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = AutoTokenizer.from_pretrained(card.ASSET)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512, **ids).save_pretrained(folder)
    for path in card.ASSET.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def small(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every practice base is the tiny one, every answer short, and every effect small."""
    monkeypatch.setattr(locate, "practice_folder", lambda name: base)
    monkeypatch.setattr(card, "LONGEST", 4)
    for name in effects():
        for constant, value in SMALL.items():
            if hasattr(effect_named(name), constant):
                monkeypatch.setattr(effect_named(name), constant, value)


def scored(effect: Any, cell: Cell, scratch: Path) -> dict[str, list[float]]:
    return effect.measures(Lab(effect.BASE, cell, scratch), cell)


@pytest.mark.parametrize("name", [name for name in effects() if not waiting(effect_named(name))])
def test_claims_find_finite_scores_that_pair(name: str, small: None, tmp_path: Path) -> None:
    effect: Any = effect_named(name)
    rates = {arm: rates[0] if rates else None for arm, rates in effect.ARMS.items()}
    found = {arm: scored(effect, Cell(arm, rate, 1), tmp_path / arm) for arm, rate in rates.items()}
    sides = {f"{arm}:{measure}": scores for arm, told in found.items() for measure, scores in told.items()}
    assert all(math.isfinite(score) for scores in sides.values() for score in scores)
    for claim in effect.CLAIMS:
        assert len(sides[claim.baseline]) == len(sides[claim.method]) > 1, claim.says
    assert len({len(told[effect.CHOSEN_BY]) for told in found.values()}) == 1
    arm, rate = next(iter(rates.items()))
    tried = scored(effect, Cell(arm, rate, 1, trial=True), tmp_path / "trial")
    assert {k: len(v) for k, v in tried.items()} == {k: len(v) for k, v in found[arm].items()}


@pytest.mark.parametrize("name", effects())
def test_what_an_effect_states_can_be_run(name: str) -> None:
    effect: Any = effect_named(name)
    assert set(effect.PAPERS) <= {row.id for row in papers()}, "rows of the papers table"
    tuned = {arm: rates for arm, rates in effect.ARMS.items() if rates}
    assert len({len(set(rates)) for rates in tuned.values()}) <= 1, "every arm has as many rates as the others"
    for claim in effect.CLAIMS:
        arms = {side.partition(":")[0] for side in (claim.baseline, claim.method)}
        assert arms <= set(effect.ARMS) and claim.baseline != claim.method, claim.says
