"""Killed, told to stop, or out of disk: the next --resume ends where the uninterrupted run ends."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from luthier.training import checkpoint
from luthier.training.events import _forget_after
from luthier.training.lock import locked
from luthier.training.run import build
from luthier.verbs.tune import tune
from tests.runs.support import World

PIECES = [
    {"form": "lora", "rank": 2, "dropout": 0.1, "sites": "attn.q"},
    {"choice": "lisa", "every": 4, "layers_active": 1, "sites": ["ffn", "embed"]},
]
STEPS = 20
DIED, FAILED = 77, 78


def small(world: World, **sections: Any) -> Any:
    train = {"steps": STEPS, "rehearse": False, **sections.pop("train", {})}
    return world.plan(PIECES, train=train, checkpoint={"every": 1, "keep": 2}, **sections)


def child(work: Callable[[], Any]) -> int:
    """Forks: importing torch anew would take longer than the run. Gives the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        work()
        code = 0
    except KeyboardInterrupt:
        code = DIED
    finally:
        os._exit(code)


def ended(pid: int, within: float = 120) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        got, status = os.waitpid(pid, os.WNOHANG)
        if got:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end within {within} s")


def wait_for(path: Path, lines: int, within: float = 60) -> None:
    """Until a log has that many lines."""
    until = time.monotonic() + within
    while lines and time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.001)
    assert not lines, f"{path} never had {lines} lines"


def go(world: World, out: Path) -> Callable[[], Any]:
    return lambda: tune(
        small(world), out=out, resume=checkpoint.latest(out / "checkpoints") is not None, progress=False
    )


def same_delta(a: Path, b: Path) -> bool:
    one, other = load_file(a / "delta.safetensors"), load_file(b / "delta.safetensors")
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The uninterrupted run's folder, and the seconds a forked run takes."""
    out = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    assert ended(child(go(world, out))) == 0
    return out, time.monotonic() - started


