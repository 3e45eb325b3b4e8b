"""The command line: quick help, and one line with the remedy and exit code 2 for whatever is wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.cli import main
from luthier.errors import LuthierError

COMMANDS = (
    "tune",
    "audit",
    "inspect",
    "verify",
    "export",
    "import",
    "generate",
    "chat",
    "data",
    "papers",
    "doctor",
    "demo",
    "merge",
    "diff",
    "compress",
    "edit",
    "port",
    "assemble",
    "rebase",
    "gate",
)
HEAVY = ("torch", "transformers", "pydantic", "accelerate", "numpy", "yaml")


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(list(args))
    return int(e.value.code or 0)


def test_help_starts_in_a_blink_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom luthier.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "sys.stderr.write(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    seconds = []
    for _ in range(3):
        began = time.process_time(), time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began[1])
    assert not set(HEAVY) & set(done.stderr.split())
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert min(seconds) < 1.5  # 0.2 s on an idle machine; the import check above is what holds it there


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("Usage: luthier " + name) and "--help" in said


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with broken things in it, as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = "base: practice\ndata: {train: records.jsonl}\ndelta: [{form: lora}]\n"
    files = {
        "good.yaml": good,
        "empty.yaml": "",
        "broken.yaml": "base: [\n",
        "twice.yaml": good + "base: other\n",
        "list.yaml": "- 1\n",
        "key.yaml": good + "trian: {lr: 1}\n",
        "peer.yaml": good + "learning_rate: 1\n",
        "nobase.yaml": good.replace("practice", "./no-such-base"),
        "nodata.yaml": good.replace("records.jsonl", "missing.jsonl"),
        "prompts.jsonl": '{"prompt": "a"}\n{"prompt": \n',
        "column.jsonl": '{"question": "a"}\n',
        "nothing.txt": "",
        "records.jsonl": '{"prompt": "a", "completion": "b"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.yaml").write_bytes("base: é".encode("latin-1"))
    (tmp_path / "no-delta").mkdir()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    (tmp_path / "future").mkdir()
    header = {"format": 99, "base": {}, "pieces": [], "lineage": {}}
    (tmp_path / "future" / "delta.json").write_text(json.dumps(header))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "delta.json").write_text('{"format": 1')
    return tmp_path


BROKEN = {
    # command line -> what the line must say
    "tune": ["plan", "tune --help"],
    "tune missing.yaml": ["missing.yaml", "there is no such plan"],
    "tune good.yml": ["good.yml", "good.yaml"],
    "tune no-delta": ["no-delta", "folder"],
    "tune empty.yaml": ["empty.yaml", "empty", "data"],
    "tune broken.yaml": ["broken.yaml", "line", "YAML"],
    "tune twice.yaml": ["twice.yaml", "line 4", "twice"],
    "tune list.yaml": ["list.yaml", "table of sections"],
    "tune latin.yaml": ["latin.yaml", "UTF-8"],
    "tune key.yaml": ["key.yaml", "trian", "'train'"],
    "tune peer.yaml": ["peer.yaml", "learning_rate", "train.lr"],
    "tune nobase.yaml --dry-run": ["no-such-base"],
    "tune good.yaml train.lr": ["train.lr", "key=value"],
    "tune good.yaml train.lrr=1": ["good.yaml", "train.lrr", "train.lr"],
    "tune good.yaml train.lr=high": ["train.lr", "a number", "high"],
    "tune good.yaml delta.form=loar": ["delta.0", "loar", "lora"],
    "tune good.yaml delta.rnk=1": ["delta.0.rnk", "rank"],
    "tune good.yaml delta.lora_alpha=1": ["delta.0.lora_alpha", "delta.alpha"],
    "tune good.yaml objective=dpoo": ["objective", "dpoo"],
    "tune good.yaml output_dir=x": ["output_dir", "--out"],
    "tune good.yaml --dryrun": ["--dryrun", "--dry-run"],
    "tune good.yaml --dry-run --resume": ["--dry-run", "--resume"],
    "tuen good.yaml": ["tuen", "tune"],
    "audit": ["DELTA", "audit --help"],
    "audit missing": ["missing", "delta"],
    "audit no-delta": ["no-delta", "delta.json"],
    "audit torn": ["delta.json", "JSON"],
    "audit future": ["format 99", "upgrade"],
    "inspect no-delta": ["no-delta", "delta.json"],
    "inspect peft": ["peft", "luthier import"],
    "verify missing": ["missing"],
    "export no-delta --to hf --out x": ["no-delta"],
    "export no-delta --to hf": ["out"],
    "import peft --out x": ["peft", "adapter_config.json"],
    "import missing --out x": ["missing"],
    "generate practice": ["--prompt", "--file"],
    "generate practice --file missing.txt": ["missing.txt"],
    "generate practice --file nothing.txt": ["nothing.txt", "empty"],
    "generate practice --file prompts.jsonl": ["prompts.jsonl:2", "JSON"],
    "generate practice --file column.jsonl": ["column.jsonl:1", "prompt"],
    "generate ./no-such-base --prompt a": ["no-such-base"],
    "generate practice --prompt a --max-new-tokens 0": ["--max-new-tokens", "1"],
    "generate practice --prompt a --delta no-delta": ["no-delta", "delta.json"],
    "data show missing.yaml": ["missing.yaml"],
    "data shwo good.yaml": ["shwo", "show"],
    "papers P9999": ["P9999", "P489"],
    "papers --status done": ["done", "works"],
    "demo train.lrr=1": ["train.lrr", "train.lr"],
    "merge": ["plan", "--method", "--list"],
    "merge missing.yml --out x": ["missing.yml", "there is no such plan"],
    "merge a b --method tise --out x": ["tise", "ties"],
    "diff practice --out x": ["tuned", "diff --help"],
    "compress missing --out x": ["missing", "delta"],
    "compress no-delta --method bitdleta --out x": ["bitdleta", "bitdelta"],
    "edit practice missing.jsonl --method rome --out x": ["missing.jsonl"],
    "edit practice prompts.jsonl --method rmoe --out x": ["rmoe", "rome"],
    "port missing --onto practice --out x": ["missing"],
    "port no-delta --onto practice --out x": ["no-delta", "delta.json"],
    "assemble --large practice --out x": ["--large", "--expert"],
    "rebase no-delta --onto practice": ["--out", "rebase --help"],
    "gate base": ["new", "gate --help"],
    "gate base base --plan missing.yaml": ["missing.yaml"],
}


@pytest.mark.parametrize("line", BROKEN)
def test_broken_input_is_one_line_and_exit_code_2(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LUTHIER_TRACE", raising=False)
    assert call(*line.split()) == 2
    said = capsys.readouterr()
    errors = [row for row in said.err.splitlines() if row.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n"), said.err
    assert "Traceback" not in said.err + said.out
    for word in BROKEN[line]:
        assert word in errors[0], errors[0]
    assert not (folder / "out").exists() or not list((folder / "out").glob("delta*"))


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) >= 25 and {line.split()[0] for line in BROKEN} >= set(COMMANDS) - {"chat", "doctor"}


def test_trace_shows_where_an_error_came_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_TRACE", "1")
    with pytest.raises(LuthierError):
        main(["tune", "missing.yaml"])


def test_ctrl_c_is_130_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import luthier.papers.table as papers

    def interrupted() -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(papers, "papers", interrupted)
    assert call("papers") == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_papers_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("papers", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 489 and set(rows[0]) == {"id", "title", "room", "status", "names", "recipe", "evidence"}
    assert call("papers", "p110") == 0
    assert "LoRA" in capsys.readouterr().out
    assert call("papers", "--status", "not yet") == 0
    told = capsys.readouterr().out
    assert f"{sum(r['status'] == 'not yet' for r in rows)} papers" in told


def test_doctor_names_a_remedy_for_all_that_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LUTHIER_CACHE", "/proc/nowhere")
    assert call("doctor", "--json") == 1
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["cache"]["state"] == "bad" and "LUTHIER_CACHE" in found["cache"]["remedy"]
    assert found["hub"]["state"] == "note" and "HF_HUB_OFFLINE" in found["hub"]["found"]
    assert all(row["remedy"] for row in found.values() if row["state"] != "ok")
    assert {"python", "torch", "device", "bfloat16", "memory", "malloc", "processes", "practice base"} <= set(found)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import luthier

    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"luthier {luthier.__version__}"


def test_the_demo_can_be_run_again_and_spares_what_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = importlib.import_module("luthier.verbs.tune")

    seen: list[list[str]] = []

    def tuned(plan: object, *, out: Path) -> object:
        assert plan.checkpoint.every == 0  # pyright: ignore
        seen.append(sorted(p.name for p in out.iterdir() if not p.name.startswith(".")))
        (out / "checkpoints" / "step-3").mkdir(parents=True)
        (out / "delta.json").write_text("{}")
        return verb.Run(None, out, {})  # pyright: ignore

    monkeypatch.setattr(verb, "tune", tuned)
    again = tmp_path / "demo-report"
    assert [call("demo", "--out", str(again)) for _ in range(3)] == [0, 0, 0]
    assert seen == [[], [], []]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    assert call("demo", "--out", str(notes)) == 2
    assert "is not the report of an earlier demo" in capsys.readouterr().err
    assert (notes / "README.md").read_text() == "mine" and len(seen) == 3


def test_a_check_that_could_not_be_made_is_neither_yes_nor_no(capsys: pytest.CaptureFixture[str]) -> None:
    from luthier.bridge.proof import Check, Report
    from luthier.cli.show import proof

    checks = [Check("a", True, "x"), Check("b", None, "y"), Check("c", False, "z")]
    assert not proof(Report("p", "delta", checks))
    assert [row[0] for row in capsys.readouterr().out.splitlines()[:3]] == ["✓", "·", "✗"]


def test_doctor_names_every_tracker() -> None:
    from luthier.verbs.doctor import EXTRAS

    assert {"tensorboard", "wandb", "mlflow", "trackio"} <= set(EXTRAS)


def test_what_the_package_imports_it_declares() -> None:
    """Every import of a distribution stands in the dependencies, or in the extras."""
    import ast
    import tomllib

    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(row for rows in project["optional-dependencies"].values() for row in rows)]
    known = {"".join(c for c in row.split(">")[0].split("[")[0]).strip() for row in lines} - {"luthier"}
    known = {{"pyyaml": "yaml"}.get(name, name) for name in known}
    known |= {"pydantic_core", "markupsafe"}  # pydantic's and jinja2's own halves
    files = list((root / "luthier").rglob("*.py"))
    used: dict[str, str] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used |= {name.partition(".")[0]: path.name for name in names}
    own = {"luthier", "__future__", *sys.stdlib_module_names}
    assert len(files) > 100 and not {k: v for k, v in used.items() if k not in own | known}
