"""What happens between steps: redraws, evaluation, best and early stop, logs, trackers, checkpoints, signals, bad losses."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from luthier.errors import LuthierError
from luthier.plan.schema import Plan
from luthier.training import certificate, checkpoint
from luthier.training.feed import Feed, all_ready, records_of
from luthier.training.groups import make_optimiser
from luthier.training.loop import Loop, evaluate
from luthier.training.pieces import Pieces
from luthier.training.progress import Bar
from luthier.training.view import Batch


class Events:
    """The loop's callback. User callbacks are called as `callback(event, loop)` with event begin, step, eval, save or end."""

    def __init__(self, plan: Plan, pieces: Pieces, data: Any, out: Path, batches: Feed, progress: bool) -> None:
        self.plan, self.pieces, self.data, self.out, self.batches = plan, pieces, data, out, batches
        self.show = progress
        self.asked: str | None = None
        self.known_answers: dict[str, Any] = {}
        self.best_tensors: dict[str, Any] | None = None
        self.callbacks = [_callable(name) for name in plan.train.callbacks]
        named = zip(plan.train.callbacks, self.callbacks, strict=True)
        self.stateful = [(name, c) for name, c in named if isinstance(c, Stateful)]
        self.bar: Bar | None = None

    def stop(self, why: str) -> None:
        """Asks the run to save and leave after the step under way."""
        self.asked = why

    def tell(self, event: str, loop: Loop) -> None:
        for callback in self.callbacks:
            callback(event, loop)

    def begin(self, loop: Loop) -> None:
        if loop.machine.first:
            _forget_after(self.out / "log.jsonl", loop.progress.step)
        if self.show and loop.machine.first:
            self.bar = Bar(loop.steps, loop.progress.step, loop.progress.tokens)
        self.tell("begin", loop)

    def restore(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Puts back the best delta and what the callbacks had in a checkpoint; other callbacks with a state are refused,
        since they may be part of what the run computes."""
        self.best_tensors = {k.removeprefix("best|"): v for k, v in tensors.items() if k.startswith("best|")} or None
        had, have = state["callbacks"], [name for name, _ in self.stateful]
        if had != have:
            raise LuthierError(
                f"train.callbacks: the checkpoint holds the state of {had}, the plan names {have}: put them back, or start "
                "anew in another --out"
            )
        for k, (_, callback) in enumerate(self.stateful):
            prefix = f"callback|{k}|"
            callback.load({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})

    def finish(self, loop: Loop) -> None:
        """The last evaluation, and the best delta if asked for."""
        state = loop.progress
        evaluated = bool(state.evals) and state.evals[-1]["step"] == state.step
        if self.data.eval is not None and state.stopped is None and not evaluated and not self.stateful:
            self._evaluate(loop)
        if self.plan.train.keep_best and self.best_tensors is not None:
            checkpoint.put_back(loop.handle, self.best_tensors, earlier=True)
        self.tell("end", loop)
        if self.stateful and self.data.eval is not None and (state.stopped or "early").startswith("early"):
            # they may have given the run other numbers: the last loss is that of what it ends with
            state.evals = [e for e in state.evals if e["step"] != state.step]
            self._evaluate(loop)

    def close(self, loop: Loop) -> None:
        """Bar and trackers, however the run ended."""
        if self.bar:
            self.bar.close()
        for tracker in loop.machine.accelerator.trackers:
            tracker.finish()

    def on_step(self, loop: Loop) -> bool:
        train, state = self.plan.train, loop.progress
        if state.step % train.log_every == 0 or state.step == loop.steps:
            self._log(loop, {k: v for k, v in state.curve[-1].items() if k != "step"})
        if train.eval_every and state.step % train.eval_every == 0 and self.data.eval is not None:
            self._evaluate(loop)
        if state.step < loop.steps and self.pieces.draw(state.step):
            loop.machine.wrap()
            loop.optimiser = make_optimiser(loop.handle, train, self.pieces.rates, loop.optimiser)
            certificate.same_on_all(loop.machine, sorted(loop.optimiser.names))
        self.tell("step", loop)
        leaving = loop.machine.any(self.asked is not None) and state.step < loop.steps
        if leaving:  # decided by all processes together, so that all of them save
            state.stopped = state.stopped or self.asked or "another process was asked to stop"
        every = self.plan.checkpoint.every
        if (every and state.step % every == 0 and state.step < loop.steps) or leaving:
            self.save(loop)
        return state.stopped is not None

    def save(self, loop: Loop) -> None:
        """Writes a checkpoint of everything."""
        stopped = loop.progress.stopped or ""
        tensors = checkpoint.tensors_of(loop.handle, loop.optimiser)
        for kind, value in (self.best_tensors or {}).items():
            tensors[f"best|{kind}"] = value
        for k, (_, callback) in enumerate(self.stateful):
            tensors |= {f"callback|{k}|{name}": v.cpu() for name, v in callback.tensors().items()}
        state = {
            "plan": self.plan.model_dump(mode="json", by_alias=True),
            "data_fingerprint": self.data.fingerprint,
            "progress": asdict(loop.progress) | {"stopped": stopped if stopped.startswith("early") else None},
            "data": self.batches.state_dict(),
            "choices": self.pieces.state(),
            "random": certificate.gather_random(loop.machine),
            "known_answers": self.known_answers,
            "callbacks": [name for name, _ in self.stateful],
            "certificate": certificate.make(loop, self.batches),
        }
        if loop.machine.first:
            checkpoint.save(self.out / "checkpoints", loop.progress.step, tensors, state, self.plan.checkpoint.keep)
        loop.machine.accelerator.wait_for_everyone()
        self.tell("save", loop)

    def _evaluate(self, loop: Loop) -> None:
        train, state = self.plan.train, loop.progress
        size = train.eval_batch_size or train.batch_size
        held_out = self.data.eval_batches(size, loop.machine.rank, loop.machine.world)
        loss = evaluate(loop, all_ready(held_out, self.pieces.base, loop.machine.compute))
        loop.machine.reshard()
        state.evals.append({"step": state.step, "loss": loss})
        self._log(loop, {"eval_loss": loss})
        self.tell("eval", loop)
        if math.isfinite(loss) and (state.best is None or loss < state.best["loss"]):
            state.best, state.stale = {"step": state.step, "loss": loss}, 0
            if train.keep_best:
                self.best_tensors = checkpoint.tensors_of(loop.handle, None, copy=True)
        else:
            state.stale += 1
        if train.early_stop and state.stale >= train.early_stop and state.step < loop.steps:
            state.stopped = f"early: no better evaluation loss in {state.stale} evaluations"

    def _log(self, loop: Loop, row: dict[str, float]) -> None:
        if self.plan.train.report_to:
            loop.machine.accelerator.log(row, step=loop.progress.step)
        if self.bar:
            self.bar.update(loop.progress, row)
        if loop.machine.first:
            path = self.out / "log.jsonl"
            try:
                with path.open("a", encoding="utf-8") as f:
                    f.write(json.dumps({"step": loop.progress.step, **row}) + "\n")
            except OSError as e:
                good = checkpoint.latest(self.out / "checkpoints")
                raise LuthierError(
                    f"cannot write {path} ({e}): free some space; last checkpoint: {good or 'none'}"
                ) from e

    def on_non_finite(self, loop: Loop, batches: list[Batch], loss: float) -> None:
        """Writes the records of the step beside the checkpoints; stops, or goes on where the plan says skip."""
        path = self.out / f"non-finite-step-{loop.progress.step + 1}-rank-{loop.machine.rank}.jsonl"
        rows = [{"where": where, "ids": ids} for batch in batches for where, ids in records_of(batch)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        if self.plan.train.non_finite == "stop" or loop.progress.skipped > self.plan.train.max_skips:
            good = checkpoint.latest(self.out / "checkpoints")
            raise LuthierError(
                f"step {loop.progress.step + 1}: the {what} is not finite; its {len(rows)} records are in {path}; "
                f"last good checkpoint: {good or 'none'}; lower train.lr or set train.non_finite: skip"
            )


def _forget_after(path: Path, step: int) -> None:
    """Drops lines of steps that a resumed run does again, and a line that was cut off by a kill; all at once."""
    kept = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue  # written half
    path.parent.mkdir(parents=True, exist_ok=True)
    if kept or path.exists():
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)  # killed before this, the log is whole


@runtime_checkable
class Stateful(Protocol):
    """A callback whose tensors travel with the checkpoints."""

    def tensors(self) -> dict[str, Any]:
        """Everything needed to go on after a restart."""
        ...

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Puts back what `tensors` gave; called before 'begin' of a resumed run."""
        ...


def _callable(name: str) -> Callable[[str, Loop], None]:
    """What 'module:name' names; of 'module:name(key=value, …)', what the call gives. Values are plain constants."""
    module, _, rest = name.partition(":")
    attribute, called, inside = rest.partition("(")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if called:
            call = ast.parse(f"f({inside}", mode="eval").body
            assert isinstance(call, ast.Call) and not call.args
            found = found(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (ImportError, AttributeError) as e:
        raise LuthierError(f"train.callbacks: cannot find '{name}' ({e}): write module:function") from e
    except (AssertionError, SyntaxError, TypeError, ValueError) as e:
        raise LuthierError(
            f"train.callbacks: '{name}' ({e}): write module:name(key=value, …) with numbers or texts"
        ) from e
    return found
