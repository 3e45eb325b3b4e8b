"""The progress bar: steps, loss, tokens a second, memory and time left."""

from __future__ import annotations

from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from luthier.bases.hardware import resident_memory


class Bar:
    """One line on standard error, redrawn in place; silent where that is no terminal."""

    def __init__(self, steps: int, done: int, tokens: int) -> None:
        self.recent: deque[tuple[float, int]] = deque(maxlen=20)
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("tune"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[memory]} GB"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("tune", total=steps, completed=done, loss="–", speed="–", memory="–")
        self.progress.start()

    def update(self, state: Any, row: dict[str, float]) -> None:
        self.recent.append((state.seconds, state.tokens))
        (t0, n0), (t1, n1) = self.recent[0], self.recent[-1]
        speed = f"{(n1 - n0) / (t1 - t0):,.0f}" if t1 > t0 else "–"
        fields = {"speed": speed, "memory": f"{resident_memory() / 2**30:.2f}"}
        if "loss" in row:
            fields["loss"] = f"{row['loss']:.4f}"
        self.progress.update(self.task, completed=state.step, **fields)  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        self.progress.stop()
