"""Pushing to the hub: what can be known beforehand is told before training, and only the delta's own files go up."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from luthier.errors import LuthierError
from luthier.verbs.push import check_push, push
from tests.rooms.test_received import made


class Hub:
    """Stands for the hub's client: keeps what it is asked, or fails as it would."""

    asked: list[tuple[str, dict[str, Any]]] = []
    failing: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **named: Any) -> Any:
            if Hub.failing:
                raise Hub.failing
            Hub.asked.append((name, named | ({"repo_id": args[0]} if args else {})))
            return SimpleNamespace(repo_id="me/delta")

        return ask


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    Hub.asked, Hub.failing = [], None
    return Hub


def test_only_the_delta_goes_up_and_privately(hub: type[Hub], tmp_path: Path) -> None:
    delta = made()
    delta.files = {"tokenizer.json": b"{}"}
    folder = delta.save(tmp_path / "d")
    others = ["checkpoints/step-5/delta.safetensors", "log.jsonl", "secrets.txt", ".lock", "audit/report.json"]
    for name in ["report.json", "report.html", *others]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    push(folder, "delta")
    (_, created), (_, uploaded) = hub.asked
    assert created == {"exist_ok": True, "private": True, "repo_id": "delta"} and uploaded["repo_id"] == "me/delta"
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    sent = {
        n
        for n in names
        if any(fnmatch.fnmatch(n, q) for q in uploaded["allow_patterns"])
        and not any(fnmatch.fnmatch(n, q) for q in uploaded["ignore_patterns"])
    }
    assert sent == {"delta.json", "delta.safetensors", "README.md", "report.json", "report.html", "tokenizer.json"}


def test_what_is_wrong_is_told_beforehand(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    check_push("me/delta")
    assert [name for name, _ in hub.asked] == ["whoami"]
    for name in ("a/b/c", "my delta", "-x", ""):
        with pytest.raises(LuthierError, match="is no repository name"):
            check_push(name)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(LuthierError, match="hf auth login"):
        check_push("me/delta")


def failures() -> list[Exception]:
    transport: Any = HfHubHTTPError.__mro__[1]
    return [OSError("no route\nto host"), transport("unreachable\nmore")]


@pytest.mark.parametrize("failure", failures(), ids=["system", "transport"])
def test_a_failing_hub_is_one_line(failure: Exception, hub: type[Hub], tmp_path: Path) -> None:
    folder = made().save(tmp_path / "d")
    hub.failing = failure
    for call in (lambda: check_push("me/delta"), lambda: push(folder, "me/delta")):
        with pytest.raises(LuthierError) as e:
            call()
        assert "push_to me/delta failed" in str(e.value) and "\n" not in str(e.value)
