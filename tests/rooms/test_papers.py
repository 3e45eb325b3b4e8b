"""The papers table: complete, and nothing in it claims what is not there."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from luthier.errors import LuthierError
from luthier.papers import STATUSES, Paper, as_json, check, paper, papers
from luthier.papers.claims import recipe_papers
from luthier.plan import Plan
from luthier.plan.stages import load_stages

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "luthier" / "recipes").glob("*.yaml"))
HERE = "tests/rooms/test_papers.py"


def test_every_row_is_there():
    rows = papers()
    assert [p.id for p in rows] == [f"P{n:03d}" for n in range(1, 490)]
    assert len({p.title for p in rows}) == 489
    facts = "\n".join("|".join((p.id, p.title, p.room, p.kind, p.fits)) for p in rows)
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == "5d20fba2ad6b1a4a", "the papers' facts do not change"


def test_statuses_and_reasons():
    rows = papers()
    assert {p.status for p in rows} <= set(STATUSES)
    assert {p.id for p in rows if p.status == "other modality"} == {p.id for p in rows if p.fits == "out"}
    for p in rows:
        is_method = p.kind in ("method", "system") or p.status == "other modality"
        assert (p.becomes is None) == is_method, f"{p.id} is a {p.kind} and becomes {p.becomes}"


@pytest.mark.parametrize("status", STATUSES)
def test_every_claim_is_true(status):
    assert [problem for p in papers() if p.status == status for problem in check(p)] == []


def test_evidence_is_collected_by_pytest():
    """Also the parameters in brackets, which reading the file cannot see."""
    claimed = sorted({p.evidence for p in papers() if p.evidence})
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    good = subprocess.run(
        [*collect, f"{HERE}::test_every_row_is_there", *claimed], cwd=ROOT, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stdout + good.stderr
    bad = subprocess.run([*collect, f"{HERE}::test_not_there"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode != 0


CLAIM = Paper(
    "P110", "t", "deltas", "method", "core", "works", ("papers.table.paper",), "lora.yaml", f"{HERE}::test_one_row"
)


def claim(**changes: object) -> list[str]:
    return check(Paper(**{**vars(CLAIM), **changes}))


@pytest.mark.parametrize("name", ["papers", "papers.paper", "papers.Paper.names", "errors.nearest", "plan.schema.Plan"])
def test_a_true_claim_is_accepted(name):
    assert claim(names=(name,)) == []


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"status": "done"}, "is none of works"),
        ({"names": ()}, "states names, recipe and evidence"),
        ({"recipe": None}, "states names, recipe and evidence"),
        ({"evidence": None}, "states names, recipe and evidence"),
        ({"status": "partly"}, "what is missing"),
        ({"status": "not yet"}, "claims names"),
        ({"status": "other modality", "names": (), "recipe": None, "evidence": None}, "bound to"),
        ({"becomes": "code"}, "none of recipe"),
        ({"names": ("forms.no_such_form",)}, "no form is entered as 'no_such_form'"),
        ({"names": ("papers.table.no_such",)}, "has no 'no_such'"),
        ({"names": ("no_such_room.x",)}, "does not exist"),
        ({"names": ("papers.table.papers.x.y",)}, "has no 'x'"),
        ({"recipe": "no-such.yaml"}, "does not exist"),
        ({"id": "P001"}, "does not name P001"),
        ({"evidence": f"{HERE}::test_no_such"}, "defines no"),
        ({"evidence": "tests/no_such.py::test_x"}, "no file"),
        ({"evidence": HERE}, "not of the form"),
        ({"evidence": "luthier/papers/table.py::paper"}, "not of the form"),
        ({"evidence": f"{HERE}::claim"}, "is no test"),
    ],
)
def test_a_false_claim_is_found(changes, problem):
    assert any(problem in line for line in claim(**changes)), claim(**changes)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("base: practice\n", "first line"),
        ("# paper: P110\ndata: [\n", "not YAML"),
        ("# paper: P110\ndata: x\ndelta: lora\nrank: 8\n", "not a plan: rank"),
        ("# paper: P110\ndata: x\n", "not a plan: delta"),
    ],
)
def test_a_broken_recipe_is_found(tmp_path, monkeypatch, text, problem):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "lora.yaml").write_text(text)
    monkeypatch.setattr("luthier.papers.claims.PACKAGE", tmp_path)
    assert any(problem in line for line in claim()), claim()


def test_one_row():
    assert paper("P110").title.startswith("LoRA")
    assert paper("p7") == paper("7") == paper("P007")
    with pytest.raises(LuthierError, match="BitFit"):
        paper("bitfit")
    with pytest.raises(LuthierError, match="P001 to P489"):
        paper("P999")


def test_json_has_the_promised_keys():
    rows = json.loads(json.dumps(as_json()))
    assert len(rows) == 489
    assert {tuple(row) for row in rows} == {("id", "title", "room", "status", "names", "recipe", "evidence")}
    assert all(isinstance(row["names"], list) for row in rows)


def test_reading_the_table_needs_no_torch():
    code = "import sys, luthier.papers as t; t.as_json(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_names_its_paper_and_practice_families(recipe):
    from luthier.practice.world import families

    text = recipe.read_text(encoding="utf-8")
    ids = recipe_papers(text)
    assert ids and all(paper(id).fits != "out" for id in ids)
    read = yaml.safe_load(text)
    plans = [s.settings for s in load_stages(read) if s.verb == "tune"] if "stages" in read else [read]
    for plan in map(Plan.model_validate, plans):
        checks = [*plan.audit.target, *plan.audit.guards, *plan.audit.shifted]
        for source in [*plan.data.train, *plan.data.eval, *(c.source for c in checks)]:
            assert source.path.startswith("practice:"), f"{source.path}: a recipe runs without other files"
            assert set(source.path.removeprefix("practice:").split(",")) <= set(families())


def test_no_search_chooses_by_the_records_it_is_reported_on():
    from luthier.data.read import read
    from luthier.plan.schema import AuditSpec

    def seen(spec):
        for row in spec.target:
            yield from (r.fields["id"] for r in read(row.source.model_copy(update={"limit": spec.items})))

    searching = 0
    for recipe in RECIPES:
        plan = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        stages = load_stages(plan) if "stages" in plan else []
        audits = [
            {k: v for k, v in s.settings.items() if k in AuditSpec.model_fields} for s in stages if s.verb == "audit"
        ]
        reported = {id for audit in audits for id in seen(AuditSpec.model_validate(audit))}
        for chosen in [s.settings["evaluate"] for s in stages if s.verb == "merge" and "evaluate" in s.settings]:
            searching += 1
            assert reported.isdisjoint(seen(AuditSpec.model_validate(chosen))), recipe.stem
    assert searching == 3


@cache
def sources() -> str:
    """Digest of everything that decides what a recipe does here: this test, the package, the libraries below it."""
    seen = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted((ROOT / "luthier").rglob("*")):
        if path.is_file() and path.suffix in (".py", ".json", ".jinja", ".safetensors"):
            seen.update(str(path.relative_to(ROOT)).encode())
            seen.update(hashlib.sha256(path.read_bytes()).digest())
    for library in ("torch", "transformers", "accelerate"):
        seen.update(importlib.metadata.version(library).encode())
    return seen.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, tmp_path, request):
    """Two steps of every recipe end in a saved delta of finite numbers. A run that passed is not repeated while
    neither the recipe nor the package has changed: its digest is kept in pytest's cache."""
    text = recipe.read_text(encoding="utf-8")
    key = f"luthier/recipe-runs/{recipe.stem}"
    digest = hashlib.sha256((sources() + text).encode()).hexdigest()
    if request.config.cache.get(key, None) == digest:
        return
    from safetensors.torch import load_file

    import luthier
    from luthier.verbs.stages import run_stages

    plan = yaml.safe_load(text)
    chain = plan.get("stages")
    for stage in chain or [{"tune": plan}]:
        shorten(stage)
    if chain:
        folders = [row for row in run_stages(plan, out=tmp_path, progress=False).stages if row["verb"] != "audit"]
        assert [row["name"] for row in folders] == [s["name"] for s in chain if "audit" not in s]
        written = [tmp_path / row["name"] for row in folders]
    else:
        written = [luthier.tune(Plan.model_validate(plan), out=tmp_path / "delta").out]
    for out in written:
        files = sorted(out.rglob("*.safetensors"))
        assert files or (out / "assembly.json").exists(), f"{out.name} wrote nothing"
        numbers = [tensor for file in files for tensor in load_file(file).values()]
        assert all(tensor.isfinite().all() for tensor in numbers if tensor.is_floating_point())
        assert any(tensor.any() for tensor in numbers) or (out / "assembly.json").exists()
    request.config.cache.set(key, digest)


