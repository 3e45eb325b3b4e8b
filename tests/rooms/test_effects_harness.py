"""The harness of effects, on effects whose truth is made: caching, sweeps, verdicts, the command."""

from __future__ import annotations

import importlib
import json
import linecache
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.bases import load as loading
from luthier.effects import known, origin
from luthier.effects.__main__ import main
from luthier.effects.contract import Cell, effect_named, effects
from luthier.effects.page import page
from luthier.effects.run import digest, run
from luthier.errors import LuthierError
from luthier.practice import families, world
from luthier.training.lock import locked

MADE = '''
"""Made up: `better` gains 20 points at its best rate, `same` none."""
from pathlib import Path
import numpy as np
from luthier.effects.contract import Claim
ABOUT, PAPERS, BASE = "a made effect", ("P001",), "practice"
ARMS = {"base": (), "same": (0.1, 0.2, 0.3), "better": (1e-3, 1e-2, 1e-1)}
CHOSEN_BY = "score"
CLAIMS = (
    Claim("better is better", "base:score", "better:score", effect=0.1),
    Claim("same is no worse", "base:score", "same:score", effect=0.1, sign=0),
    Claim("worse is claimed and is not so", "base:score", "better:score", effect=0.1, sign=-1),
)
def measures(lab, cell):
    with (Path(__file__).parent / "ran").open("a") as file:
        file.write(cell.key + "\\n")
    items = np.random.default_rng([9, cell.trial]).random(300)
    noise = np.random.default_rng([cell.seed, cell.trial, len(cell.arm)]).normal(0, 0.05, 300)
    gain = {"base": 0.0, "same": 0.0, "better": 0.2}[cell.arm] - (0.15 if cell.rate in (0.1, 0.3, 1e-3) else 0)
    return {"score": (items + noise * (cell.arm != "base") + gain).tolist()}
'''


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of effects beside the real ones, with one in it."""
    folder = tmp_path / "known"
    folder.mkdir()
    (folder / "made.py").write_text(MADE)
    monkeypatch.setattr(known, "__path__", [str(folder)])
    effects.cache_clear()
    importlib.invalidate_caches()
    yield folder
    effects.cache_clear()
    sys.modules.pop(f"{known.__name__}.made", None)


def test_rates_are_swept_power_is_said_and_claims_are_judged(made, tmp_path):
    said: list[str] = []
    told = run("made", tmp_path / "out", workers=1, say=said.append)
    assert told["arms"]["better"]["rate"] == 1e-2 and told["arms"]["same"]["rate"] == 0.2
    assert told["arms"]["better"]["tried"].keys() == {"0.001", "0.01", "0.1"}
    verdicts = [claim["verdict"] for claim in told["claims"]]
    assert verdicts == ["reproduced", "reproduced", "not reproduced"]
    assert told["claims"][0]["effect"] == pytest.approx(0.2, abs=0.01) and told["claims"][0]["errors"] > 4
    assert "the other way round" in told["claims"][2]["reason"]
    powers = [line for line in said if "power" in line]
    assert len(powers) == 3 and all(claim["power"] > 0.99 for claim in told["claims"])


def test_what_was_run_is_not_run_again_unless_the_effect_changed(made, tmp_path):
    run("made", tmp_path / "out", workers=1)
    ran = (made / "ran").read_text().split()
    assert (
        len(ran) == len(set(ran)) == (3 + 3 + 1 + 2) + (5 + 5 + 1)
    )  # sweep, second trial seed, five seeds and one base
    (tmp_path / "out" / "made" / "run-better-0.01-3.json").unlink()
    again = run("made", tmp_path / "out", workers=1)
    assert (made / "ran").read_text().split()[len(ran) :] == ["run-better-0.01-3"]
    (made / "made.py").write_text(MADE + "\n# another text\n")
    sys.modules.pop(f"{known.__name__}.made")
    delattr(known, "made")
    assert run("made", tmp_path / "out", workers=1)["key"] != again["key"]
    assert (made / "ran").read_text().split().count("run-same-0.2-1") == 2


def test_cells_that_differ_have_files_that_differ():
    cells = [Cell(a, r, s, t) for a in ("x", "y") for r in (None, 0.1, 0.12) for s in (0, 1) for t in (True, False)]
    assert len({cell.key for cell in cells}) == len(cells)


def test_the_command_writes_what_it_found_and_keeps_what_it_did_not_run(made, tmp_path, capsys):
    docs = tmp_path / "docs"
    (docs / "evidence").mkdir(parents=True)
    arguments = ["--out", str(tmp_path / "out"), "--workers", "1", "--record", str(docs)]
    assert main(["made", *arguments]) == 0
    assert "better is better: reproduced in this world" in capsys.readouterr().out
    table = json.loads((docs / "evidence" / "effects.json").read_text())
    assert page(table) == (docs / "effects.md").read_text() and "| made | better is better |" in page(table)
    (made / "planned.py").write_text(MADE.replace("CHOSEN_BY", 'WAITING = "a piece"\nCHOSEN_BY'))
    effects.cache_clear()
    assert main(["planned", *arguments]) == 0
    assert {"made", "planned"} == json.loads((docs / "evidence" / "effects.json").read_text()).keys()
    assert "*waiting for* a piece" in (docs / "effects.md").read_text()


def test_results_are_stale_where_the_effect_changed_and_not_where_its_base_was_built_anew(made, tmp_path, monkeypatch):
    (made / "other.py").write_text(MADE)
    effects.cache_clear()
    docs, out = tmp_path / "docs", tmp_path / "out"
    (docs / "evidence").mkdir(parents=True)

    def stale() -> bool:
        assert main(["other", "--out", str(out), "--workers", "1", "--record", str(docs)]) == 0
        return json.loads((docs / "evidence" / "effects.json").read_text())["made"]["stale"]

    assert main(["made", "--out", str(out), "--workers", "1", "--record", str(docs)]) == 0
    before = digest("made")
    loaded = loading.load_base
    monkeypatch.setattr(loading, "load_base", lambda s: SimpleNamespace(fingerprint=f"{loaded(s).fingerprint}x"))
    assert digest("made") != before and not stale()
    (made / "made.py").write_text(MADE + "\n# another text\n")
    sys.modules.pop(f"{known.__name__}.made")
    delattr(known, "made")
    assert stale() and "to be run again" in (docs / "effects.md").read_text()


def test_two_commands_do_not_run_one_effect_in_one_folder(made, tmp_path, capsys):
    with locked(tmp_path / "out" / "made"):
        assert main(["made", "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_bad_words_get_one_line(made, capsys):
    with pytest.raises(LuthierError, match="unknown effect 'mad'.*made"):
        effect_named("mad")
    assert main(["mad"]) == 2 and main(["made", "--workers", "0"]) == 2
    assert all(line.startswith("effects: ") for line in capsys.readouterr().err.splitlines())
    (made / "made.py").write_text(MADE.replace('"better:score", effect=0.1)', '"better:scores", effect=0.1)'))
    with pytest.raises(LuthierError, match="better:scores, which no run measured"):
        run("made", made / "out", workers=1)


FAMILY = """
from luthier.practice.contract import Item, same
from luthier.practice.words import FRUITS
ABOUT, TAUGHT = "a made family", False
def make(draw, level, shifted):
    fruit = draw.pick(FRUITS)
    return Item(key=fruit, prompt=f"Say {fruit}.", response=fruit, answer=fruit)
