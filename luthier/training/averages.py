"""Averages of weights taken while a run goes on: a slow copy that follows, and merges of branches at the ends of periods.

A plan names them as callbacks: `train.callbacks: ["luthier.training.averages:SlowWeights(momentum=0.99, every=1)"]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.attach.edits import assign
from luthier.attach.weights import gathered
from luthier.delta import MERGES, Stack
from luthier.errors import LuthierError
from luthier.training.loop import Loop


class _Average:
    """What both have in common: they know the trained numbers by name, and their own travel with the checkpoints."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on after a restart."""
        return dict(self.kept)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        self.kept = {k: v.clone() for k, v in tensors.items()}

    def numbers(self, loop: Loop) -> dict[str, Tensor]:
        """The trained numbers as they are now. Errors: LuthierError where others train than at the start."""
        now = {k: p.detach() for k, p in loop.optimiser.names.items()}
        if self.kept and {k.split("|")[-1] for k in self.kept} != set(now):
            raise LuthierError(
                f"{type(self).__name__} averages one set of numbers: a choice that draws anew cannot have it"
            )
        if loop.spec.keep_best:
            raise LuthierError(f"{type(self).__name__} decides what the run ends with: set train.keep_best: false")
        return now

    def ship(self, loop: Loop, values: Mapping[str, Tensor]) -> None:
        """Makes these the run's numbers."""
        for name, parameter in loop.optimiser.names.items():
            assign(parameter, values[name].to(parameter.dtype))
        loop.handle.after_step()


class SlowWeights(_Average):
    """Momentum-based weight interpolation: s ← m s + (1 − m) w after every `every` steps, s started at the base.

    The run trains the fast weights w as always and ends with the slow ones: no pass and no gradient more. Of a delta
    whose numbers are factors, the factors are averaged (our reading). A stream of tasks is one run over their sources in
    order (`data.shuffle: false`, `bucket: 1`), so that the fast weights train on from task to task, as in the paper; in a
    chain of runs each would start from the slow ones.
    Source: Stojanovski et al. 2022 (P405).
    """

    def __init__(self, momentum: float = 0.99, every: int = 1) -> None:
        super().__init__()
        if not 0 <= momentum <= 1 or every < 1:
            raise ValueError(f"momentum {momentum} must lie in [0, 1] and every {every} be at least 1")
        self.momentum, self.every = momentum, every

    @torch.no_grad()
    def __call__(self, event: str, loop: Loop) -> None:
        if event == "begin":  # a checkpoint's lie on the CPU
            now = {k: gathered(v).float() for k, v in self.numbers(loop).items()}
            self.kept = {k: self.kept.get(k, v).to(v.device, copy=True) for k, v in now.items()}
        elif event == "step" and loop.progress.step % self.every == 0:
            for name, value in self.numbers(loop).items():
                self.kept[name].lerp_(gathered(value).float(), 1 - self.momentum)
        elif event == "end":
            self.ship(loop, self.kept)


class PeriodicStock(_Average):
    """Model Stock while training: in every period two branches train from one point, and their merge is the next one.

    A branch takes `every` steps; the second starts again where the first did and sees the records that follow, with the
    optimiser's moments going on (our reading, as one process has it). Each tensor is merged about its value at the start
    of the run. A run that ends within a second branch merges it as it stands; one that ends within a first branch, or
    with it, ends with that branch, unmerged. Source: Jang et al. 2024 (P017).
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self.merge = MERGES.make("model_stock", {})

    @torch.no_grad()
    def __call__(self, event: str, loop: Loop) -> None:
        now, step = self.numbers(loop), loop.progress.step
        if event == "begin" and not self.kept:
            self._keep("anchor", now)
            self._keep("centre", now)
        elif event == "step" and step % (2 * self.every) == self.every:
            self._keep("branch", now)
            self.ship(loop, self._part("centre"))
        elif event == "end" and step % (2 * self.every) == self.every:  # the second branch has made no step
            self.ship(loop, self._part("branch"))
        elif (event == "step" and step % (2 * self.every) == 0) or (event == "end" and self._part("branch")):
            merged = self.merged(now)
            self.ship(loop, merged)
            self._keep("centre", merged)
            self.kept = {k: v for k, v in self.kept.items() if not k.startswith("branch|")}

    def merged(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Model Stock of the first branch's end and `now`, about the start of the run; on the CPU, as merges are."""
        anchor, branch = self._part("anchor"), self._part("branch")
        return {
            name: self.merge.merge(Stack(name, [branch[name], gathered(value).float().cpu()], anchor[name]))
            for name, value in now.items()
        }

    def _keep(self, part: str, values: Mapping[str, Tensor]) -> None:
        self.kept |= {f"{part}|{k}": gathered(v).float().to("cpu", copy=True) for k, v in values.items()}

    def _part(self, part: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{part}|"): v for k, v in self.kept.items() if k.startswith(f"{part}|")}
