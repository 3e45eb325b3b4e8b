"""Runs on several gloo processes, forked from this warm one, as a launcher would start them."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(work: Callable[[int], Any], folder: Path, world: int = 2, within: float = 240) -> list[str]:
    """Runs work(rank) in `world` processes; gives each one's failure ('' where there is none)."""
    folder.mkdir(parents=True, exist_ok=True)
    port, pids = free_port(), []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _be(rank, world, port, work, folder)
        pids.append(pid)
    until, left = time.monotonic() + within, dict(enumerate(pids))
    while left and time.monotonic() < until:
        for rank, pid in list(left.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del left[rank]
                if (folder / f"failed-{rank}").exists():  # as a launcher does: the others would wait for it forever
                    until = min(until, time.monotonic() + 5)
        time.sleep(0.01)
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    out = []
    for rank in range(world):
        path = folder / f"failed-{rank}"
        out.append(path.read_text() if path.exists() else "did not end" if rank in left else "")
    return out


def _be(rank: int, world: int, port: int, work: Callable[[int], Any], folder: Path) -> None:
    """The child: a launcher's environment, accelerate as if just imported, then the work."""
    code = 1
    try:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        (folder / f"failed-{rank}").unlink(missing_ok=True)
        work(rank)
        code = 0
    except BaseException:  # noqa: BLE001 -- whatever it is, the parent shows it
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)