def shorten(stage: dict) -> None:
    """Two steps of everything that takes steps, and a few records of everything that takes records."""
    from luthier.delta import EDITS

    if plan := stage.get("tune"):
        plan["train"] = {**plan.get("train", {}), "steps": 2, "batch_size": 4, "warmup": 0}
        train = plan["data"]["train"]
        few = [{**source, "limit": 64} for source in train] if isinstance(train, list) else {**train, "limit": 64}
        plan["data"] = {**plan["data"], "max_length": 128, "train": few}
        plan["audit"] = {**plan.get("audit", {}), "enabled": False}
    if plan := stage.get("compress"):
        plan |= {"tokens": 512, "steps": 2}
    if plan := stage.get("edit"):
        known = {field.name for field in dataclasses.fields(EDITS[plan["method"]])}
        plan |= {key: 2 for key in ("steps", "epochs") if key in known} | {"score": False}
        for key in {"records", "train_records"} & set(plan):
            plan[key] = {**plan[key], "limit": 2}
    for audit in (stage.get("audit"), stage.get("merge", {}).get("evaluate")):
        if audit:
            audit |= {"items": 2, "drift_tokens": 0, "samples": 0}
            for key in {"target", "guards", "shifted"} & set(audit):
                rows = [
                    row["source"] if isinstance(row, dict) else {"path": row, "split": "test"} for row in audit[key]
                ]
                audit[key] = [{"source": source, "max_new_tokens": 4} for source in rows]