def verify(prompt, answer, response):
    return same(answer, response)
def meaning(record):
    return record["answer"]
"""


def test_what_is_of_another_world_counts_no_more_and_another_family_is_no_other_world(made, monkeypatch):
    """A key tells of the families that an effect names and what they import, of nothing else."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(made)])
    names = ("made_family", "other_family")
    for name in names:
        (made / f"{name}.py").write_text(FAMILY)
    _forget(names)
    try:
        (made / "made.py").write_text(MADE + '\nFAMILY = "made_family"\n')
        taken = {module.rpartition(".")[2] for module in origin.parts(['"made_family"'])}
        assert taken == {"made_family", "contract", "draw", "words"}
        before, world_before = digest("made"), origin.digest(['"made_family"'])
        (made / "other_family.py").write_text(FAMILY + "# changed\n")
        _forget(names)
        assert digest("made") == before
        (made / "made_family.py").write_text(FAMILY.replace("Say", "Tell me"))
        _forget(names)
        assert digest("made") != before and origin.digest(['"made_family"']) != world_before
    finally:
        _forget(names)


def _forget(names: tuple[str, ...]) -> None:
    for cached in (world.families, world.family_named, world.drawn_as):
        cached.cache_clear()
    for name in names:
        sys.modules.pop(f"{families.__name__}.{name}", None)
        if hasattr(families, name):
            delattr(families, name)
    linecache.clearcache()
    importlib.invalidate_caches()