def test_a_log_is_shortened_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while a resumed run drops what it does again, the log has every line that it had."""
    log, text = tmp_path / "log.jsonl", "".join(f'{{"step": {k}}}\n' for k in range(1, 6))
    log.write_text(text)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        _forget_after(log, 3)
    assert log.read_text() == text
    _forget_after(log, 3)
    assert log.read_text().count("\n") == 3


@pytest.mark.slow
def test_twenty_kills(world: World, whole: tuple[Path, float], tmp_path: Path) -> None:
    """kill -9 at twenty random moments; each time the run goes on from its newest checkpoint, or from its start."""
    draw, kills, reached = random.Random(5), 0, set()
    while kills < 20:
        pid = child(go(world, tmp_path))
        have = checkpoint.latest(tmp_path / "checkpoints")
        step = int(have.name.rpartition("-")[2]) if have else 0
        if step < STEPS - 1:  # else it may end, to be begun anew
            lines = min(step + draw.randint(0, 5), STEPS)
            wait_for(tmp_path / "log.jsonl", lines)  # by time alone most kills would fall on the start
            time.sleep(draw.uniform(0, 0.04) * whole[1])
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        have = checkpoint.latest(tmp_path / "checkpoints")
        reached.add(have.name if have else None)
        if code == 0:  # done early: its delta and checkpoints go, so that there is something left to kill
            (tmp_path / "delta.json").unlink()
            (tmp_path / "log.jsonl").unlink()
            for path in checkpoint.all_of(tmp_path / "checkpoints")[::-1]:
                (path / "state.json").unlink()
    assert len(reached) > 3, "the kills fell on different steps"
    assert ended(child(go(world, tmp_path))) == 0
    assert same_delta(whole[0], tmp_path)
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(rows) == STEPS, "every step is logged once, whatever was done twice"


MOMENTS = ["before anything", "half of the tensors", "before the state", "before the rename", "after the rename"]


@pytest.mark.parametrize(("step", "moment"), [(1, MOMENTS[1]), *((7, moment) for moment in MOMENTS)])
def test_killed_while_writing(moment: str, step: int, world: World, whole: tuple[Path, float], tmp_path: Path) -> None:
    """Every point inside the writing of a checkpoint, the first one and a later one."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        saves = 0
        real_save, real_write, real_replace = checkpoint.save_file, Path.write_text, os.replace

        def save_file(tensors: Any, path: Path) -> None:
            nonlocal saves
            saves += 1
            if saves == step and moment == "before anything":
                die()
            real_save(tensors, path)
            if saves == step and moment == "half of the tensors":
                os.truncate(path, path.stat().st_size // 2)
                die()

        def write_text(self: Path, *args: Any, **kwargs: Any) -> int:
            if saves == step and self.name == "state.json" and moment == "before the state":
                die()
            return real_write(self, *args, **kwargs)

        def replace(a: Any, b: Any) -> None:
            if saves == step and moment == "before the rename":
                die()
            real_replace(a, b)
            if saves == step and moment == "after the rename":
                die()

        checkpoint.save_file, Path.write_text, os.replace = save_file, write_text, replace  # only in this child
        go(world, tmp_path)()

    assert ended(child(work)) == -signal.SIGKILL
    have = checkpoint.latest(tmp_path / "checkpoints")
    assert (int(have.name[5:]) if have else 0) == (step if moment == "after the rename" else step - 1)
    resume = lambda: tune(small(world), out=tmp_path, resume=True, progress=False)  # noqa: E731
    assert ended(child(resume)) == 0
    assert same_delta(whole[0], tmp_path)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step-{STEPS - 2:08d}", f"step-{STEPS - 1:08d}"], "kept to the number, and no litter"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(number: signal.Signals, world: World, whole: tuple[Path, float], tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C: a checkpoint of that step is written even where none was due; then the run leaves, and says why."""
    plan = small(world, train={"steps": 2000, "schedule": "constant"})
    plan.checkpoint.every = 0

    def work() -> None:
        result = tune(plan, out=tmp_path, progress=False)
        (tmp_path / "said").write_text(f"{result.stopped} {result.report}")

    pid = child(work)
    wait_for(tmp_path / "log.jsonl", 3)
    os.kill(pid, number)
    assert ended(pid) == 0
    assert (tmp_path / "said").read_text() == f"{number.name} {{}}"
    have = checkpoint.latest(tmp_path / "checkpoints")
    assert have is not None and not (tmp_path / "delta.safetensors").exists()
    steps = int(have.name[5:])
    assert 3 <= steps < 2000 and len((tmp_path / "log.jsonl").read_text().splitlines()) == steps
    training = build(plan, tmp_path, resume=True, progress=False)
    assert training.record["resume_certificate"]["loss_equal"] and training.loop.progress.stopped is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_while_measuring(number: signal.Signals, world: World, tmp_path: Path) -> None:
    """The delta is whole and can be measured; the run leaves, and says so."""

    def work() -> None:
        def audit(*args: Any, **kwargs: Any) -> None:
            (tmp_path / "measuring").touch()
            time.sleep(60)

        setattr(sys.modules[tune.__module__], "audit", audit)  # noqa: B010  (only in this child)
        plan = small(world, audit={"target": [str(world.records)], "items": 2})
        plan.checkpoint.every = 0
        result = tune(plan, out=tmp_path / "out", progress=False)
        (tmp_path / "said").write_text(f"{result.stopped}; {result.remedy}")

    pid = child(work)
    until = time.monotonic() + 60
    while not (tmp_path / "measuring").exists() and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(pid, number)
    assert ended(pid) == 0
    out = tmp_path / "out"
    assert (tmp_path / "said").read_text() == (
        f"{number.name} while measuring; the delta is whole: measure it with luthier audit {out}"
    )
    assert Delta.load(out).pieces and not (out / "report.json").exists()
    with pytest.raises(LuthierError, match="without a report: luthier audit"):
        tune(small(world), out=out, resume=True, progress=False)


def test_second_signal_ends_at_once(world: World, tmp_path: Path) -> None:
    """Whoever asks twice, by whichever signal, does not wait for the save."""
    ready = tmp_path / "asked"

    def work() -> None:
        from luthier.training.events import Events

        def save(self: Events, loop: Any) -> None:
            ready.touch()
            time.sleep(60)

        Events.save = save  # a save that takes long, only in this child
        plan = small(world, train={"steps": 2000})
        plan.checkpoint.every = 0
        tune(plan, out=tmp_path, progress=False)

    for second in (signal.SIGTERM, signal.SIGINT):
        ready.unlink(missing_ok=True)
        (tmp_path / "log.jsonl").unlink(missing_ok=True)
        pid = child(work)
        wait_for(tmp_path / "log.jsonl", 2)
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.002)
        asked = time.monotonic()
        os.kill(pid, second)
        assert ended(pid) in (-signal.SIGTERM, DIED)
        assert time.monotonic() - asked < 10


def test_folder_in_use(world: World, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(LuthierError, match=f"in use by process {os.getpid()}"):
        tune(small(world), out=tmp_path, progress=False)
    with locked(tmp_path):
        pass


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    def work() -> None:
        with locked(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    pid = child(work)
    until = time.monotonic() + 30
    while not (tmp_path / "held").exists() and time.monotonic() < until:
        time.sleep(0.002)
    with pytest.raises(LuthierError, match=f"in use by process {pid}"), locked(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    with locked(tmp_path):
        pass


def test_earlier_run_is_not_written_over(world: World, whole: tuple[Path, float]) -> None:
    with pytest.raises(LuthierError, match="add --resume"):
        tune(small(world), out=whole[0], progress=False)


def test_checkpoints_are_kept_to_the_number(world: World, tmp_path: Path) -> None:
    plan = small(world, train={"steps": 8})
    plan.checkpoint.keep = 3
    build(plan, tmp_path, progress=False).train()
    names = [p.name for p in checkpoint.all_of(tmp_path / "checkpoints")]
    assert names == [f"step-{k:08d}" for k in (5, 6, 7)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_disk_full_leaves_the_previous_checkpoint_whole(
    error: Exception, world: World, whole: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = checkpoint.save_file, 0

    def save_file(tensors: Any, path: Path) -> None:
        nonlocal saves
        saves += 1
        real(tensors, path)
        if saves == 4:
            os.truncate(path, 100)
            raise error

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(LuthierError, match="step-00000003 is whole") as caught:
        tune(small(world), out=tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
    tune(small(world), out=tmp_path, resume=True, progress=False)
    assert same_delta(whole[0], tmp_path)


def test_really_full_disk(world: World, tmp_path: Path) -> None:
    """A file system of 3 MB that something else fills on the way."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        training = build(small(world), disk / "out", progress=False)
        tell = training.events.tell

        def fill(event: str, loop: Any) -> None:
            if event == "save" and loop.progress.step == 3:
                with (disk / "other").open("wb", buffering=0) as f:
                    try:
                        while True:
                            f.write(bytes(4096))
                    except OSError:
                        pass
            tell(event, loop)

        training.events.tell = fill  # type: ignore[method-assign]
        with pytest.raises(LuthierError, match=r"free some space"):
            training.train()
        have = checkpoint.latest(disk / "out" / "checkpoints")
        assert have is not None and have.name == "step-00000003"
        checkpoint.load(have)
        (disk / "other").unlink()
        again = build(small(world), disk / "out", resume=True, progress=False)
        assert again.record["resume_certificate"]["loss_equal"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_little_room_is_told_before_step_one(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(LuthierError, match="MB free, the run's checkpoints need"):
        build(small(world, train={"rehearse": True}), tmp_path, progress=False)


def test_torn_checkpoint_is_named(world: World, tmp_path: Path) -> None:
    """Something else cut the newest one: an error that says what to remove, and the one before it resumes."""
    build(small(world, train={"steps": 6}), tmp_path, progress=False).train()
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    os.truncate(newest / "tensors.safetensors", 64)
    with pytest.raises(LuthierError, match=f"{newest.name} cannot be read"):
        build(small(world, train={"steps": 6}), tmp_path, resume=True, progress=False)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    training = build(small(world, train={"steps": 6}), tmp_path, resume=True, progress=False)
    assert training.loop.progress.step == 4
